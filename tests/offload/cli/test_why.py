"""`kvstrata ls ROOT --why A B`: in which fields two namespaces differ."""

import os
import shutil
from pathlib import Path

import pytest

from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import make_namespace, namespace_paths
from tests.offload.cli.cli_world import run, run_json

LAYERS = [f"model.layers.{n}.attn" for n in range(40)]
ROPE = {"factor": 8.0, "rope_type": "llama3"}
OLD = {
    "kv_dtype": "bfloat16",
    "model_config": {"max_model_len": 4096, "hf_config": {"rope_scaling": ROPE}},
    "groups": {"0": {"layers": LAYERS}},
}
NEW = {
    "kv_dtype": "fp8",
    "model_config": {"max_model_len": 8192, "hf_config": {}},
    "groups": {"0": {"layers": LAYERS[:39]}},
    "epoch": None,
}


def make(root: Path, model: str, fields: dict[str, object]) -> NamespacePaths:
    """A namespace without pages."""
    paths = namespace_paths(str(root), model, fields)
    os.makedirs(paths.home)
    make_namespace(paths, fields, 0o600, 0o700)
    return paths


@pytest.fixture
def two(root: Path) -> tuple[NamespacePaths, NamespacePaths]:
    return make(root, "org/m", OLD), make(root, "org/m", NEW)


def test_why(root: Path, two: tuple[NamespacePaths, NamespacePaths]) -> None:
    old, new = two
    shown = run("ls", root, "--why", old.name, new.name).splitlines()
    assert shown[:17] == [
        f"A  {old.name}",
        f"B  {new.name}",
        "5 fields differ",
        "",
        "epoch",
        "    A  absent",
        "    B  null",
        "",
        "kv_dtype",
        '    A  "bfloat16"',
        '    B  "fp8"',
        "",
        "model_config.max_model_len",
        "    A  4096",
        "    B  8192",
        "",
        "groups.0.layers",
    ]
    assert shown[17].endswith('model.layers.39.attn"] (40 items)')
    assert shown[18].endswith('model.layers.38.attn"] (39 items)') and len(shown[18]) < 100
    assert shown[19:] == [
        "",
        "model_config.hf_config.rope_scaling",
        '    A  {"factor": 8.0, "rope_type": "llama3"}',
        "    B  absent",
    ]
    assert run_json("ls", root, "--why", new.name, old.name) == {
        "path": str(root),
        "namespaces": [new.name, old.name],
        "differences": [
            {"field": "epoch", "first": None},
            {"field": "kv_dtype", "first": "fp8", "second": "bfloat16"},
            {"field": "model_config.max_model_len", "first": 8192, "second": 4096},
            {"field": "groups.0.layers", "first": LAYERS[:39], "second": LAYERS},
            {"field": "model_config.hf_config.rope_scaling", "second": ROPE},
        ],
    }


def test_nothing_differs(root: Path, two: tuple[NamespacePaths, NamespacePaths]) -> None:
    name = two[0].name
    assert run("ls", root, "--why", name, name) == f"A  {name}\nB  {name}\nno field differs\n"
    third = make(root, "org/m", {**OLD, "kv_dtype": "fp8"})
    assert "\n1 field differs\n" in run("ls", root, "--why", name, third.name)


def test_ways_to_name_a_namespace(root: Path, two: tuple[NamespacePaths, NamespacePaths]) -> None:
    old, new = two
    make(root, "org/m-large", NEW | {"x": 1})
    expected = run("ls", root, "--why", old.name, new.name)
    for paths in (old, new):
        digest = paths.name[-12:]
        names = (digest, digest[:6], paths.name[:-4], paths.home, f"{paths.home}/", paths.pages)
        for name in names:
            assert expected == run(
                "ls", root, "--why", *((name, new.name) if paths is old else (old.name, name))
            )
    longer = make(root, f"{old.name}/x", {})  # that begins with the name of another one
    assert expected == run("ls", root, "--why", old.name, new.name)
    assert f"A  {longer.name}\n" in run("ls", root, "--why", f"{old.name}_x", new.name)


def test_names_that_fit_none_or_several(
    root: Path, two: tuple[NamespacePaths, NamespacePaths]
) -> None:
    known = "".join(f"    {name}\n" for name in sorted(paths.name for paths in two))
    assert run("ls", root, "--why", two[0].name, "org_m", exit_code=2) == (
        f"kvstrata: 'org_m' fits 2 namespaces below '{root}':\n{known}"
    )
    for name in ("other", "", "/"):
        assert run("ls", root, "--why", two[0].name, name, exit_code=2) == (
            f"kvstrata: no namespace below '{root}' is called '{name}':\n{known}"
        )
    assert "requires 2 arguments" in run("ls", root, "--why", "org_m", exit_code=2)


def test_a_root_without_namespaces(tmp_path: Path) -> None:
    said = f"kvstrata: no namespaces below '{tmp_path}'\n"
    assert run("ls", tmp_path, "--why", "a", "b", exit_code=2) == said
    absent = tmp_path / "absent"
    said = f"kvstrata: '{absent}': No such file or directory\n"
    assert run("ls", absent, "--why", "a", "b", exit_code=2) == said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "missing: No such file or directory"),
        ("[]", "config: not a JSON object"),
        ('{"a": NaN}', "config: Out of range float values are not JSON compliant"),
        ('{"a": 1}', "config: its fields have the digest "),
    ],
)
def test_a_config_that_is_not_sound(
    root: Path, two: tuple[NamespacePaths, NamespacePaths], text: str | None, reason: str
) -> None:
    old, new = two
    if text is None:
        os.unlink(new.config)
    else:
        Path(new.config).write_text(text)
    said = run("ls", root, "--why", old.name, new.name, exit_code=2)
    assert said.startswith(f"kvstrata: '{new.config}' tells no fields: {reason}")


def test_what_could_control_a_terminal(root: Path) -> None:
    fields = {"\x1b[2J": "\x1b[2J"}
    paths = make(root, "m", fields)
    evil = shutil.move(paths.home, root / f"\x1b]0;{paths.name}")
    make(root, "m", {})
    shown = run("ls", root, "--why", Path(evil).name, "m_44136fa355b3")
    assert shown.splitlines() == [
        f"A  \\x1b]0;{paths.name}",
        "B  m_44136fa355b3",
        "1 field differs",
        "",
        r'["\u001b[2J"]',
        r'    A  "\u001b[2J"',
        "    B  absent",
    ]
