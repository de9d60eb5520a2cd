"""docs/usage.md on a real server: its commands in order, what they print, and the log's line."""

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import Command, shell_commands
from tests.docs.known import way_of
from tests.engine.driver import ROOT
from tests.engine.reader import Reader, form
from tests.observability.prometheus import prometheus
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

GUIDE = ROOT / "docs" / "usage.md"
PAGES = 6 * 992 // 32  # six prompts in chunks of a block
PATIENT = '"lookup_deadline_s": 60, "promotion_deadline_s": 60, '  # however busy the machine is


def steps_of(section: str, folder: Path) -> list[Command]:
    """The commands of a part of the guide."""
    path = folder / "section.md"
    path.write_text(section)
    return shell_commands([path], folder)


def follow(reader: Reader, step: Command, model: str) -> None:
    """Do as a step says, and see that it prints what the guide shows.

    model: the one with which the guide was written.
    """
    way = way_of(step)
    assert way is not None
    if step.text.startswith("export "):
        reader.export(step.text)
    elif step.text.startswith("kvstrata doctor --server"):
        printed = reader.run(f"{step.text} --for 1s || [ $? = 1 ]")  # 1: it found something
        assert printed.startswith(f"http://{reader.address} ")
    elif way.how == "run" and step.text.startswith("kvstrata "):
        assert reader.run(step.text)
    elif "/metrics" in step.text:
        # the statistics of an engine's last step come after the answer
        wait_until(lambda: shows(reader.run(step.text), step.printed, reader, model))
    elif way.how == "served":
        assert shows(printed := reader.run(step.text), step.printed, reader, model), printed


def shows(printed: str, shown: str, reader: Reader, model: str) -> bool:
    """Whether that is printed which the guide shows, or anything where it shows nothing."""
    shown = shown.replace(model, str(reader.model))
    return printed.split() == shown.split() if shown else bool(printed)


def written(root: Path) -> bool:
    """Whether all that was computed lies in files. A page that a busy disk was not given it gets
    when it is asked for again.
    """
    return len(list(root.rglob("*.safetensors"))) >= PAGES


def named_metrics(text: str) -> set[str]:
    """Metrics that the guide names."""
    return {name for name in re.findall(r"`((?:kvstrata_|vllm:)\w+)`", text)}


def said(log: str, shown: str, name: str) -> bool:
    """Whether the log has a line of this form, with other numbers, sizes and names."""

    def plain(line: str) -> str:
        line = re.sub(r"(?<=namespace )\S+", "NAME", line)
        line = re.sub(r"(?<=fs in )\S+", "ROOT", line)
        return re.sub(r"[KMG]iB", "iB", form(line, name))

    return any(plain(line).endswith(plain(shown)) for line in log.splitlines())


def test_from_nothing_to_a_dashboard(llama: Path, root: Path, tmp_path: Path) -> None:
    text = GUIDE.read_text()
    _, start, later = re.split(r"^## (?:From nothing|Hardware).*$", text, flags=re.M)
    steps = steps_of(start, tmp_path)
    (serving,) = [n for n, each in enumerate(steps) if each.text.startswith("python -m vllm.")]
    (again,) = [n for n, each in enumerate(steps) if each.text.startswith("for n in ")]
    (model,) = {m for each in steps for m in re.findall(r'model_name="([^"]*)"', each.printed)}
    reader = Reader(llama, root, tmp_path / "server.log")
    reader.environment["VLLM_SERVER_DEV_MODE"] = "1"  # for the reset
    root.mkdir(0o700)
    serve = steps[serving].text.replace('"secondary_tiers"', f'{PATIENT}"secondary_tiers"')

    for step in steps[:serving]:
        follow(reader, step, model)
    with reader.serving(serve):
        for step in steps[serving + 1 : again]:
            follow(reader, step, model)
        metrics = reader.run("curl -s localhost:8000/metrics")
        if shutil.which("prometheus"):
            with prometheus(tmp_path, [f"http://{reader.address}"]) as page:
                wait_until(lambda: page.query("kvstrata_prefill_saved_net_seconds"))
        wait_until(lambda: reader.run(steps[again].text) and written(root))
    with reader.serving(serve):
        for step in steps[again:]:
            follow(reader, step, model)
        for step in steps_of(later, tmp_path):
            if step.text.startswith("curl "):
                follow(reader, step, model)

    assert [name for name in named_metrics(text) if f"# HELP {name} " not in metrics] == []
    (line,) = re.findall(r"^kvstrata \d.*$", text, re.M)
    assert said(reader.log.read_text(), line, str(llama))
