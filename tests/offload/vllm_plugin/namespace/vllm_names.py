"""The names that the tables must know, as an installed vLLM has them.

`vllm_names.json` holds them for vLLM 0.31.0, 0.32.0 and 0.33.0, each written by
`python tests/offload/vllm_plugin/namespace/vllm_names.py` in an environment with that version.
"""

import importlib
import json
import pkgutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")

# What is configured by these is no part of VllmConfig, or a value of one of its fields.
VALUES = {
    "AudioDummyOptions": "a value of limit_per_prompt",
    "BaseDummyOptions": "a value of limit_per_prompt",
    "ImageDummyOptions": "a value of limit_per_prompt",
    "ModelArchitectureConfig": "made from hf_config",
    "QuantSpec": "a value of quantization_config",
    "QuantizationConfigArgs": "a value of quantization_config",
    "Range": "a value of CompilationConfig's",
    "SpeechToTextConfig": "an endpoint's",
    "SpeechToTextParams": "an endpoint's",
    "VideoDummyOptions": "a value of limit_per_prompt",
}


def configuration_fields() -> dict[str, list[str]]:
    """Fields by class, of all configuration classes but those of `VALUES`."""
    import vllm.config

    found = {}
    for info in pkgutil.iter_modules(vllm.config.__path__):
        module = importlib.import_module(f"vllm.config.{info.name}")
        for name, item in vars(module).items():
            if name not in VALUES and is_dataclass(item) and item.__module__ == module.__name__:
                found[name] = sorted(field.name for field in fields(item))
    return found


def environment_names() -> list[str]:
    import vllm.envs

    return sorted(vllm.envs.environment_variables)


def length_readers() -> dict[str, list[str]]:
    """Models, and shared layers, whose source speaks of `max_model_len`."""
    import vllm

    root = Path(vllm.__file__).parent

    def speakers(folder: str) -> list[str]:
        names = {
            path.relative_to(root / folder).parts[0].removesuffix(".py")
            for path in (root / folder).rglob("*.py")
            if "max_model_len" in path.read_text()
        }
        return sorted(names)

    models = {*speakers("model_executor/models"), *speakers("models")}
    return {"models": sorted(models), "layers": speakers("model_executor/layers")}


def names() -> dict[str, Any]:
    return {
        "fields": configuration_fields(),
        "environment": environment_names(),
        "max_model_len": length_readers(),
    }


if __name__ == "__main__":
    import vllm

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[vllm.__version__] = names()
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
