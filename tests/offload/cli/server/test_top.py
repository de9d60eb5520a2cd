"""`kvstrata top`: its figures, its screen, and a server that goes away and comes back."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Label, Sparkline, Static

from kvstrata.offload.cli.server.scrape import read
from kvstrata.offload.cli.server.top import app as top_app
from kvstrata.offload.cli.server.top import command
from kvstrata.offload.cli.server.top.app import Top
from kvstrata.offload.cli.server.top.figures import figures
from kvstrata.offload.metering import names as n
from tests.offload.cli.cli_world import outcome
from tests.offload.cli.server.server_world import GIB, FakeServer, Metrics, healthy, started
from tests.waiting import PATIENCE_S


def busier() -> Metrics:
    """Healthy, and so much more ten seconds later."""
    metrics = healthy().count(n.QUERY_CHUNKS, 1000, tier="primary")
    metrics.count(n.HIT_CHUNKS, 250, tier="primary").count(n.QUERY_CHUNKS, 750, tier="fs")
    metrics.count(n.HIT_CHUNKS, 300, tier="fs").count(n.HIT_TOKENS, 550 * 16, tier="fs")
    metrics.count(n.READ_BYTES, 20e9, tier="fs").count(n.WRITTEN_BYTES, 10e9, tier="fs")
    return metrics.count(n.WAIT_SECONDS, 5).count("vllm:request_success", 40)


# ---- figures ----


def test_figures() -> None:
    seen = figures(healthy().scrape(0.0), busier().scrape(10.0))
    assert (seen.served, seen.serving) == (16 * 400_550, 880)
    assert (seen.saved_net, seen.waited, seen.waits) == (760, 45, 0.5)
    assert (seen.running, seen.waiting, seen.ended) == (3, 1, 4)
    assert seen.hit_rate_now == 0.55
    primary, fs = seen.tiers
    assert (primary.name, primary.hit_rate_now, fs.hit_rate_now) == ("primary", 0.25, 0.4)
    assert (fs.hit_rate, primary.hit_rate) == (100_300 / 200_750, 300_250 / 501_000)
    assert (fs.read_rate, fs.write_rate) == (2e9, 1e9)
    assert (fs.held, fs.capacity, fs.disk_used) == (60 * GIB, 1000 * GIB, 500 * GIB)
    assert (primary.disk_used, primary.state, fs.state) == (None, "", "")


def test_nothing_happens() -> None:
    seen = figures(healthy().scrape(5.0), healthy().scrape(5.0))
    assert (seen.hit_rate_now, seen.serving, seen.tiers[1].hit_rate_now) == (None, 0.0, None)
    nothing = Metrics().gauge(n.INFO, 1).scrape()
    (primary,) = figures(nothing, nothing).tiers
    assert (primary.hit_rate, primary.held) == (None, None)


def test_what_is_wrong_with_a_tier() -> None:
    sick = healthy().gauge(n.BREAKER_OPEN, 1, tier="fs").gauge(n.STORES_FAILING, 1, tier="fs")
    assert figures(sick.scrape(), sick.scrape()).tiers[1].state == "left alone, stores fail"


def test_engines_have_a_cpu_tier_each_and_share_the_disk() -> None:
    lines: dict[str, None] = {}
    for engine in ("0", "1"):
        lines |= dict.fromkeys(started(Metrics(engine=engine)).text().splitlines())
    with FakeServer("\n".join(lines) + "\n") as server:
        now = read(server.url)
    primary, fs = figures(now, now).tiers
    assert (primary.capacity, fs.capacity) == (128 * GIB, 1000 * GIB)
    assert fs.disk_used == 500 * GIB


# ---- the screen ----


def on_screen(
    app: Top, use: Callable[[Pilot[None]], Coroutine[None, None, None]], columns: int = 140
) -> None:
    async def run() -> None:
        async with app.run_test(size=(columns, 40)) as pilot:
            await use(pilot)

    asyncio.run(run())


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    """As `tests.waiting.wait_until`, while the screen goes on."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await pilot.pause(0.01)


def text_of(app: Top, selector: str) -> str:
    found = app.query(selector)  # nothing until the screen is there
    return str(found.first(Static).content) if found else ""


def cells(app: Top) -> list[list[str]]:
    table = app.query_one(DataTable)
    return [[str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count)]


def test_the_screen() -> None:
    with FakeServer(healthy().text(), healthy().text(), busier().text()) as server:
        app = Top(read(server.url), 0.02)

        async def use(pilot: Pilot[None]) -> None:
            assert text_of(app, "#server") == server.url
            assert cells(app)[1][:4] == ["fs", "well", "50 %", "-"], "before the second read"
            await until(pilot, lambda: app.query_one("#line-0", Sparkline).data)
            await until(pilot, lambda: "6,408,800 tokens served" in text_of(app, "#summary"))
            primary, fs = cells(app)
            assert primary[0] == "primary" and primary[6:8] == ["60.0G", "64.0G"]
            assert fs[6:] == ["60.0G", "1000.0G", "500.0G", "900.0G"]
            assert "saved net 12.7 min" in text_of(app, "#summary")
            history = app.query_one("#line-1", Sparkline).data
            assert history is not None and 55 in map(round, history), (
                "of the 1000 chunks, in percent"
            )
            assert "hits now" in str(app.query_one("#label-1", Label).content)
            await pilot.press("q")

        on_screen(app, use)
    assert app.return_code == 0


@pytest.mark.parametrize("state", ["well", "distrusted, stores fail"])
def test_in_80_columns(state: str) -> None:
    """All is seen where nothing is wrong, and what is wrong is always."""
    sick = healthy()
    for name in (n.DISTRUSTED, n.STORES_FAILING):
        sick.gauge(name, state != "well", tier="fs")
    app = Top(sick.scrape(), 60)

    async def use(pilot: Pilot[None]) -> None:
        await pilot.pause()
        assert cells(app)[1][:2] == ["fs", state]
        table = app.query_one(DataTable)
        columns = [column.get_render_width(table) for column in table.ordered_columns]
        assert sum(columns if state == "well" else columns[:2]) <= 80

    on_screen(app, use, columns=80)


def test_a_server_that_goes_away_and_comes_back() -> None:
    with FakeServer(healthy().text()) as server:
        app = Top(read(server.url), 0.02)

    async def use(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "does not answer" in text_of(app, "#server"))
        assert "These figures are" in text_of(app, "#server")
        assert len(cells(app)) == 2, "what was seen stays"
        with FakeServer(started(Metrics()).text(), port=server.port):
            await until(pilot, lambda: text_of(app, "#server") == server.url)
            assert cells(app)[1][2:4] == ["-", "-"], "it was restarted"
            assert all(not tier.startswith("-") for tier in cells(app)[1][4:6])

    on_screen(app, use)


def test_names_do_not_control_the_terminal() -> None:
    evil = started(Metrics()).gauge(n.PAGES, 1, tier="\x1b[31mred [b]x")
    with FakeServer(evil.text()) as server:
        app = Top(read(server.url), 60)

        async def use(pilot: Pilot[None]) -> None:
            assert "\\x1b[31mred [b]x" in [row[0] for row in cells(app)]

        on_screen(app, use)


# ---- the command ----


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float]] = []
    monkeypatch.setattr(
        top_app.Top, "run", lambda self: shown.append((self._last.url, self._pause_s))
    )
    with FakeServer(healthy().text()) as server:
        assert outcome("top", server.url) == (0, "", "")
        assert outcome("top", server.url, "--every", "1min") == (0, "", "")
    assert shown == [(server.url, 2), (server.url, 60)]


def test_what_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = outcome("top", "http://127.0.0.1:1")
    assert code == 2 and err.startswith("kvstrata: http://127.0.0.1:1 does not answer")
    assert "is no time: give one such as" in outcome("top", "x", "--every", "2")[2]
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    remedy = "kvstrata: top needs Textual: pip install 'kvstrata[tools]'\n"
    assert outcome("top", "http://127.0.0.1:1") == (2, "", remedy)
