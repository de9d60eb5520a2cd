"""Every kind of damage below a root, what is done about each, and that servers are not hurt."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.files.temporary import host_name, temporary_name
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools import repair
from kvstrata.tiers.fs.tools.repair import Examination, examine
from kvstrata.tiers.fs.tools.scan import FileReport, check_root
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key
from tests.conftest import FillRoot
from tests.spoiling import flip

KEYS = [make_key(n) for n in range(4)]
SIZE = CONTEXT.layouts[0].nbytes
DEAD = f".kvstrata-{host_name()}-{2**22 + 1}-1-{0:016x}.tmp"  # above the largest pid


@pytest.fixture
def filled(fill_root: FillRoot, root: Path, paths: NamespacePaths) -> NamespacePaths:
    """Four pages, and no server any more."""
    fill_root(root, {key: make_data(n, SIZE) for n, key in enumerate(KEYS)})
    return paths


def outcomes(found: Examination) -> list[tuple[str, str | None]]:
    return [(finding.kind, finding.repair) for finding in found.findings]


def quarantined(paths: NamespacePaths) -> list[str]:
    """What is in quarantine, without the times."""
    return sorted(name.partition("-")[2] for name in os.listdir(paths.quarantine))


def test_bad_pages_are_quarantined(filled: NamespacePaths, root: Path) -> None:
    pages = [Path(filled.page(key)) for key in KEYS[:3]]
    flip(str(pages[0]))
    pages[1].unlink()
    pages[1].symlink_to("/dev/zero")
    pages[2].unlink()
    os.mkfifo(pages[2])
    assert outcomes(examine(str(root), fix=False)) == [("page", None)] * 3
    assert not os.path.exists(filled.quarantine)
    assert outcomes(examine(str(root), fix=True)) == [("page", "quarantined")] * 3
    names = zip(("checksum", "symlink", "not-regular"), pages, strict=True)
    assert quarantined(filled) == sorted(f"{cause}-{page.name}" for cause, page in names)
    assert examine(str(root), fix=True).findings == []
    assert check_root(str(root)).files == 1


def test_the_quarantine_stays_bounded(
    filled: NamespacePaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.fs.files.quarantine.MAX_FILES", 2)
    for key in KEYS:
        flip(filled.page(key))
    assert outcomes(examine(str(root), fix=True)) == [("page", "quarantined")] * 4
    assert len(os.listdir(filled.quarantine)) == 2


def test_a_file_that_was_replaced_since_it_was_read_stays(
    filled: NamespacePaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(filled.page(KEYS[0]))
    good = page.read_bytes()
    flip(str(page))

    def then_stored_anew(root: str, progress: object) -> object:
        report = check_root(root)
        page.with_name("new").write_bytes(good)
        page.with_name("new").rename(page)
        return report

    monkeypatch.setattr(repair, "check_root", then_stored_anew)
    examine(str(root), fix=True)
    assert page.read_bytes() == good and not os.path.exists(filled.quarantine)


def test_misplaced_pages_go_where_they_belong(
    filled: NamespacePaths, root: Path, open_tier: Callable[..., FsTier]
) -> None:
    contents = {key: Path(filled.page(key)).read_bytes() for key in KEYS}
    stray = Path(filled.home, "copy.safetensors")
    os.rename(filled.page(KEYS[0]), stray)  # no place of a page
    os.rename(filled.page(KEYS[1]), filled.page(make_key(9)))  # another key's place
    occupied = Path(filled.page(make_key(8)))
    occupied.parent.mkdir(exist_ok=True)
    occupied.write_bytes(contents[KEYS[2]])  # its own place is taken
    other = namespace_paths(str(root), "other", {**CONTEXT.namespace, "test": 2})
    foreign = Path(other.page(KEYS[3]))  # another namespace's directory, without a config.json
    foreign.parent.mkdir(parents=True)
    os.rename(filled.page(KEYS[3]), foreign)
    found = examine(str(root), fix=True)
    done = {finding.path: (finding.kind, finding.repair) for finding in found.findings}
    assert done == {
        str(stray): ("place", "moved"),
        filled.page(make_key(9)): ("place", "moved"),
        str(occupied): ("place", "quarantined"),
        other.config: ("config", None),
        str(foreign): ("place", "moved"),
    }
    assert quarantined(filled) == [f"key-{occupied.name}"]
    assert {key: Path(filled.page(key)).read_bytes() for key in KEYS} == contents
    assert not load(open_tier(), KEYS)[0].failed


def test_a_page_that_does_not_fit_anywhere_is_quarantined(
    filled: NamespacePaths, root: Path
) -> None:
    foreign = namespace_paths(str(root), "gone", {**CONTEXT.namespace, "test": 3})
    raw = Path(filled.page(KEYS[0])).read_bytes()
    digests = (filled.name[-12:].encode(), foreign.name[-12:].encode())
    Path(filled.page(KEYS[0])).write_bytes(raw.replace(*digests, 1))
    assert outcomes(examine(str(root), fix=True)) == [("place", "quarantined")]
    assert quarantined(filled)[0].startswith("namespace-")


@pytest.mark.parametrize("text", ["{", '{"test": 2}', "link"])
def test_a_bad_config_makes_way_for_a_new_one(
    filled: NamespacePaths, root: Path, open_tier: Callable[..., FsTier], text: str
) -> None:
    os.unlink(filled.config)
    if text == "link":
        os.symlink("/dev/zero", filled.config)
    else:
        Path(filled.config).write_text(text)
    assert outcomes(examine(str(root), fix=True)) == [("config", "quarantined")]
    # without one its pages are nobody's, which no repair can change
    (missing,) = examine(str(root), fix=True).findings
    assert (missing.kind, missing.repair) == ("config", None)
    assert missing.reason.startswith("missing: ")
    assert not load(open_tier(), KEYS)[0].failed  # its engine writes it again
    assert examine(str(root), fix=False).findings == []


def test_temporaries_of_the_dead_are_removed(filled: NamespacePaths, root: Path) -> None:
    places = [Path(filled.page(KEYS[0])).parent, Path(filled.home), root / ".kvstrata"]
    for place in places:
        (place / DEAD).touch()
        (place / temporary_name()).touch()
    (Path(filled.pages) / DEAD).mkdir()  # none of ours
    assert outcomes(examine(str(root), fix=False)) == [("temporary", None)] * 3
    found = examine(str(root), fix=True)
    assert outcomes(found) == [("temporary", "removed")] * 3
    assert found.report.temporary == 4
    assert not any((place / DEAD).exists() for place in places)
    assert all(len(list(place.glob(".kvstrata-*.tmp"))) == 1 for place in places)


def test_what_this_user_may_not_read_is_left(
    filled: NamespacePaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = filled.page(KEYS[0])
    report = FileReport(page, 0, "unreadable", "", None, found_bad=(1, 1, 1))

    def closed(root: str, progress: object) -> object:
        found = check_root(root)
        found.bad.append(report)
        return found

    monkeypatch.setattr(repair, "check_root", closed)
    assert outcomes(examine(str(root), fix=True)) == [("page", None)]
    assert os.path.exists(page)


# Stores far more than its budget holds.
SERVER = textwrap.dedent("""
    import sys
    from kvstrata.tiers.fs.tier import FsTier
    from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
    tier = FsTier(
        {"root_dir": sys.argv[1], "max_bytes": sys.argv[2], "min_free_bytes": 0}, CONTEXT
    )
    size = CONTEXT.layouts[2].nbytes
    for number in range(10**6):
        pages = {make_key(n, 2): make_data(n, size) for n in range(8 * number, 8 * number + 8)}
        store(tier, pages)
        if number == 9:
            print("ready", flush=True)
""")


def test_beside_a_server_that_evicts_nothing_sound_is_touched(
    root: Path, paths: NamespacePaths
) -> None:
    budget = str(40 * CONTEXT.layouts[2].nbytes)
    command = [sys.executable, "-c", SERVER, str(root), budget]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    try:
        checked = 0
        while checked < 1000:
            found = examine(str(root), fix=True)
            assert found.findings == [] and found.members > 0
            checked += found.report.files
    finally:
        server.send_signal(signal.SIGKILL)
        server.communicate()
    assert not os.path.exists(paths.quarantine)


def test_a_foreign_namespace_is_reported(root: Path, open_tier: Callable[..., FsTier]) -> None:
    tier = open_tier(TierContext("other", {"x": 1}, CONTEXT.layouts))
    assert tier.shutdown(60.0)
    os.rename(tier.paths[0].home, f"{root}/other_{0:012x}")
    found = examine(str(root), fix=True)
    config = f"its fields have the digest {tier.paths[0].name[-12:]}"
    assert [finding.reason for finding in found.findings] == [
        f"config: {config}",
        "missing: No such file or directory",
    ]
    assert [finding.repair for finding in found.findings] == ["quarantined", None]
