"""vLLM's requests for a recording: how long they are, no context says.

vLLM's connector makes the context of a request in one place (`_create_req_context` in
offloading/scheduler.py, 0.31 to 0.33), with a scratch space for us; there the request is put in.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler
from vllm.v1.kv_offload.base import ReqContext
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.request import Request

from kvstrata.offload.metering.recording import Recording
from kvstrata.offload.metering.recording_file import RecordingFile
from kvstrata.tiers.options import ConfigError

logger = logging.getLogger("kvstrata")

_FUNCTION = "_create_req_context"
_MARK = "shows_kvstrata"


@dataclass(frozen=True, slots=True)
class _Seen:
    """The request of a context, as one of its states."""

    request: Request


class Recorder:
    """Tells a recording of the requests that ended.

    Raises:
        AttributeError: this vLLM makes its contexts in another way.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._see_requests()

    def ended(self, context: ReqContext, ends: Mapping[bytes, int]) -> None:
        """A request ended, with the end tokens of its pages by key."""
        seen = context.get_state(_Seen)
        if seen is not None:
            asked = seen.request
            self._recording.add(
                asked.arrival_time, asked.num_prompt_tokens, asked.num_output_tokens, ends
            )

    def close(self) -> None:
        """No more requests end."""
        self._recording.close()

    @staticmethod
    def _see_requests() -> None:
        """Have each context that is made from now on know its request."""
        create: Any = getattr(scheduler, _FUNCTION)
        if hasattr(create, _MARK):
            return

        @functools.wraps(create)
        def create_and_show(request: Request) -> ReqContext:
            context: ReqContext = create(request)
            context.set_state(_Seen(request))
            return context

        setattr(create_and_show, _MARK, True)
        setattr(scheduler, _FUNCTION, create_and_show)


def open_recorder(
    path: str, config: OffloadingConfig, *, group: int, tokens: int, nbytes: int
) -> Recorder:
    """A recorder into a new file; for group, tokens and nbytes see `Recording`.

    Raises:
        ConfigError: the file cannot be made.
    """
    try:
        file = RecordingFile(path, config.parallel.data_parallel_index)
    except OSError as error:
        raise ConfigError(
            f"record: {path!r} cannot be made: {error.strerror}; give a file that can"
        ) from error
    logger.info("kvstrata: requests are recorded in %s", file.path)
    name = config.model.name
    return Recorder(Recording(file, group=group, tokens=tokens, nbytes=nbytes, model=name))
