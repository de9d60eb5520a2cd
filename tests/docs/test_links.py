"""Links between documents lead somewhere, down to the heading."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.docs.blocks import DOCUMENTS, ROOT
from tests.docs.test_rooms import FOLDERS

GITHUB = sorted((ROOT / ".github").rglob("*.md"))

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """As GitHub names headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def links(path: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
    return [link for link in _LINK.findall(text) if "://" not in link]


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *GITHUB], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links(path: Path) -> None:
    broken = []
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_document_names_are_there(path: Path) -> None:
    """By their path in the repository, or from any folder on; vLLM's own are no concern here."""
    if path.name == "upstream.md":
        pytest.skip("it is about vLLM's files")
    there = [p.as_posix() for each in (*FOLDERS, "tests") for p in (ROOT / each).rglob("*.py")]
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py)`", path.read_text())) - {"__init__.py"}
    assert [n for n in named if not any(file.endswith(f"/{n}") for file in there)] == []
    rooms = re.findall(rf"`((?:{'|'.join(FOLDERS)}|tests)/[\w/]*)`", path.read_text())
    assert [room for room in rooms if not (ROOT / room).exists()] == []
    for name in re.findall(rf"\bkvstrata\.((?:{'|'.join(FOLDERS)})(?:\.\w+)*)", path.read_text()):
        place = Path(ROOT, *name.split("."))  # a folder, a module, or what is in one
        assert place.exists() or any(p.with_suffix(".py").exists() for p in (place, place.parent))


def test_the_readme_leads_to_every_document() -> None:
    found = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    documents = set(DOCUMENTS) - {ROOT / "README.md"}
    assert documents <= found


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_a_picture_is_drawn(path: Path) -> None:
    """GitHub shows an SVG file that is well-formed, without scripts and foreign content."""
    picture = ElementTree.parse(path).getroot()
    tags = {element.tag.rpartition("}")[2] for element in picture.iter()}
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert picture.get("viewBox") and picture.get("aria-label")
    assert not tags & {"script", "foreignObject", "image"}
