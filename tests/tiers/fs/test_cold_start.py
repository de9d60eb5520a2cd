"""An engine that starts without pages says which ones of its model it cannot use, and why."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.cold_start import explain_cold_start
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import make_namespace, namespace_paths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store

FIELDS = {
    "kv_dtype": "bfloat16",
    "weights": "w1",
    "model_config": {"max_model_len": 8192, "hf_config": {"rope_theta": 5e5}},
}
PREFIX = "kvstrata fs tier: {root} has pages of this model that this engine cannot use: "


def make(
    root: Path, model: str, fields: Mapping[str, Any], opened: int = 0, pages: bool = True
) -> NamespacePaths:
    """A namespace on which an engine started at `opened`, with something in it or without."""
    paths = namespace_paths(str(root), model, fields)
    os.makedirs(paths.home)
    os.makedirs(f"{paths.pages}/quarantine")
    make_namespace(paths, fields, 0o600, 0o700)
    if pages:
        os.mkdir(f"{paths.pages}/0ab")
    os.utime(paths.home, (opened, opened))
    return paths


def said(
    caplog: pytest.LogCaptureFixture, *roots: Path, fields: Mapping[str, Any] = FIELDS
) -> list[str]:
    """What an engine of the model "m" logs at its start."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "kvstrata.tiers.fs"):
        explain_cold_start([namespace_paths(str(root), "m", fields) for root in roots], fields)
    assert {record.levelname for record in caplog.records} <= {"INFO"}
    prefixes = [PREFIX.format(root=root) for root in roots]
    texts = [record.getMessage() for record in caplog.records]
    for prefix in prefixes:
        texts = [text.removeprefix(prefix) for text in texts]
    return texts


def test_a_changed_field_is_named_with_both_values(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {**FIELDS, "model_config": {**FIELDS["model_config"], "max_model_len": 4096}}
    other = make(root, "m", changed)
    make(root, "unrelated", {**FIELDS, "weights": "w2"})
    make(root, "m", {**FIELDS, "kv_dtype": "fp8"}, pages=False)  # nobody misses it
    differs = "differs in model_config.max_model_len (4096 there, 8192 here)"
    assert said(caplog, root) == [f"'{other.name}' {differs}"]


def test_the_same_weights_under_another_name_are_the_same_model(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make(root, "/models/copy", {**FIELDS, "kv_dtype": "fp8", "extra": {"a": [1, 2]}})
    assert said(caplog, root) == [
        f"'{other.name}' differs in extra ({{\"a\": [1, 2]}} there, absent here), "
        'kv_dtype ("fp8" there, "bfloat16" here)'
    ]
    assert said(caplog, root, fields={"kv_dtype": "bfloat16"}) == []  # both lack what says so


def test_the_newest_three_and_how_many_more(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [make(root, "m", {**FIELDS, "n": n}, opened=100 - n).name for n in range(5)]
    assert said(caplog, root) == [
        *(f"'{name}' differs in n ({n} there, absent here)" for n, name in enumerate(names[:3])),
        f"and 2 more, listed by: kvstrata ls {root}",
    ]


def test_many_fields_are_not_all_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = make(root, "m", {**FIELDS, "k" * 300: 1, **{f"x{n}": n for n in range(6)}})
    (text,) = said(caplog, root)
    digests = [name[-12:] for name in (other.name, namespace_paths("/", "m", FIELDS).name)]
    assert text == (
        f"'{other.name}' differs in {'k' * 100} (1 there, absent here), "
        f"{', '.join(f'x{n} ({n} there, absent here)' for n in range(4))}, and 2 more, "
        f"shown by: kvstrata ls {root} --why {' '.join(digests)}"
    )


def test_namespaces_of_dead_engines_are_counted_only(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(30):
        make(root, "m", {**FIELDS, "epoch": str(n)}, opened=1000 + n)
    other = make(root, "m", {**FIELDS, "kv_dtype": "fp8"})
    assert said(caplog, root) == [
        f'\'{other.name}\' differs in kv_dtype ("fp8" there, "bfloat16" here)',
        "those of 30 starts of engines whose weights may change",
    ]
    # its own namespace is new at each reset
    assert said(caplog, root, fields={**FIELDS, "epoch": "mine"}) == []


def test_not_all_of_a_huge_root_is_read(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.fs.cold_start._MOST_READ", 3)
    for n in range(4):
        make(root, "unrelated", {**FIELDS, "n": n}, opened=1000 + n)
    names = [make(root, "m", {**FIELDS, "m": n}, opened=n).name for n in (1, 2)]
    newest = namespace_paths(str(root), "unrelated", {**FIELDS, "n": 3}).name
    texts = said(caplog, root)
    assert [text.split("'")[1] for text in texts] == [newest, names[1], names[0]]


def test_several_directories_are_one_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disks = [tmp_path / "a", tmp_path / "b"]
    old = {**FIELDS, "kv_dtype": "fp8"}
    names = {make(disk, "m", old).name for disk in disks}
    differs = 'differs in kv_dtype ("fp8" there, "bfloat16" here)'
    assert said(caplog, *disks) == [f"'{name}' {differs}" for name in names]
    ours = make(disks[1], "m", FIELDS, pages=False)
    assert len(said(caplog, *disks)) == 1
    os.mkdir(f"{ours.pages}/fff")  # a disk was added: its share is missing, not all
    assert said(caplog, *disks) == []


@pytest.mark.parametrize(
    "spoil", ["{", "[]", '{"kv_dtype": NaN}', '{"weights": "w1"}', "[" * 10**5, " " * 2**21, "link"]
)
def test_what_cannot_be_believed_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    other = make(root, "m", {**FIELDS, "kv_dtype": "fp8"})
    assert said(caplog, root)
    if spoil == "link":
        elsewhere = shutil.move(other.config, root / "elsewhere")
        os.symlink(elsewhere, other.config)
    else:
        Path(other.config).write_text(spoil)
    assert said(caplog, root) == []


def test_names_cannot_control_the_log(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = make(root, "m", {**FIELDS, "\x1b[2J\n": "\x1b[2J\n"})
    evil = str(root / f"\x1b[2J{other.name}")
    os.rename(other.home, evil)
    os.rename(other.pages, f"{evil}_r0")
    (text,) = said(caplog, root)
    assert text.isprintable() and r'["\u001b[2J\n"] ("\u001b[2J\n" there, absent here)' in text


def test_the_tier_says_it_once_while_it_has_no_pages(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start(**fields: object) -> list[str]:
        caplog.clear()
        context = TierContext(
            CONTEXT.model, {**CONTEXT.namespace, **fields}, CONTEXT.layouts, CONTEXT.region
        )
        with caplog.at_level(logging.INFO, "kvstrata.tiers.fs"):
            tier = FsTier({"root_dir": str(root)}, context)
            assert not store(tier, {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}).failed
            assert tier.shutdown(60.0)
        return [r.getMessage() for r in caplog.records if "cannot use" in r.getMessage()]

    assert start() == []
    first = namespace_paths(str(root), CONTEXT.model, CONTEXT.namespace)
    assert start(test=2) == [
        PREFIX.format(root=root) + f"'{first.name}' differs in test (1 there, 2 here)"
    ]
    assert start(test=2) == []
