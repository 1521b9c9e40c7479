"""Which file an SQLite URL names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from leveret.brokers import connect
from leveret.model import Queue

if TYPE_CHECKING:
    from pathlib import Path


WORK = Queue("work")


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///tasks.db", "tasks.db"),
        ("sqlite:///sub/tasks.db", "sub/tasks.db"),
        ("sqlite:///{absolute}/tasks.db", "tasks.db"),
        ("sqlite:///a%20b%23%3F%25.db", "a b#?%.db"),
        ("sqlite:///täsks.db", "täsks.db"),
        ("sqlite:///sub/../tasks.db", "tasks.db"),
    ],
)
async def test_a_url_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, file: str) -> None:
    """Three slashes for one in the working directory, four for an absolute one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    broker = connect(url.format(absolute=tmp_path))
    await broker.declare([WORK])
    await broker.close()
    assert (tmp_path / file).is_file()


def files(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


async def test_a_relative_path_is_of_the_directory_at_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its directory later goes on with its file."""
    monkeypatch.chdir(tmp_path)
    broker = connect("sqlite:///leveret.db")
    monkeypatch.chdir("/")
    await broker.declare([WORK])
    await broker.close()
    assert files(tmp_path) == ["leveret.db"]
