"""A recording of what requests asked for, to be replayed by `kvstrata simulate`.

The scheduler's thread hands over what it has anyway; a thread of the recording hashes and writes.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from hashlib import blake2b

from kvstrata.offload.metering.recording_file import RecordingFile
from kvstrata.tiers.base import key_group

logger = logging.getLogger("kvstrata")

VERSION_KEY = "kvstrata_recording"  # of the first line; its value is the version of the form
_EVERY_S = 1.0
# Chunks that wait to be written, some 50 MB; a busy server hands over a tenth of it in a second.
_MOST_WAITING = 2**19
# Hashing holds the GIL, some 0.4 ms for so many chunks; then the scheduler's thread may have it.
_AT_A_TIME, _PAUSE_S = 512, 0.0001
_STOP_S = 2.0  # a disk that hangs holds up the engine's end no longer
_Row = tuple[float, int, int, Mapping[bytes, int]]


class Recording:
    """Writes a line for each request that ended: times, lengths, and a name for each chunk.

    Names are hashes under a secret that nobody keeps: equal chunks have equal names in one file,
    and no name says what a chunk is, not even to who can guess it.

    Args:
        file: to be written; closed at the end.
        group: whose chunks stand for those of all groups.
        tokens: of a chunk.
        nbytes: of a chunk's pages in the CPU tier.
        model: its name.
        every_s: seconds between two writes.
    """

    def __init__(
        self,
        file: RecordingFile,
        *,
        group: int,
        tokens: int,
        nbytes: int,
        model: str,
        every_s: float = _EVERY_S,
    ) -> None:
        self._file = file
        self._group, self._tokens = group, tokens
        self._hash = blake2b(digest_size=8, key=secrets.token_bytes(32))
        self._began = time.time()
        self._waiting: deque[_Row] = deque()
        # Of chunks: the scheduler's thread changes one of them, ours the other.
        self._added = self._taken = 0
        self._left_out = self._written = 0  # requests
        self._over = False
        header = {VERSION_KEY: 1, "tokens_per_chunk": tokens, "bytes_per_chunk": nbytes}
        self._head = _line({**header, "model": model})
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstrata-record", daemon=True)
        self._thread.start()

    def add(self, arrived: float, prompt: int, generated: int, ends: Mapping[bytes, int]) -> None:
        """A request ended. Never waits: what is too much is left out.

        Args:
            arrived: when it came, as `time.time`.
            prompt: tokens of its prompt.
            generated: tokens that it generated.
            ends: the end tokens of its pages by key, in prefix order in each group; not to be
                changed any more.
        """
        if self._over:
            return
        if self._added - self._taken + len(ends) >= _MOST_WAITING:
            self._left_out += 1
            return
        self._added += 1 + len(ends)
        self._waiting.append((arrived, prompt, generated, ends))

    def close(self) -> None:
        """Write what waits, if the disk lets us, and close the file."""
        self._stop.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        over = ""
        try:
            self._file.append(self._head)
            stop = False
            while not (stop or over):
                stop = self._stop.wait(self._every_s)
                over = self._write()
        except Exception as error:  # whatever it is, it is not the engine's problem
            over = str(error)
        self._over = True
        self._waiting.clear()
        self._file.close()
        logger.log(
            logging.WARNING if over or self._left_out else logging.INFO,
            "kvstrata: the recording %s has ended%s: %d requests are in it, %d were left out as "
            "they came faster than they could be written",
            *(self._file.path, f" ({over})" if over else "", self._written, self._left_out),
        )

    def _write(self) -> str:
        """Append all that waits; why nothing more can be written, if so."""
        while self._waiting:
            arrived, prompt, generated, ends = self._waiting.popleft()
            self._taken += 1 + len(ends)
            # the last token that was generated was not computed
            names = self._names(ends, max(prompt, prompt + generated - 1))
            if len(names) < prompt // self._tokens:
                continue  # it ended before it was looked up, and used nothing
            row = {
                "timestamp": round(max(0.0, arrived - self._began) * 1000, 3),
                "input_length": prompt,
                "output_length": generated,
                "hash_ids": names,
            }
            line = _line(row)
            if not self._file.has_room(len(line)):
                return "it is as large as it may become"
            self._file.append(line)
            self._written += 1
        return ""

    def _names(self, ends: Mapping[bytes, int], computed: int) -> list[str]:
        names = []
        for at, (key, end) in enumerate(ends.items(), 1):
            if at % _AT_A_TIME == 0:
                time.sleep(_PAUSE_S)
            # vLLM also names the end of a prompt inside a chunk
            if end <= computed and end % self._tokens == 0 and key_group(key) == self._group:
                hashed = self._hash.copy()
                hashed.update(key)
                names.append(hashed.hexdigest())
        return names


def _line(row: Mapping[str, object]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
