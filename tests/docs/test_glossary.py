"""The glossary: one line a word, no word twice, and none that code or documents do not use."""

import re

from tests.docs.blocks import DOCUMENTS, ROOT

GLOSSARY = ROOT / "docs" / "glossary.md"
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", GLOSSARY.read_text(), re.M)
WORDS = [word for words, _ in ROWS for word in words.split(", ") if words not in ("word", "---")]


def test_it_is_whole() -> None:
    lines = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("|")]
    assert len(ROWS) + GLOSSARY.read_text().count("|---|") == len(lines)
    assert len(WORDS) > 50
    assert all(meaning.strip() for _, meaning in ROWS)


def test_no_word_is_told_twice() -> None:
    assert sorted(WORDS) == sorted(set(WORDS))


def test_each_word_is_used_elsewhere() -> None:
    documents = " ".join(path.read_text() for path in DOCUMENTS if path != GLOSSARY)
    code = (
        path.read_text()
        for folder in ("kernels", "offload", "tiers")
        for path in (ROOT / folder).rglob("*.py")
    )
    text = re.sub(r"[\s_#]+", " ", " ".join([documents, *code])).lower()
    unused = [word for word in WORDS if not re.search(rf"\b{re.escape(word.lower())}", text)]
    assert unused == []
