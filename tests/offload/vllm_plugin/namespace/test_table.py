"""The tables know every name of each supported vLLM, and no other."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import vllm  # noqa: E402
from vllm.config import CacheConfig  # noqa: E402

from kvstrata.offload.vllm_plugin.engine.version import SUPPORTED  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace import environment, length, rule  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.table import TABLE  # noqa: E402
from tests.offload.vllm_plugin.namespace.length_readers import HARMLESS, LAYERS  # noqa: E402
from tests.offload.vllm_plugin.namespace.vllm_names import RECORD, names  # noqa: E402

RECORDS: dict[str, Any] = json.loads(RECORD.read_text())
VERSIONS = [*RECORDS, "installed"]


def names_of(version: str) -> dict[str, Any]:
    return names() if version == "installed" else RECORDS[version]


def known(name: str) -> set[str]:
    """The fields of a class that the tables know."""
    table = TABLE[name]
    return {*table.deciding, *table.inner, *table.left_out, *on_condition(name)}


def on_condition(name: str) -> list[str]:
    return [field for each, field in (n.split(".") for n in rule._CONDITIONS) if each == name]


def unknown_fields(classes: Mapping[str, Iterable[str]]) -> set[str]:
    """What the table does not know, as Class.field."""
    return {
        f"{name}.{field}"
        for name, each in classes.items()
        for field in each
        if name not in TABLE or field not in known(name)
    }


def test_every_supported_version_is_on_record() -> None:
    found = {version.rsplit(".", 1)[0] for version in RECORDS}
    assert found == {f"{major}.{minor}" for major, minor in SUPPORTED}


def test_the_record_is_what_is_installed() -> None:
    """Another version than those on record is held against the tables all the same."""
    assert RECORDS.get(vllm.__version__, names()) == names()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_decides_or_is_left_out_by_name(version: str) -> None:
    assert unknown_fields(names_of(version)["fields"]) == set()


def test_a_new_field_is_found() -> None:
    @dataclass
    class Next(CacheConfig):
        kv_rotation: float = 0.0

    found = unknown_fields({"CacheConfig": [field.name for field in fields(Next)]})
    assert found == {"CacheConfig.kv_rotation"}
    assert unknown_fields({"RotationConfig": ["angle"]}) == {"RotationConfig.angle"}


def test_no_name_is_made_up() -> None:
    classes: dict[str, set[str]] = {}
    for record in RECORDS.values():
        for name, each in record["fields"].items():
            classes.setdefault(name, set()).update(each)
    assert {name: known(name) for name in TABLE} == classes


@pytest.mark.parametrize("name", TABLE)
def test_each_field_is_in_one_place_and_each_reason_says_something(name: str) -> None:
    table = TABLE[name]
    places = (table.deciding, on_condition(name), table.inner, table.left_out)
    assert sum(len(place) for place in places) == len(known(name))
    assert all(len(reason) > 10 for reason in table.left_out.values())
    assert set(table.inner.values()) <= TABLE.keys()


def test_conditions_and_values_are_of_classes_in_the_table() -> None:
    assert {field.rsplit(".", 1)[0] for field in (*rule._CONDITIONS, *rule._VALUES)} <= TABLE.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_environment_variable_is_known(version: str) -> None:
    assert set(names_of(version)["environment"]) <= {*environment.DECIDING, *environment.LEFT_OUT}


def test_no_environment_variable_is_made_up() -> None:
    every = {name for record in RECORDS.values() for name in record["environment"]}
    assert {*environment.DECIDING, *environment.LEFT_OUT} == every
    assert not environment.DECIDING.keys() & environment.LEFT_OUT.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_reader_of_max_model_len_was_looked_at(version: str) -> None:
    found = names_of(version)["max_model_len"]
    assert set(found["models"]) <= {*length.READERS, *HARMLESS}
    assert set(found["layers"]) <= LAYERS.keys()
