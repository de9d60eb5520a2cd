"""The options of the servers in the documentation are vLLM's."""

from typing import Any

import pytest

from tests.docs.blocks import shell_commands
from tests.docs.test_deploy import EXAMPLES

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # where it was before vLLM 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser

    return make_arg_parser(FlexibleArgumentParser())


def shown() -> dict[str, list[str]]:
    """By where it stands, what follows `vllm serve`, or the server's module."""
    found = {name: read().arguments for name, read in EXAMPLES.items()}
    for command in shell_commands():
        words = command.words
        if words[:2] == ["vllm", "serve"]:
            found[command.where] = words[2:]
        elif words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]:
            found[command.where] = words[3:]
    return found


def test_servers_are_found() -> None:
    assert len(shown()) >= len(EXAMPLES) + 2


@pytest.mark.parametrize("place", shown())
def test_vllm_knows_the_options(place: str, parser: Any) -> None:
    arguments = parser.parse_args(shown()[place])
    assert arguments.shutdown_timeout == 15
    assert arguments.kv_transfer_config.kv_connector == "OffloadingConnector"
    extra = arguments.kv_transfer_config.kv_connector_extra_config
    assert extra["spec_name"] == "KVStrataSpec"
