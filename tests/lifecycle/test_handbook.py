"""The tutorial of docs/ does what it says, on each broker: files are written, commands typed, lines shown."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.handbook import DOCS, ROOT, Reader, blocks, is_shown, screens

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Place

CHAPTERS = ("index", "round-robin", "acknowledgment", "durability", "fair-dispatch", "together")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter(place: Place, tmp_path: Path, chapter: str) -> None:
    """Each begins in a folder with the programs of the first, and with an empty queue."""
    for program in (ROOT / "examples/tutorial").glob("*.py"):
        shutil.copy(program, tmp_path)
    with Reader(place, tmp_path) as reader:
        reader.follow(DOCS / f"tutorial/{chapter}.md")


def test_every_chapter_is_there() -> None:
    assert {page.stem for page in (DOCS / "tutorial").glob("*.md")} == set(CHAPTERS)
    assert all(blocks(DOCS / f"tutorial/{chapter}.md") for chapter in CHAPTERS)


def test_what_a_reader_sees(tmp_path: Path) -> None:
    """The reader notices what is missing, what is too much, and what is different."""
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="a.py"\nx = 1\n```\n\n=== "SQLite"\n\n    ```console title="shell 1"\n    $ one\n     shown\n'
        "    ^C\n    more\n    $ two\n    ```\n\nText.\n\n```console\n$ three\n```\n"
    )
    python, tab, after = blocks(page)
    assert (python.language, python.title, python.text, python.tab) == ("python", "a.py", "x = 1", "")
    assert (tab.tab, after.tab) == ("SQLite", "")
    one, two = screens(tab.text)
    assert (two.command, two.shown) == ("two", [])
    assert list(one.stages()) == [([" shown"], 2), ([" shown", "more"], None)]
    assert is_shown(["a … c", "d"], "a b c\nd  \n")
    assert is_shown(["… a", "… b", "c"], "1 b\nc\n2 a\n", any_order=True)
    assert not is_shown(["a", "a"], "a\nb\n", any_order=True)
    for output in ("", "a b c\n", "a b c\nd\ne\n", "a b c\nx\n", "xa b c\nd\n"):
        assert not is_shown(["a … c", "d"], output)
