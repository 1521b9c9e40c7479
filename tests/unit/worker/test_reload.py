"""What `leveret.worker.reload` makes of errors: it says them, and goes on."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import watchfiles

from leveret.worker import reload as module
from leveret.worker.reload import Reloads, reloading
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
    from pathlib import Path

    import pytest

    from leveret.executors import Manifest


class Children:
    """A workforce; what it raises when it is to reload, first to last."""

    def __init__(self, *sources: str, failures: list[Exception] | None = None) -> None:
        self.sources = sources
        self.failures = failures or []
        self.reloaded = 0

    async def reload(self, adopt: Callable[[Manifest], None], /) -> int:
        del adopt
        if self.failures:
            raise self.failures.pop(0)
        self.reloaded += 1
        return 1


class Employer:
    """A worker that takes each application, and is not to stop."""

    def adopt(self, manifest: Manifest, /) -> None: ...

    def stop(self) -> None:
        raise AssertionError("it was stopped")


@asynccontextmanager
async def going_on(work: Coroutine[Any, Any, None]) -> AsyncGenerator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    yield task
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_files_that_cannot_be_watched_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged; what changed meanwhile is not missed, and what changes later is seen."""
    caplog.set_level(logging.INFO, "leveret.worker")
    monkeypatch.setattr(module, "WATCH_AGAIN", 0.01)
    source = tmp_path / "tasks.py"
    source.write_text("")
    failures = [OSError("OS file watch limit reached"), FileNotFoundError("No path was found")]
    awatch = watchfiles.awatch

    def watch(*folders: str, **options: Any) -> AsyncIterator[set[tuple[Any, str]]]:
        if failures:
            source.write_text("changed = True")
            raise failures.pop(0)
        return awatch(*folders, **options)

    monkeypatch.setattr(watchfiles, "awatch", watch)
    children = Children(str(source))
    async with reloading(children, Employer(), watch=True):
        await until(lambda: children.reloaded > 0, "a reload for what has changed meanwhile")
        children.reloaded = 0
        source.write_text("changed = 'again'")
        await until(lambda: children.reloaded > 0, "a reload for a change")
    for problem in ("OS file watch limit reached", "No path was found"):
        assert f"no file is watched now, trying again in 0.01 s: {problem}" in caplog.text


async def test_what_is_saved_between_two_watches_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reload brought files of another folder, so both are watched anew: a save just then, in the old or the new."""
    caplog.set_level(logging.INFO, "leveret.worker")
    old, new = tmp_path / "old" / "tasks.py", tmp_path / "new" / "words.py"
    for source in (old, new):
        source.parent.mkdir()
        source.write_text("")
    children = Children(str(old))
    awatch, watches = watchfiles.awatch, 0

    async def watch(*folders: str, **options: Any) -> AsyncIterator[set[tuple[Any, str]]]:
        nonlocal watches
        watches += 1
        if len(folders) == 2:
            old.write_text("saved = True")
            new.write_text("saved = True")
        async for changes in awatch(*folders, **options):
            yield changes

    monkeypatch.setattr(watchfiles, "awatch", watch)
    async with reloading(children, Employer(), watch=True):
        await until(lambda: watches == 1, "the first watch")
        children.sources = (str(old), str(new))
        await until(lambda: children.reloaded > 0, "a reload for what was saved between")
        assert f"changed: {new}, {old}" in caplog.text
        await until(lambda: watches == 2, "the second watch")
        children.reloaded = 0
        new.write_text("saved = 'again'")
        await until(lambda: children.reloaded > 0, "a reload for a change that is watched")


async def test_a_reload_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    children = Children(failures=[OSError("no more processes")])
    reloads = Reloads(children, lambda _: None)

    async def has_failed() -> bool:
        return "no more processes" in caplog.text

    async def has_reloaded() -> bool:
        return children.reloaded == 1

    async with going_on(reloads.run()):
        reloads.ask()
        await until(has_failed, "it is logged")
        reloads.ask()
        await until(has_reloaded, "the next one is done")
