"""GPU transfers that take time, on a machine whose transfers end when they are submitted."""

from collections.abc import Callable, Collection, Sequence

from kvstrata.kernels.pipeline import Finished, GroupWork, Pipeline


class SlowPipeline:
    """Starts the transfers of `inner` late, as late as a device may: see `Pipeline`.

    A transfer starts at the `polls()`-th call of `finished` after its submission, or when
    vLLM wants its blocks for something else.
    """

    def __init__(self, inner: Pipeline, polls: Callable[[], int]) -> None:
        self._inner = inner
        self._polls = polls
        self._poll = 0
        self._held: dict[int, tuple[int, Callable[[], None]]] = {}  # by job id, in order

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        due = self._poll + self._polls()
        self._held[job_id] = due, lambda: self._inner.submit_store(job_id, work)

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        due = self._poll + self._polls()
        self._held[job_id] = due, lambda: self._inner.submit_load(job_id, work, expedited)

    def finished(self) -> list[Finished]:
        self._poll += 1
        self._start({job_id for job_id, (due, _) in self._held.items() if due <= self._poll})
        return self._inner.finished()

    def fence(self, job_ids: Collection[int]) -> None:
        self._start(job_ids)

    def wait(self, job_ids: Collection[int]) -> None:
        self._start(job_ids)

    def describe(self) -> str:
        return f"slow: {self._inner.describe()}"

    def shutdown(self) -> None:
        self._start(set(self._held))
        self._inner.shutdown()

    def _start(self, job_ids: Collection[int]) -> None:
        for job_id in [job_id for job_id in self._held if job_id in job_ids]:
            _, start = self._held.pop(job_id)
            start()
