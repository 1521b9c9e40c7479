"""Fresh children for changed code: on SIGHUP, and on a change of the application's files (``--reload``)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from leveret.errors import AppNotLoaded, ConfigurationError
from leveret.observe import write

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
    from typing import Any

    from leveret.executors import Manifest

log = logging.getLogger("leveret.worker")

#: How soon it is noticed that a reload has brought files of other folders (milliseconds).
_LOOK = 1_000
#: How long until the first child can say what it has imported (seconds).
_PAUSE = 0.2
#: How long until files that could not be watched are watched again (seconds).
WATCH_AGAIN = 5.0


class Workforce(Protocol):
    """The children."""

    @property
    def sources(self) -> Collection[str]: ...
    async def reload(self, adopt: Callable[[Manifest], None], /) -> int: ...


class Employer(Protocol):
    """The worker."""

    def adopt(self, manifest: Manifest, /) -> None: ...
    def stop(self) -> None: ...


@asynccontextmanager
async def reloading(workforce: Workforce, employer: Employer, *, watch: bool) -> AsyncGenerator[None]:
    """Replace the children on SIGHUP, and with ``watch`` on a change of their source files, until the block is left.

    A SIGHUP that was ignored when the program began (``nohup``) stays so, and the one that says that the program's
    terminal is gone stops the worker. Raises ConfigurationError when watching is not possible.
    """
    reloads = Reloads(workforce, employer.adopt)
    tasks = [asyncio.create_task(reloads.run())]
    if watch:
        tasks.append(asyncio.create_task(_watch(_watcher(), workforce, reloads.ask)))
    had_terminal = _has_terminal()

    def hang_up() -> None:
        if had_terminal and not _has_terminal():
            employer.stop()
        else:
            reloads.ask()

    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Reloads:
    """One after the other; what is asked for during one is done after it, once."""

    def __init__(self, workforce: Workforce, adopt: Callable[[Manifest], None]) -> None:
        self._workforce = workforce
        self._adopt = adopt
        self._asked = asyncio.Event()

    def ask(self) -> None:
        self._asked.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                count = await self._workforce.reload(self._adopt)
            except AppNotLoaded as error:
                message = "not reloaded, so the child processes that are there go on: %s"
                write(log, logging.ERROR, message, error, traceback=error.traceback)
            except Exception:
                log.exception("not reloaded, or only in part; the child processes that are there go on")
            else:
                log.info("reloaded: %d child processes are replaced", count)


class Watcher(Protocol):
    """`watchfiles.awatch`, as far as it is used."""

    def __call__(self, *folders: str) -> AsyncIterator[set[tuple[Any, str]]]:
        """The changes of Python files in these folders, and an empty set now and then."""


def _watcher() -> Watcher:
    try:
        import watchfiles
    except ImportError:
        raise ConfigurationError("--reload needs watchfiles: pip install 'leveret[reload]'") from None

    def watcher(*folders: str) -> AsyncIterator[set[tuple[Any, str]]]:
        return watchfiles.awatch(
            *folders,
            watch_filter=watchfiles.PythonFilter(),
            recursive=False,
            rust_timeout=_LOOK,
            yield_on_timeout=True,
        )

    return watcher


async def _watch(watcher: Watcher, workforce: Workforce, ask: Callable[[], None]) -> None:
    """Ask for a reload whenever a Python file changes beside those that the children have imported.

    Where that fails (the system has a limit of its own, a folder goes) it is tried again, until it is cancelled.
    What was saved while nothing was watched is found by its time.
    """
    asked = time.time()
    while True:
        folders = _folders(workforce.sources)
        if not folders:
            await asyncio.sleep(_PAUSE)
            continue
        log.info("watching the Python files in %s", ", ".join(folders))
        missed = True
        try:
            async for changes in watcher(*folders):
                changed = {path for _, path in changes}
                if missed:
                    changed |= _saved_since(asked, folders)
                    missed = False
                if changed:
                    log.info("changed: %s", ", ".join(sorted(changed)))
                    asked = time.time()
                    ask()
                if _folders(workforce.sources) != folders:
                    break
        except Exception as error:  # noqa: BLE001 - of watchfiles, or of the system beneath it
            log.error("no file is watched now, trying again in %g s: %s", WATCH_AGAIN, error)  # noqa: TRY400
            await asyncio.sleep(WATCH_AGAIN)


def _saved_since(moment: float, folders: Sequence[str]) -> set[str]:
    """The Python files that were written or moved there after that moment (seconds since 1970)."""
    return {str(file) for folder in folders for file in Path(folder).glob("*.py") if file.stat().st_ctime > moment}


def _folders(sources: Collection[str]) -> Sequence[str]:
    folders = {Path(source).parent for source in sources}
    return sorted(str(folder) for folder in folders if folder.is_dir())


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
