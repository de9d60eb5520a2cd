"""`python -m kvstrata.kernels.bench`: the pipeline, its baselines and the link.

On a GPU, all move the same blocks between the same caches and the same pinned pages, in turns.
The CPU path is measured everywhere. Without a GPU, what its transfers would cost is computed by
a model, which is kept apart from all measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kvstrata.kernels.bench import ceiling, cost_model, cpu
from kvstrata.kernels.bench.cases import Case, Result
from kvstrata.kernels.bench.figures import append_csv, machine
from kvstrata.kernels.bench.report import plot, print_table
from kvstrata.kernels.bench.targets import summary
from kvstrata.kernels.device import CudaDevice, cuda
from kvstrata.kernels.models import LAYOUTS, MODELS, Model

# the two that vLLM takes where nothing forces another, and two with the blocks outermost
MEASURED_LAYOUTS = ["LBHNC", "LBNHC", "BHLNC", "BLNHC"]
BLOCKS = [1, 8, 64, 512]
PER_CHUNK = [1, 4, 16]
PICTURES = [".png", ".svg", ".pdf"]
_CPU_ROUNDS = 5  # for each one of a GPU: they take milliseconds, and CPUs are noisy


def measure_cpu(repeat: int, round_bytes: int) -> Iterator[Result]:
    """The CPU path."""
    for figure in cpu.measure(repeat, round_bytes=round_bytes):
        case = Case("", "", figure.case)
        yield Result(case, figure.contestant, figure.metric, figure.value, figure.unit)


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


def main(
    csv: Annotated[Path | None, typer.Option(help="Append what was measured to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw it into this file; needs matplotlib.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 3,
    model: Annotated[
        list[str] | None, typer.Option(help="Models by name; all of the table by default.")
    ] = None,
    layout: Annotated[list[str], typer.Option(help="Layouts.")] = MEASURED_LAYOUTS,
    blocks: Annotated[list[int], typer.Option(min=1, help="Blocks moved at once.")] = BLOCKS,
    per_chunk: Annotated[list[int], typer.Option(min=1, help="Blocks per chunk.")] = PER_CHUNK,
    cpu_mib: Annotated[int, typer.Option(min=8, help="MiB of a round of the CPU path.")] = 128,
) -> None:
    """Measure how fast pages move, against the link and against other ways to move them."""
    models = [m for m in MODELS if model is None or m.name in model]
    for name in {*(model or ())} - {m.name for m in MODELS}:
        raise typer.BadParameter(f"{name} is none of {', '.join(m.name for m in MODELS)}")
    for name in {*layout} - {*LAYOUTS}:
        raise typer.BadParameter(f"{name} is none of {', '.join(LAYOUTS)}")
    if max(blocks) < max(per_chunk):
        raise typer.BadParameter(f"{max(blocks)} blocks make no chunk of {max(per_chunk)}")
    for path in filter(None, (csv, picture)):
        if not path.parent.is_dir():
            raise typer.BadParameter(f"{path}: there is no directory {path.parent}")
    if picture and picture.suffix not in PICTURES:
        raise typer.BadParameter(f"{picture}: end the name with one of {', '.join(PICTURES)}")
    print("measuring the CPU path", file=sys.stderr)
    results = list(
        measure_cpu(_CPU_ROUNDS * repeat, cpu_mib << 20)
    )  # forks, so before CUDA has threads
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    predictions = []
    if cuda.is_available():
        from kvstrata.kernels.bench.contestants import has_stock

        if not has_stock():
            print("stock vLLM's copy functions are not installed: measuring without them")
        device = torch.device("cuda", cuda.current_device())
        results += measure_gpu(models, layout, per_chunk, blocks, repeat, device)
    else:
        print("no GPU here: measuring the CPU path; for GPUs a model, which measures nothing")
        predictions = list(cost_model.predict(models, layout, per_chunk))
    print_table(results, predictions, Console(width=None if sys.stdout.isatty() else 240))
    if csv:
        append_csv(csv, [result.figure for result in results])
    if picture:
        plot(results, predictions, picture)
    print(summary(results))


if __name__ == "__main__":
    typer.run(main)
