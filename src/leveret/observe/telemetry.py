"""What is wrapped around each enqueue and each run to trace and measure it; `OpenTelemetry` is one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from leveret.model import (
    Cancelled,
    DeadLettered,
    Outcome,
    PutOff,
    Released,
    Retrying,
    Succeeded,
    log_fields,
    with_other_headers,
)
from leveret.observe.logs import log_mistake

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from contextlib import AbstractContextManager

    from leveret.model import Attempt, Attempted, Envelope, Runtime, Store

log = logging.getLogger("leveret.telemetry")

T = TypeVar("T")
Kind: TypeAlias = Literal["succeeded", "retrying", "dead", "released", "cancelled", "limited"]
#: Told once how a run ended, and by which exception if by one.
Ended: TypeAlias = Callable[[Outcome, BaseException | None], None]

#: In metrics, the name of a task that the application does not have: anybody may send any name.
UNKNOWN = "(unknown)"
_KINDS: dict[type, Kind] = {
    Succeeded: "succeeded",
    Retrying: "retrying",
    DeadLettered: "dead",
    Released: "released",
    Cancelled: "cancelled",
    PutOff: "limited",
}


def kind(outcome: Outcome) -> Kind:
    """One word for an outcome. released: interrupted by a stop, and handed back. limited: it waits for a limit."""
    return _KINDS[type(outcome)]


class Telemetry(Protocol):
    """Wrapped around what an application does; its mistakes are logged, and change nothing of that.

    ``url``: the broker's; it may hold a password.
    """

    def sending(self, envelopes: Sequence[Envelope], url: str, /) -> AbstractContextManager[Sequence[Envelope]]:
        """Around storing these tasks; what is stored is what it gives: the same tasks, with headers of its own."""

    def processing(self, envelope: Envelope, url: str, /) -> AbstractContextManager[Ended]:
        """Around one attempt, also at what turns out to be no task, or to have wrong arguments."""


def sending_within(telemetry: Telemetry, url: Callable[[], str], store: Store) -> Store:
    """``store`` with a telemetry around it."""

    async def through(envelopes: Sequence[Envelope]) -> None:
        guard = _Guard("the application's telemetry failed; what becomes of the enqueue is as it was", Exception)
        with guard.around(lambda: telemetry.sending(envelopes, url()), envelopes) as marked:
            await store(guard.attempt(lambda: with_other_headers(envelopes, marked)) or envelopes)

    return through


def attempting_within(telemetry: Telemetry, url: Callable[[], str], attempt: Attempt) -> Attempt:
    """``attempt`` with a telemetry around it."""

    unheard: Ended = _tell_nobody

    async def through(envelope: Envelope, link: Runtime) -> Attempted:
        guard = _Guard("the application's telemetry failed; the task goes on", BaseException, log_fields(envelope))
        with guard.around(lambda: telemetry.processing(envelope, url()), unheard) as ended:
            attempted = await attempt(envelope, link)
            guard.attempt(lambda: ended(attempted.outcome, attempted.error))
        return attempted

    return through


def _tell_nobody(_: Outcome, __: BaseException | None) -> None:
    """How an attempt ended whose span could not begin."""


class _Guard:
    """Keeps the mistakes of a telemetry from what it is wrapped around, and logs them. ``kinds``: which exceptions."""

    def __init__(self, text: str, kinds: type[BaseException], extra: dict[str, Any] | None = None) -> None:
        self._text = text
        self._kinds = kinds
        self._extra = extra

    def attempt(self, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except self._kinds as mistake:
            self._log(mistake)
            return None

    @contextmanager
    def around(self, enter: Callable[[], AbstractContextManager[T]], otherwise: T) -> Generator[T]:
        """Gives what the context manager gives; ``otherwise`` if it cannot be entered."""
        entered: tuple[AbstractContextManager[T], T] | None = self.attempt(lambda: _entered(enter()))
        error: BaseException | None = None
        try:
            yield otherwise if entered is None else entered[1]
        except BaseException as interruption:
            error = interruption
            raise
        finally:
            if entered is not None:
                how = (None, None, None) if error is None else (type(error), error, error.__traceback__)
                try:
                    entered[0].__exit__(*how)
                except self._kinds as mistake:
                    if mistake is not error:
                        self._log(mistake)

    def _log(self, mistake: BaseException) -> None:
        log_mistake(log, self._text, mistake, __file__, self._extra)


def _entered(span: AbstractContextManager[T]) -> tuple[AbstractContextManager[T], T]:
    return span, span.__enter__()
