"""Configurations that people write by mistake: what each error must name, besides the remedy."""

import json
from typing import Any

import pytest

from kvstrata.offload.config.offload_config import parse_config
from kvstrata.tiers.options import ConfigError
from kvstrata.tiers.registry import STOCK_MODULE

SIZE = ("cpu_bytes_to_use", "8GiB")
TIERS = ("secondary_tiers", '[{"type": "fs", "root_dir": "/mnt/kv"}]')
FIRST = "secondary_tiers[0]"
TYPES = (FIRST, "fs, memory")
SHARE = ("more than 0%", "10%")
CLASS = "package.module:Class"

WINDOWS = ("C:\\kv", "c:/kv", "C:kv", "\\\\host\\kv", "kv\\deep", ".\\kv", "~\\kv")


def fs(**options: Any) -> dict[str, Any]:
    return {"secondary_tiers": [{"type": "fs", "root_dir": "/some/where", **options}]}


def tiers(*entries: Any) -> dict[str, Any]:
    return {"secondary_tiers": list(entries)}


def root(*values: Any) -> dict[str, Any]:
    return tiers(*({"type": "fs", "root_dir": value} for value in values))


# What is wrong alone, and what its message names.
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # -- the CPU tier's size
    ({"cpu_bytes_to_use": None}, (*SIZE, "missing")),
    ({"cpu_bytes_to_use": "8 Gigs"}, (*SIZE, "'8 Gigs'")),
    ({"cpu_bytes_to_use": 8.5}, (*SIZE, "8.5", "8 B", "unit")),
    ({"cpu_bytes_to_use": 8}, (*SIZE, "8 B", "unit")),
    ({"cpu_bytes_to_use": "1e9"}, (*SIZE, "'1e9'")),
    ({"cpu_bytes_to_use": "80%"}, (*SIZE, "'80%'")),
    ({"cpu_bytes_to_use": 0}, (*SIZE, "0 is not positive")),
    ({"cpu_bytes_to_use": -1}, (*SIZE, "-1 is not positive")),
    ({"cpu_bytes_to_use": "900PB"}, (*SIZE, "'900PB'", "memory")),
    ({"cpu_bytes_to_use": "900TiB"}, (*SIZE, "'900TiB'", "memory")),
    ({"cpu_bytes_to_use": "5000PiB"}, (*SIZE, "'5000PiB'", "1.0 EiB")),
    # -- keys
    ({"cpu_bytes": "1GiB"}, ("'cpu_bytes'", "did you mean 'cpu_bytes_to_use'?")),
    ({"cpu_bytes_to_use_per_rank": 1}, ("'cpu_bytes_to_use_per_rank'", "use cpu_bytes_to_use")),
    ({"num_cpu_blocks": 10}, ("'num_cpu_blocks'", "use cpu_bytes_to_use")),
    ({"lazy_offload": False}, ("'lazy_offload'", "SimpleCPUOffloadConnector", "remove it")),
    ({"tiers": []}, ("'tiers'", "use secondary_tiers")),
    ({"shutdown_timeout": 15}, ("'shutdown_timeout'", "--shutdown-timeout 15")),
    (fs(max_size="1GiB"), (FIRST, "'max_size'", "use max_bytes")),
    ({"max_size": "1GiB"}, ("'max_size'", "use max_bytes of an entry of secondary_tiers")),
    ({"path": "/mnt/kv"}, ("'path'", "use root_dir of an entry of secondary_tiers")),
    ({"store_config": {}}, ("'store_config'", "only vLLM's TieringOffloadingSpec", "remove it")),
    ({"locality": "LOCAL"}, ("'locality'", "it is a key of an entry of secondary_tiers")),
    (fs(path="/mnt/kv"), (FIRST, "'path'", "use root_dir")),
    (fs(directory="/mnt/kv"), (FIRST, "'directory'", "use root_dir")),
    (
        tiers({"type": "KVStrataFs", "module_path": STOCK_MODULE, "root_dir": "/mnt/kv"}),
        (FIRST, "'KVStrataFs'", "here the type is 'fs'"),
    ),
    (fs(threads=4), (FIRST, "'threads'", "use n_read_threads and n_write_threads")),
    (fs(numThreads=4), (FIRST, "'numThreads'", "use n_read_threads and n_write_threads")),
    (fs(mode="0600"), (FIRST, "'mode'", "use file_mode and dir_mode")),
    (fs(num_cpu_blocks=1), (FIRST, "use cpu_bytes_to_use of kv_connector_extra_config, beside")),
    (tiers({"type": "memory", "path": "/x"}), (FIRST, "'path'", "known keys")),
    (fs(dir_mode="4777"), (FIRST, "dir_mode: '4777'", '"0750"')),
    (fs(max_bytes=None), (FIRST, "max_bytes is null", "leave it out")),
    (fs(min_free_bytes=None), (FIRST, "min_free_bytes is null", "leave it out", "0 for none")),
    (fs(min_free_bytes=-5), (FIRST, "min_free_bytes: -5", "0 for none")),
    ({"enable_kv_cache_events": True}, ("'enable_kv_cache_events'", "--kv-events-config")),
    ({"kv_role": "kv_both"}, ("'kv_role'", "--kv-transfer-config")),
    ({"max_offload_tokens": 5}, ("'max_offload_tokens'", "a request's kv_transfer_params")),
    ({"kv_load_tiers": []}, ("'kv_load_tiers'", "a request's kv_transfer_params")),
    ({"persist": False}, ("'persist'", "kvstrata")),
    ({"root_dir": "/mnt/kv"}, ("'root_dir'", "an entry of secondary_tiers")),
    ({"max_bytes": "1GiB"}, ("'max_bytes'", "an entry of secondary_tiers")),
    ({"enable_kv_events": True}, ("'enable_kv_events'", "an entry of secondary_tiers")),
    (fs(cpu_bytes_to_use=1), (FIRST, "'cpu_bytes_to_use'", "beside secondary_tiers")),
    (fs(eviction_policy="lru"), (FIRST, "'eviction_policy'", "beside secondary_tiers")),
    (fs(rootdir="/x"), (FIRST, "'rootdir'", "did you mean 'root_dir'?")),
    ({"Eviction_Policy": "lru"}, ("'Eviction_Policy'", "did you mean 'eviction_policy'?")),
    # -- chunks
    ({"block_size": "32"}, ("block_size: '32'", "without quotes")),
    ({"block_size": 10**9}, ("block_size: 1000000000", "1,048,576")),
    ({"blocks_per_chunk": 0}, ("blocks_per_chunk: 0", "from 1")),
    ({"blocks_per_chunk": 10**9}, ("blocks_per_chunk: 1000000000", "65,536")),
    # -- policy
    ({"eviction_policy": "LRU"}, ("eviction_policy: 'LRU'", "did you mean 'lru'?")),
    ({"eviction_policy": "fifo"}, ("eviction_policy: 'fifo'", "auto, lru, arc", CLASS)),
    ({"eviction_policy": "os:path"}, ("eviction_policy: 'os:path'", "EvictionPolicy")),
    ({"eviction_policy": "nope.mod:Cls"}, ("eviction_policy: 'nope.mod:Cls'", "No module", "give")),
    ({"eviction_policy": "builtins:dict"}, ("eviction_policy: 'builtins:dict'", "EvictionPolicy")),
    ({"eviction_policy": 7}, ("eviction_policy: 7", "auto, lru, arc", CLASS)),
    (
        {"eviction_policy": "Mine", "cache_policy_module_path": "nope.mod"},
        ("eviction_policy: 'Mine'", "No module named 'nope'"),
    ),
    ({"cache_policy_module_path": 3, "eviction_policy": "M"}, ("cache_policy_module_path: 3",)),
    # -- counts
    ({"store_threshold": -1}, ("store_threshold: -1", "from 0")),
    ({"store_threshold": 1.5}, ("store_threshold: 1.5", "whole number")),
    ({"store_threshold": "2"}, ("store_threshold: '2'", "without quotes")),
    ({"store_threshold": 10**6}, ("store_threshold: 1000000", "1,000")),
    ({"max_tracker_size": 0}, ("max_tracker_size: 0", "from 1")),
    (fs(store_threshold="2"), (FIRST, "store_threshold: '2'", "without quotes")),
    ({"sync_load_budget_bytes": "1GiB"}, ("sync_load_budget_bytes: '1GiB'", "1073741824")),
    ({"sync_load_budget_bytes": -1}, ("sync_load_budget_bytes: -1", "at least 0")),
    # -- shares and times
    ({"promotion_fraction": 0}, ("promotion_fraction: 0", "above 0 and at most 1")),
    ({"promotion_fraction": 2}, ("promotion_fraction: 2", "above 0 and at most 1")),
    ({"promotion_fraction": "half"}, ("promotion_fraction: 'half'", "above 0 and at most 1")),
    ({"promotion_fraction": "0.5"}, ("promotion_fraction: '0.5'", "without quotes")),
    ({"pin_fraction": -0.1}, ("pin_fraction: -0.1", "from 0 to 1")),
    ({"audit_fraction": 7}, ("audit_fraction: 7", "from 0 to 1")),
    ({"lookup_deadline_s": 0}, ("lookup_deadline_s: 0", "above 0")),
    ({"lookup_deadline_s": "1s"}, ("lookup_deadline_s: '1s'", "number")),
    (
        {"secondary_tiers": [{"type": "memory", "promotion_deadline_s": 0}]},
        ("secondary_tiers[0]: promotion_deadline_s: 0", "above 0"),
    ),
    # -- words
    ({"load_or_recompute": "yes"}, ("load_or_recompute: 'yes'", "true or false")),
    ({"weights_fixed": "no"}, ("weights_fixed: 'no'", "true or false")),
    ({"offload_prompt_only": "false"}, ("offload_prompt_only: 'false'", "without quotes")),
    ({"transport": "rdma"}, ("transport: 'rdma'", "auto, staged, direct, zero-copy")),
    ({"transport": "Direct"}, ("transport: 'Direct'", "did you mean 'direct'?")),
    ({"canonical_layout": False}, ("canonical_layout: False", "remove the key")),
    ({"backpressure": "high"}, ("backpressure: 'high'", "object")),
    ({"tier_poll_interval_s": "1ms"}, ("tier_poll_interval_s: '1ms'", "number")),
    # -- secondary tiers
    ({"secondary_tiers": {"type": "fs"}}, TIERS),
    ({"secondary_tiers": "fs"}, TIERS),
    ({"secondary_tiers": None}, TIERS),
    (tiers("fs"), (FIRST, "'fs'", '{"type": "fs", ...}')),
    (tiers({}), (*TYPES, '"type" is missing')),
    (tiers({"type": "FS", "root_dir": "/x"}), (*TYPES, "'FS'", "did you mean 'fs'?")),
    *(
        (tiers({"type": name, "root_dir": "/x"}), (*TYPES, f"{name!r} (did you mean 'fs'?)"))
        for name in ("filesystem", "file", "File_System", "disk", "local-disk", "directory")
    ),
    (tiers({"type": "redis"}), (*TYPES, "'redis'", "module_path")),
    (tiers({"type": "os", "module_path": "sys"}), (FIRST, "'os'", "'sys'", "no attribute")),
    (tiers({"type": "X", "module_path": "nope"}), (FIRST, "'X'", "No module named 'nope'")),
    (tiers({"type": "Path", "module_path": "pathlib"}), (FIRST, "'pathlib:Path'", "SecondaryTier")),
    (fs(enable_kv_events="yes"), (FIRST, "enable_kv_events: 'yes'", "true or false")),
    (fs(locality="remote"), (FIRST, "locality: 'remote'", "did you mean 'REMOTE'?")),
    (fs(locality="NEAR"), (FIRST, "locality: 'NEAR'", "LOCAL, REMOTE")),
    (fs(backpressure=[]), (FIRST, "backpressure: []", "object")),
    # -- directories
    (tiers({"type": "fs"}), (FIRST, "root_dir is missing", "/mnt/kv")),
    (root("kv"), (FIRST, "root_dir: 'kv' is relative", "absolute path")),
    (root(""), (FIRST, "root_dir: ''", "/mnt/kv")),
    (root([]), (FIRST, "root_dir: []", "/mnt/kv")),
    (root(["/a", "/a/b"]), (FIRST, "'/a/b'", "one directory for each disk")),
    (root("~nobodyhere/kv"), (FIRST, "'~nobodyhere/kv'", "user who is unknown")),
    (root("$HOME/kv"), (FIRST, "'$HOME/kv'", "variable", "path in full")),
    (root("/mnt/${USER}/kv"), (FIRST, "'/mnt/${USER}/kv'", "variable")),
    (root("/mnt/$(POD_NAME)"), (FIRST, "'/mnt/$(POD_NAME)'", "variable")),
    (root("/mnt/{{ name }}"), (FIRST, "'/mnt/{{ name }}'", "variable")),
    (root("s3://bucket/kv"), (FIRST, "'s3://bucket/kv'", "URL", "mounted")),
    (root("file:///mnt/kv"), (FIRST, "'file:///mnt/kv'", "URL")),
    (root("nfs:/export"), (FIRST, "'nfs:/export'", "names another host", "mounted")),
    (root("10.0.0.1:/export"), (FIRST, "names another host", "mounted")),
    (root("user@host:/kv"), (FIRST, "names another host", "mounted")),
    *((root(path), (FIRST, repr(path), "Windows", "/mnt/kv")) for path in WINDOWS),
    (root("/mnt/kv "), (FIRST, "'/mnt/kv '", "white space")),
    (root("/"), (FIRST, "'/'", "whole file system", "/mnt/kv")),
    (root("//../"), (FIRST, "'//../'", "whole file system")),
    (root("/a", "/a"), ("secondary_tiers[1]", "'/a'", "listed twice")),
    (root("/a", "/a/b"), ("secondary_tiers[1]", "'/a/b'", "'/a'", "one into the other")),
    # -- the disk budget
    (fs(max_bytes="150%"), (FIRST, "max_bytes: '150%'", *SHARE)),
    (fs(max_bytes="0%"), (FIRST, "max_bytes: '0%'", *SHARE)),
    (fs(max_bytes="1KiB"), (FIRST, "max_bytes: '1KiB'", "100GiB")),
    (fs(max_bytes=100), (FIRST, "max_bytes: 100", "unit", "100GiB")),
    (fs(max_bytes=0), (FIRST, "max_bytes: 0 is not positive")),
    (fs(max_bytes="none"), (FIRST, "max_bytes: 'none'", "8GiB")),
    (fs(min_free_bytes="100%"), (FIRST, "min_free_bytes: '100%'", *SHARE)),
    (fs(max_files=0), (FIRST, "max_files: 0", "from 1")),
    # -- the other options of files
    (fs(file_mode=600), (FIRST, "file_mode: 600", '"0640"')),
    (fs(file_mode="0444"), (FIRST, "file_mode: '0444'", "0600")),
    (fs(file_mode="rw"), (FIRST, "file_mode: 'rw'", '"0640"')),
    (fs(dir_mode="0600"), (FIRST, "dir_mode: '0600'", "0700")),
    (fs(io="mmap"), (FIRST, "io: 'mmap'", "auto, buffered, direct")),
    (fs(io="Direct"), (FIRST, "io: 'Direct'", "did you mean 'direct'?")),
    (fs(durability="yes"), (FIRST, "durability: 'yes'", "fsync, none")),
    (fs(n_read_threads=0), (FIRST, "n_read_threads: 0", "from 1 to 1,024")),
    (fs(n_read_threads=100_000), (FIRST, "n_read_threads: 100000", "from 1 to 1,024")),
    (fs(n_write_threads="auto"), (FIRST, "n_write_threads: 'auto'", "from 1 to 1,024")),
    (fs(n_write_threads="8"), (FIRST, "n_write_threads: '8'", "without quotes")),
]

# What looks odd, and is right.
TAKEN: list[dict[str, Any]] = [
    {"cpu_bytes_to_use": "8G"},
    {"cpu_bytes_to_use": "8Gi"},
    {"cpu_bytes_to_use": 8589934592.0},
    {"block_size": 16},
    {"block_size": 33},  # vLLM knows the block size of the GPU, and names what would be right
    {"canonical_layout": True},
    {"sync_load_budget_bytes": 1e9},
    fs(max_bytes="50 %"),
    fs(file_mode="600"),
    *(fs(min_free_bytes=none) for none in (0, 0.0, "0", "0GiB", "0 B", "0%", "0.00 %")),
    root("/mnt/a:/b"),
    root("/mnt/back\\slash"),
    root("~/x:/y"),
    tiers({"type": "memory"}),
    tiers({"type": "memory", "max_bytes": "1GiB"}),
]


@pytest.mark.parametrize(
    ("extra", "names"), [pytest.param(*case, id=json.dumps(case[0])) for case in REFUSED]
)
def test_one_error_that_names_what_is_wrong(extra: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"spec_name": "KVStrataSpec", "cpu_bytes_to_use": "1GiB", **extra})
    text = str(caught.value)
    assert [name for name in names if name not in text] == [], text
    assert "\n" not in text
    assert "None" not in text.replace("secondary_tiers: None", ""), "what is missing has no value"


@pytest.mark.parametrize("extra", [{}, {"spec_name": "KVStrataSpec"}])
def test_a_size_must_be_given(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cpu_bytes_to_use is missing: give .*8GiB"):
        parse_config(extra)


@pytest.mark.parametrize("extra", TAKEN, ids=json.dumps)
def test_what_looks_odd_and_is_right(extra: dict[str, Any]) -> None:
    parse_config({"cpu_bytes_to_use": "1GiB", **extra})
