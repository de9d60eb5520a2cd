"""`kvstrata simulate`: how much a cache of this size would find, before anybody buys it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.offload.cli.printing import AsJson, fail, state_bar
from kvstrata.offload.cli.roots.root import refuse

if TYPE_CHECKING:
    from kvstrata.offload.simulate.results import Result
    from kvstrata.offload.simulate.setup import Engine, Setup
    from kvstrata.offload.simulate.traces import Trace

_Say = Callable[[str], None] | None


def simulate(
    trace: Annotated[
        str, typer.Argument(metavar="TRACE", help="Requests of Mooncake, Qwen-Bailian, or ours.")
    ],
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON", help="A kv_connector_extra_config; may be given again, to compare."
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help='Sizes of the tiers, doubled from end to end: "cpu=8GiB..512GiB,fs=0..8TiB".',
        ),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Each configuration with each: lru,arc,auto,s3-fifo,optimum."
        ),
    ] = None,
    bytes_per_token: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='Of the model\'s KV cache, such as "320KiB".'),
    ] = None,
    tokens_per_chunk: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="A multiple of those of the trace's hashes."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="vLLM's prefix cache in GPU memory.")
    ] = None,
    servers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prefills that are computed at once.")
    ] = 1,
    speed: Annotated[
        str | None,
        typer.Option(
            metavar="SPEEDS",
            help='"prefill=10000,decode=50" in tokens/s, "gpu=25GB,read=3GB,write=2GB" a second, '
            '"latency=0.0005" of the disk in seconds: these are the defaults.',
        ),
    ] = None,
    endurance: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help='The SSD\'s: "7PB" in five years, or "1x3.84TB" a day (DWPD).'
        ),
    ] = None,
    price: Annotated[
        str | None, typer.Option(metavar="PRICES", help='Of the tiers: "cpu=4/GiB,fs=0.1/GiB".')
    ] = None,
    target_hit_rate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0, max=1, help="Name the cheapest that reaches it."),
    ] = None,
    target_ttft: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Name the cheapest whose p90 is no longer."),
    ] = None,
    chart: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the curves; needs matplotlib.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a trace of requests on the real manager, with no engine and no bytes moved.

    Says what each configuration would find and move, and how long requests would wait. Exits with 2
    if TRACE cannot be read or an option is wrong.
    """
    from kvstrata.offload.cli.simulate import options
    from kvstrata.offload.cli.simulate.report import Report
    from kvstrata.offload.simulate import chart as charts
    from kvstrata.offload.simulate.costs import TIERS, Prices, parse_endurance, parse_price
    from kvstrata.offload.simulate.setup import parse_setup
    from kvstrata.offload.simulate.sweep import Target, pairs
    from kvstrata.offload.simulate.traces import open_trace, parse_trace
    from kvstrata.tiers.options import ConfigError

    try:
        with open_trace(trace) as lines:  # a wrong path is said before all else
            given = list(options.configs(config or [], sweep, policies))
            setups = [(parse_setup(extra), best) for extra, best in given]
            per_day = None if endurance is None else parse_endurance(endurance)
            if chart is not None:
                charts.check(chart)
            prices = target = None
            if price is not None:
                each = pairs("--price", price, TIERS)
                prices = Prices({tier: parse_price(tier, text) for tier, text in each.items()})
                prices.check(setup for setup, _ in setups)
            if target_hit_rate is not None or target_ttft is not None:
                target = Target(target_hit_rate, target_ttft)
                if prices is None:
                    raise ConfigError(
                        "a target is given, but not what tiers cost; give --price too"
                    )
            requests = parse_trace(trace, lines, tokens_per_chunk)
            if requests.cut_line is not None:
                note = f"line {requests.cut_line}, the last, is cut; it is left out"
                typer.echo(f"kvstrata: {trace!r}: {note}", err=True)
        engine = options.engine(requests, bytes_per_token, gpu, servers, options.speeds(speed))
        options.check_sizes((setup for setup, _ in setups), engine, sweep)
        with state_bar("replaying") as say:
            results = [_replay(requests, *setup, engine, say) for setup in setups]
    except ConfigError as error:
        refuse(str(error))
    except OSError as error:
        fail(str(error.filename or trace), error)
    report = Report(requests, prices, per_day, target)
    (report.print_json if as_json else report.show)(results)
    if chart is not None:
        try:
            charts.draw(results, chart)
        except OSError as error:
            fail(chart, error)


def _replay(trace: Trace, setup: Setup, best: bool, engine: Engine, say: _Say) -> Result:
    from kvstrata.offload.simulate.results import optimum, simulate

    if say is not None:
        say(setup.name)
    return (optimum if best else simulate)(trace, setup, engine)
