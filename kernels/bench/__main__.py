"""`python -m kvstrata.kernels.bench`: the pipeline, its baselines and the link.

On a GPU, all move the same blocks between the same caches and the same pinned pages, in turns.
The CPU path is measured everywhere. Without a GPU, what its transfers would cost is computed by
a model, which is kept apart from all measurements. Needs torch, numpy and Triton only, so that it
runs on a machine with a GPU as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from kvstrata.kernels.bench import ceiling, cost_model, cpu, host
from kvstrata.kernels.bench.models import LAYOUTS, MODELS, Model
from kvstrata.kernels.bench.results.cases import Result
from kvstrata.kernels.bench.results.figures import append_csv, machine_line
from kvstrata.kernels.bench.results.kernel_targets import held
from kvstrata.kernels.bench.results.report import plot, rows
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.kernels.bench.results.targets import summary
from kvstrata.kernels.gpu.device import CudaDevice, cuda

# the two that vLLM takes where nothing forces another, and two with the blocks outermost
MEASURED_LAYOUTS = ["LBHNC", "LBNHC", "BHLNC", "BLNHC"]
BLOCKS = [1, 8, 64, 512]
PER_CHUNK = [1, 4, 16]
PICTURES = [".png", ".svg", ".pdf"]
_CPU_ROUNDS = 5  # for each one of a GPU: they take milliseconds, and CPUs are noisy
_HOST_ROUNDS = 100  # likewise


def measure_gpu(
    models: Sequence[Model],
    layouts: Sequence[str],
    per_chunks: Sequence[int],
    blocks: Sequence[int],
    repeat: int,
    device: torch.device,
) -> Iterator[Result]:
    """All models in all layouts; the loops beside the transfers once per model."""
    from kvstrata.kernels.bench.contestants import Piped, contestants
    from kvstrata.kernels.bench.neighbours import measure as measure_neighbours
    from kvstrata.kernels.bench.scene import Scene, region_bytes
    from kvstrata.kernels.bench.transfers import latency, measure

    most = max(blocks)
    nbytes = max(region_bytes(model, most) for model in models)
    memory = torch.empty(nbytes, dtype=torch.uint8)
    pinning = CudaDevice(device)
    pinning.pin(memory.view(1, -1))

    def one(model: Model, layout: str, per_chunk: int) -> Iterator[Result]:
        scene = Scene(model, layout, per_chunk, most, memory, device)
        found = contestants(scene)
        ours = next(one for one in found if isinstance(one, Piped))
        print(f"  chunks of {per_chunk}: {ours.pipeline.describe()}", file=sys.stderr)
        yield from measure(scene, found, blocks, ceilings, repeat)
        yield from latency(scene, found)
        if (layout, per_chunk) == (layouts[0], per_chunks[0]):
            yield from measure_neighbours(scene, found, most, repeat)
        for contestant in found:
            contestant.close()
        del scene, found
        cuda.empty_cache()  # blocks of this scene's sizes fit no other

    for model in models:
        links = list(ceiling.measure(model.name, device))
        ceilings = {link.case.operation: link.value for link in links}
        yield from links
        for layout in layouts:
            print(f"measuring {model.name}, {layout}", file=sys.stderr)
            for per_chunk in per_chunks:
                yield from one(model, layout, per_chunk)
    pinning.unpin()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure how fast pages move, against the link and against other ways to move them."""
    wanted = _wanted(arguments)
    models, layouts, per_chunks = wanted.model, wanted.layout, wanted.per_chunk
    results: list[Result] = []
    if wanted.part in (None, 1):  # the same for all models
        print("measuring the CPU path", file=sys.stderr)
        # forks, so before CUDA has threads
        results += cpu.measure(_CPU_ROUNDS * wanted.repeat, round_bytes=wanted.cpu_mib << 20)
        print("measuring the host's part of a GPU's work", file=sys.stderr)
        results += host.measured(_HOST_ROUNDS * wanted.repeat)
    print(machine_line())
    predictions = []
    if cuda.is_available():
        from kvstrata.kernels.bench.contestants import has_stock

        if not has_stock():
            print("stock vLLM's copy functions are not installed: measuring without them")
        device = torch.device("cuda", cuda.current_device())
        results += measure_gpu(models, layouts, per_chunks, wanted.blocks, wanted.repeat, device)
    else:
        print("no GPU here: measuring the CPU path; for GPUs a model, which measures nothing")
        predictions = list(cost_model.predict(models, layouts, per_chunks))
    print_table(rows(results, predictions), 2)
    if wanted.csv:
        append_csv(wanted.csv, results)
    if wanted.plot:
        plot(results, predictions, wanted.plot)
    print(summary(held(results)))


def _wanted(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for. The standard library's parser: see the module."""
    parser = argparse.ArgumentParser(prog="kvstrata.kernels.bench", description=main.__doc__)
    names = [model.name for model in MODELS]
    option = parser.add_argument
    option("--csv", type=Path, help="append what was measured to this file")
    option("--plot", type=Path, help="draw it into this file, if matplotlib is there")
    option("--repeat", type=_at_least(1), default=3, help="rounds of each case")
    option("--model", choices=names, action="append", help="by name, one or more; all by default")
    option("--part", type=int, choices=range(1, len(MODELS) + 1), help="one model, by number")
    option("--layout", choices=LAYOUTS, action="append", help="one or more")
    option("--blocks", type=_at_least(1), action="append", help="moved at once; one or more")
    option("--per-chunk", type=_at_least(1), action="append", help="blocks of a chunk; one or more")
    option("--cpu-mib", type=_at_least(8), default=128, help="MiB of a round of the CPU path")
    wanted = parser.parse_args(arguments)
    chosen = [model for model in MODELS if wanted.model is None or model.name in wanted.model]
    wanted.model = chosen[wanted.part - 1 : wanted.part] if wanted.part else chosen
    wanted.layout = wanted.layout or MEASURED_LAYOUTS
    wanted.blocks = wanted.blocks or BLOCKS
    wanted.per_chunk = wanted.per_chunk or PER_CHUNK
    if max(wanted.blocks) < max(wanted.per_chunk):
        parser.error(f"{max(wanted.blocks)} blocks make no chunk of {max(wanted.per_chunk)}")
    for path in filter(None, (wanted.csv, wanted.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no directory {path.parent}")
    if wanted.plot and wanted.plot.suffix not in PICTURES:
        parser.error(f"{wanted.plot}: end the name with one of {', '.join(PICTURES)}")
    if wanted.plot and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: drawing nothing", file=sys.stderr)
        wanted.plot = None
    return wanted


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


if __name__ == "__main__":
    main()
