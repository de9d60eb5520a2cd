"""The options of the object tier: one error that names key and remedy, and never shows a secret."""

import sys
from typing import Any

import pytest
from obstore.store import AzureStore, GCSStore, S3Store

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.object.bucket import open_store
from kvstrata.tiers.object.config import ObjectConfig
from kvstrata.tiers.object.tier import ObjectTier

SECRET = "hunter2"


@pytest.mark.parametrize(
    "options",
    [
        {"url": f"s3://user:{SECRET}@bucket/kv"},
        {"url": f"s3://user:{SECRET}/with/a/slash@bucket/kv"},
        {"url": f"s3://{SECRET}@bucket/kv"},
        {"url": f"s3://bucket/kv?X-Amz-Signature={SECRET}"},
        {"url": f"https://account.blob.core.windows.net/kv?sig={SECRET}"},
        {"url": f"abfss://kv:{SECRET}@account.dfs.core.windows.net/kv"},
        {"url": "s3://bucket", "endpoint": f"https://user:{SECRET}@host:9000"},
        {"url": "s3://bucket", "secret_access_key": SECRET},
        {"url": "s3://bucket", "aws_access_key_id": SECRET},
        {"url": "s3://bucket", "session_token": SECRET},
        {"url": "az://container", "account_key": SECRET},
        {"url": "az://container", "sas_token": SECRET},
        {"url": "gs://bucket", "service_account_key": SECRET},
        {"url": "s3://bucket", "profile": SECRET},
    ],
)
def test_credentials_are_refused_and_not_repeated(options: dict[str, Any]) -> None:
    with pytest.raises(TierConfigError, match="credentials are taken from") as caught:
        ObjectTier.check_options(options)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'url is missing: give the bucket .*"s3://bucket/prefix"'),
        ({"url": ""}, "url: '' is wrong"),
        ({"url": 3}, "url: 3 is wrong"),
        ({"url": "bucket/kv"}, "url: 'bucket/kv' is wrong; give \"s3://"),
        ({"url": "s3:///kv"}, "url: 's3:///kv' is wrong"),
        ({"url": "s3://[bucket"}, "url: .* is wrong"),
        ({"url": "ftp://bucket"}, "url: 'ftp://bucket' is wrong"),
        ({"url": "file:///mnt/kv"}, 'is a directory: give it to a tier of type "fs"'),
        ({"url": "https://minio:9000/bucket"}, "the server's address belongs in endpoint"),
        ({"url": "s3://bucket/a//b"}, "single slashes"),
        ({"url": "s3://bucket/a/../b"}, "single slashes"),
        ({"url": "s3://bucket/$USER"}, "single slashes"),
        ({"url": "s3://bucket", "endpoint": "minio:9000"}, "endpoint: 'minio:9000' is wrong"),
        ({"url": "gs://bucket", "region": "eu"}, "region: is for s3:// only"),
        ({"url": "s3://bucket", "region": ""}, "region: '' is wrong"),
        ({"url": "s3://bucket", "timeout_s": 1e-9}, "timeout_s: 1e-09 is wrong; .* at least 0.01"),
        ({"url": "s3://bucket", "timeout_s": 60}, "timeout_s: 60 is wrong; .* at most 10"),
        ({"url": "s3://bucket", "timeout": 3}, "use timeout_s"),
        ({"url": "s3://bucket", "max_bytes": "1TiB"}, "unknown key 'max_bytes': a lifecycle rule"),
        ({"bucket": "kv"}, "unknown key 'bucket': use url"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TierConfigError, match=message):
        ObjectTier.check_options(options)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(TierConfigError, match=r"pip install 'kvstrata\[object\]'"):
        ObjectTier.check_options({"url": "s3://bucket"})


@pytest.mark.parametrize(
    ("url", "kind", "prefix"),
    [
        ("s3://bucket", S3Store, None),
        ("s3://bucket/a/b/", S3Store, "a/b"),
        ("gs://bucket/kv", GCSStore, "kv"),
        ("abfss://kv@account.dfs.core.windows.net/a", AzureStore, "a"),
        ("az://kv/a", AzureStore, "a"),
    ],
)
@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9000"])
def test_each_scheme_is_a_store(
    url: str,
    kind: type,
    prefix: str | None,
    endpoint: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = open_store(ObjectConfig.parse({"url": url, "endpoint": endpoint}))
    assert isinstance(store, kind)
    assert store.prefix == prefix
