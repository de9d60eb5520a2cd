"""Faults of a real server: right answers, counted by cause, and no wait without an end."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from obstore.store import S3Store

from kvstrata.tiers.base import Lookup, TierConfigError
from kvstrata.tiers.object.tier import ObjectTier
from kvstrata.tiers.process import tier as tier_module
from kvstrata.tiers.testing import (
    CONTEXT,
    RequestView,
    Slots,
    finish,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)
from tests.tiers.link import SlowLinkContract
from tests.tiers.object.conftest import OpenTier
from tests.tiers.object.server import KEY, SECRET, S3Server
from tests.tiers.object.test_contract import Objects
from tests.waiting import PATIENCE_S, wait_until

SIZE = CONTEXT.layouts[2].nbytes
KEYS = [make_key(n, group=2) for n in range(6)]
PAGES = {key: make_data(n, SIZE) for n, key in enumerate(KEYS)}
MANY = {make_key(n, group=2): make_data(n, SIZE) for n in range(500, 600)}


@pytest.mark.parametrize(
    ("cause", "spoil"),
    [
        ("truncated", lambda whole, other: whole[:-1]),
        ("truncated", lambda whole, other: b""),
        ("size", lambda whole, other: whole + b"\0"),
        ("key", lambda whole, other: other),
        ("checksum", lambda whole, other: whole[:-1] + bytes([whole[-1] ^ 1])),
        ("header", lambda whole, other: b"\xff" * len(whole)),
    ],
    ids=["short", "empty", "long", "foreign", "flipped", "rubbish"],
)
def test_a_bad_object_is_not_served_and_the_next_store_replaces_it(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store, cause: str, spoil: Any
) -> None:
    tier = open_tier(**s3_options)
    store(tier, PAGES)
    bad, other = (Objects(objects).name(CONTEXT, key) for key in KEYS[:2])
    whole, foreign = (bytes(objects.get(name).bytes()) for name in (bad, other))
    objects.put(bad, spoil(whole, foreign))
    result, arrived = load(tier, KEYS)
    assert result.failed == {KEYS[0]: cause} == {KEYS[0]: next(iter(tier.stats().failures))}
    assert arrived == {key: PAGES[key] for key in KEYS[1:]}
    assert settle(tier, KEYS[0]) is Lookup.MISS
    assert not store(tier, PAGES).failed
    assert bytes(objects.get(bad).bytes()) == whole
    assert load(tier, KEYS)[1] == PAGES


def test_an_object_of_the_wrong_size_is_not_found_and_is_replaced_at_once(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store
) -> None:
    tier = open_tier(**s3_options)
    objects.put(Objects(objects).name(CONTEXT, KEYS[0]), b"rubbish")
    assert settle(tier, KEYS[0]) is Lookup.MISS
    assert not store(tier, PAGES).failed
    assert load(tier, KEYS)[1] == PAGES


def test_a_rejected_object_goes_to_the_quarantine(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store
) -> None:
    tier = open_tier(**s3_options)
    store(tier, PAGES)
    slots = Slots.make(1, SIZE)
    assert tier.submit_reject(make_job(5, KEYS[:1], slots, CONTEXT), distrust=True)
    finish(tier)
    names = [each["path"] for batch in objects.list() for each in batch]
    kept = [name.rpartition("/")[2] for name in names if "_r0/quarantine/" in name]
    assert sorted(name.partition("-")[2].rpartition("-")[0] for name in kept) == [
        "audit",
        "audit-computed",
    ]
    assert not open_tier(**s3_options).trusted, "until the mark is taken away"
    objects.delete([name for name in names if name.endswith("distrusted.json")])
    assert open_tier(**s3_options).trusted


def test_a_silent_server_is_a_miss_and_nothing_hangs(
    open_tier: OpenTier, s3: S3Server, s3_options: dict[str, Any]
) -> None:
    tier = open_tier(**s3_options)
    store(tier, PAGES)
    others = {make_key(n, group=2): make_data(n, SIZE) for n in range(50, 56)}
    with s3.silent():
        assert load(tier, KEYS)[0].failed == dict.fromkeys(KEYS, "unreachable")
        assert store(tier, others).failed == dict.fromkeys(others, "unreachable")
        assert settle(tier, make_key(99, group=2)) is Lookup.MISS
        with pytest.raises(TierConfigError, match=r"^url: 's3://.* see that the server runs"):
            open_tier(**s3_options)
    assert load(tier, KEYS)[1] == PAGES, "one that was found is still believed"
    assert not store(tier, others).failed
    assert load(tier, list(others))[1] == others
    assert set(tier.stats().failures) == {"unreachable"}
    assert tier.stats().counters["restarted_processes"] == 0


def test_nobody_waits_for_a_server_that_is_silent(
    open_tier: OpenTier,
    s3: S3Server,
    s3_options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job of many tasks takes as long as one request."""
    monkeypatch.setattr(tier_module, "_TASK_BYTES", 1)
    tier = open_tier(**s3_options)
    store(tier, MANY)
    with s3.silent():
        start = time.monotonic()
        assert load(tier, list(MANY))[0].failed == dict.fromkeys(MANY, "unreachable")
        assert time.monotonic() - start < PATIENCE_S / 3  # task by task it would be 50 s, or 100
    wait_until(lambda: load(tier, list(MANY))[1] == MANY)


def test_the_environment_may_name_the_server(
    open_tier: OpenTier, s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_options.pop("endpoint"))
    tier = open_tier(**s3_options)
    assert not store(tier, PAGES).failed
    assert load(tier, KEYS)[1] == PAGES


class TestSlowLink(SlowLinkContract):
    @pytest.fixture
    def server_port(self, s3: S3Server) -> int:
        return s3.port

    @pytest.fixture
    def open_tier_on(
        self, open_tier: OpenTier, s3_options: dict[str, Any]
    ) -> Callable[[int], ObjectTier]:
        return lambda port: open_tier(
            **s3_options | {"endpoint": f"http://127.0.0.1:{port}", "timeout_s": 1}
        )


def test_a_server_that_is_killed_and_comes_back(
    open_tier: OpenTier, s3: S3Server, s3_options: dict[str, Any]
) -> None:
    tier = open_tier(**s3_options)
    store(tier, PAGES)
    many = {make_key(n, group=2): make_data(n, SIZE) for n in range(100, 400)}
    slots = Slots.make(len(many), SIZE)
    for slot, page in enumerate(many.values()):
        slots.view(slot)[:] = page
    tier.submit_store(make_job(1, list(many), slots, CONTEXT))
    s3.kill()
    (result,) = finish(tier)
    assert set(result.failed.values()) <= {"unreachable", "io-error"}
    assert settle(tier, make_key(99, group=2)) is Lookup.MISS
    s3.start()
    for key in (key for key in many if settle(tier, key, RequestView("again")) is Lookup.HIT):
        loaded, arrived = load(tier, [key])
        assert arrived == {key: many[key]} or loaded.failed, "whole, or not at all"
    assert not store(tier, many).failed
    assert load(tier, list(many))[1] == many


@pytest.mark.parametrize("named", ["key", "secret", "bucket"])
def test_a_start_that_cannot_work_is_one_error(
    open_tier: OpenTier,
    s3_options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    named: str,
) -> None:
    if named == "bucket":
        s3_options["url"] = "s3://no-such-bucket/kv"
    else:
        name = "AWS_ACCESS_KEY_ID" if named == "key" else "AWS_SECRET_ACCESS_KEY"
        monkeypatch.setenv(name, "hunter2hunter2")
    with pytest.raises(
        TierConfigError,
        match=r"^url: 's3://.* see that the " + ("bucket" if named == "bucket" else "cred"),
    ) as caught:
        open_tier(**s3_options)
    text = str(caught.value)
    assert SECRET not in text and "hunter2" not in text and "\n" not in text
    assert ("NoSuchBucket" if named == "bucket" else "403") in text


def test_without_credentials_the_remedy_is_to_give_some(
    open_tier: OpenTier, s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(TierConfigError, match=r"^url: 's3://.* no credentials were found: set"):
        open_tier(**s3_options)


def test_another_config_under_the_same_name_is_refused(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store
) -> None:
    open_tier(**s3_options)
    (name,) = [each["path"] for batch in objects.list() for each in batch]
    objects.put(name, b'{"test": 2}')
    with pytest.raises(TierConfigError, match=r"field 'groups' of .*config.json.* another prefix"):
        open_tier(**s3_options)
    objects.put(name, b"[")
    with pytest.raises(TierConfigError, match="unreadable"):
        open_tier(**s3_options)


def test_a_profile_logs_in(
    open_tier: OpenTier,
    s3_options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "kv")
    (tmp_path / "credentials").write_text(
        f"[kv]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    )
    tier = open_tier(**s3_options)
    assert not store(tier, PAGES).failed
    assert load(tier, KEYS)[1] == PAGES
