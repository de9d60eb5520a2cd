"""The filesystem tier against a dict, with everything that may happen in between."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.tiers.base import Lookup, RequestView
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.testing import (
    CONTEXT,
    Slots,
    finish,
    make_data,
    make_job,
    make_key,
    settle,
)
from tests.waiting import wait_until

numbers = st.integers(0, 7)
groups = st.sampled_from([0, 1])


class FsModel(RuleBasedStateMachine):
    """`files` is what must be on the disk; `spoilt` are keys whose file was damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.files: dict[bytes, bytes] = {}
        self.spoilt: set[bytes] = set()
        self.requests = 0
        self.restarts = 0
        self.job_id = 0

    @initialize()
    def start(self) -> None:
        options = {"root_dir": self.root, "n_read_threads": 1, "n_write_threads": 1}
        self.tier = FsTier(options, CONTEXT)

    @precondition(lambda self: self.restarts < 2)  # each starts two processes
    @rule()
    def restart(self) -> None:
        self.restarts += 1
        assert self.tier.shutdown(60.0)
        self.start()

    @rule(chosen=st.lists(numbers, min_size=1, max_size=5, unique=True), group=groups)
    def store(self, chosen: list[int], group: int) -> None:
        keys = [make_key(n, group) for n in chosen]
        size = CONTEXT.layouts[group].nbytes
        slots = Slots.make(len(keys), size)
        for slot, number in enumerate(chosen):
            slots.view(slot)[:] = make_data(number * 100 + self.job_id, size)
        self.job_id += 1
        self.tier.submit_store(make_job(self.job_id, keys, slots, CONTEXT))
        (result,) = finish(self.tier)
        assert result.job_id == self.job_id and not result.failed
        for slot, key in enumerate(keys):
            if key not in self.files:  # a page that is there is not written again
                self.files[key] = bytes(slots.view(slot))

    @rule(chosen=st.lists(numbers, min_size=1, max_size=5, unique=True), group=groups)
    def load(self, chosen: list[int], group: int) -> None:
        keys = [make_key(n, group) for n in chosen]
        slots = Slots.make(len(keys), CONTEXT.layouts[group].nbytes)
        self.job_id += 1
        self.tier.submit_load(make_job(self.job_id, keys, slots, CONTEXT))
        (result,) = finish(self.tier)
        expected = {}
        for slot, key in enumerate(keys):
            if key not in self.files:
                expected[key] = "missing"
            elif key in self.spoilt:
                expected[key] = "checksum"
            else:
                assert bytes(slots.view(slot)) == self.files[key]
        assert result.failed == expected
        slots.check_guards()
        for key in self.spoilt & set(keys):
            del self.files[key]
            self.spoilt.remove(key)

    @rule(number=numbers, group=groups)
    def lookup(self, number: int, group: int) -> None:
        self.requests += 1
        request = RequestView(f"request {self.requests}")
        key = make_key(number, group)
        expected = Lookup.HIT if key in self.files else Lookup.MISS
        assert settle(self.tier, key, request) is expected
        self.tier.on_request_finished(request)

    @rule(number=numbers, group=groups)
    def spoil(self, number: int, group: int) -> None:
        key = make_key(number, group)
        if key in self.files and key not in self.spoilt:
            path = Path(self.tier.paths[0].page(key))
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 0x10
            path.write_bytes(raw)
            self.spoilt.add(key)

    @invariant()
    def the_disk_agrees(self) -> None:
        report = check_root(self.root)
        assert report.files == len(self.files)
        assert len(report.bad) == len(self.spoilt)
        if report.temporary:  # the books may be being written
            wait_until(lambda: not check_root(self.root).temporary)

    def teardown(self) -> None:
        assert self.tier.shutdown(60.0)
        assert not self.tier._jobs and not self.tier._index._absent
        shutil.rmtree(self.root)


TestFsModel = FsModel.TestCase
TestFsModel.settings = settings(
    max_examples=settings.default.max_examples // 6, stateful_step_count=20
)
