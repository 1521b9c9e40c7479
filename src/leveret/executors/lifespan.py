"""An application's lifespan in the process that runs its tasks: entered before the first one, left after the last."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from typing import TYPE_CHECKING, Any

from leveret.client import not_loaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret.client import App, LifespanFunction
    from leveret.errors import AppNotLoaded

log = logging.getLogger("leveret.executors")

#: A lifespan that is cancelled, as its time is over, may take so long to end (seconds).
_CANCELLED = 0.5


class Lifespan:
    """It lives in one asyncio task from its beginning to its end, as the cancel scopes and task groups in it need."""

    def __init__(self, app: App) -> None:
        self._app = app
        #: With the context variables that it has set.
        self.context = contextvars.copy_context()
        #: Called with why, when it has ended and nobody wanted that: a task group of its own has failed, perhaps.
        self.broke: Callable[[AppNotLoaded], None] = lambda _: None
        self._task: asyncio.Task[None] | None = None
        self._is_entered = False
        self._leaving = asyncio.Event()
        #: What it raised. Kept here, as asyncio lets a SystemExit of a task end the loop.
        self._error: BaseException | None = None

    async def enter(self) -> Any:
        """The value that it yields. Raises AppNotLoaded with what it raises."""
        function = self._app.lifespan
        if function is None:
            return None
        loop = asyncio.get_running_loop()
        entered: asyncio.Future[Any] = loop.create_future()
        self._task = loop.create_task(self._live(function, entered), context=self.context)
        await asyncio.wait([entered, self._task], return_when=asyncio.FIRST_COMPLETED)
        if not entered.done():
            raise self._failure("could not be entered")
        self._task.add_done_callback(self._ended)
        return entered.result()

    async def leave(self, within: float) -> None:
        """Have it end. What does not within so many seconds is cancelled; what it raises is logged."""
        if self._task is None or self._task.done():
            return
        self._leaving.set()
        if not self._is_entered:
            self._task.cancel()
        is_done, _ = await asyncio.wait([self._task], timeout=within)
        if not is_done:
            log.error("the application's lifespan did not end within %g s of being told to, and is cut off", within)
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CANCELLED)
        elif self._error is not None and self._is_entered:
            log.error("the application's lifespan failed at its end", exc_info=self._error)

    async def _live(self, function: LifespanFunction, entered: asyncio.Future[Any]) -> None:
        try:
            async with function(self._app) as state:
                self._is_entered = True
                entered.set_result(state)
                await self._leaving.wait()
        except BaseException as error:  # noqa: BLE001 - it is the user's code
            self._error = error

    def _ended(self, _: object) -> None:
        if not self._leaving.is_set():
            self.broke(self._failure("ended while its process ran tasks"))

    def _failure(self, what: str) -> AppNotLoaded:
        error = self._error or RuntimeError("it ended by itself")
        return not_loaded(f"the application's lifespan {what}", error, on_the_way=(__file__, contextlib.__file__))
