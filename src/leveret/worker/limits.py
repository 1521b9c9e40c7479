"""Says what the application's limits are before the worker takes tasks, and has tasks that wait for limits admitted."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from leveret.brokers import backoff
from leveret.errors import BrokerRefused, BrokerUnavailable, LeveretError
from leveret.model import BUILT_IN, LIMITS, limit_refs, queue_limit
from leveret.model.printable import in_line
from leveret.observe import LimitedLog
from leveret.worker.stopping import ended, first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from leveret.brokers import Broker
    from leveret.model import DeclareLimits, Delivery, LimitRow
    from leveret.worker.application import Application

log = logging.getLogger("leveret.limits")

#: How often the broker is told anew, which may have lost what it was told (seconds).
LOOK = 15.0
#: What could not be done is tried again after so long, and the application is looked at (seconds).
_AGAIN = 1.0
#: A broker that refuses this client is asked so often at the start.
_REFUSALS = 5
#: So many names of limits are remembered that were told of.
_MOST_TOLD = 1_000


class LimitKeeper:
    """Of one worker."""

    def __init__(self, broker: Broker, application: Application, queues: Sequence[str]) -> None:
        self._broker = broker
        self._application = application
        #: Those that the worker consumes.
        self._queues = queues
        self._warnings = LimitedLog(log)
        #: The limits that the broker has, as far as is known.
        self._known: frozenset[str] = frozenset(BUILT_IN)
        self._declared: DeclareLimits | None = None
        #: What was said of limits, by name, and is said once.
        self._told: dict[str, str] = {}
        #: Limits of tasks that came, and that are to be looked for.
        self._strange: set[str] = set()

    async def declare(self) -> None:
        """Before the worker takes tasks: until the broker could be told. Raises BrokerRefused, ConfigurationError."""
        pauses, refusals = backoff(), 0
        while _is_any(self._application.limits) and self._declared is None:
            try:
                await self._declare()
            except (BrokerUnavailable, BrokerRefused) as error:
                refusals += isinstance(error, BrokerRefused)
                if refusals == _REFUSALS:
                    raise
                pause = next(pauses)
                log.warning("the limits cannot be declared, trying again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)

    async def run(self) -> None:
        """Until it is cancelled."""
        both = [asyncio.create_task(self._keep_declared()), asyncio.create_task(self._keep())]
        try:
            await first_of(*both)
            for task in both:
                if task.done():
                    task.result()
        finally:
            await ended(both)

    def see(self, deliveries: Sequence[Delivery]) -> None:
        """Tasks came: their limits should be known."""
        for one in deliveries:
            headers = one.envelope.headers
            if headers and LIMITS in headers:
                self._strange.update(name for name, _ in limit_refs(headers) if name not in self._known)

    async def _keep(self) -> None:
        """Where workers decide which tasks go next, this one may have to."""
        pauses = backoff()
        while True:
            try:
                async with self._broker.limits.keep():
                    pauses = backoff()
                    await asyncio.get_running_loop().create_future()
            except LeveretError as error:
                self._warnings.warning("the limits cannot be kept: %s", error)
                await asyncio.sleep(next(pauses))

    async def _keep_declared(self) -> None:
        """Tell the broker again now and then, and when the application was loaded again."""
        pauses = backoff(_AGAIN, LOOK)
        until = asyncio.get_running_loop().time() + (LOOK if self._declared else 0.0)
        while True:
            application, now = self._application.limits, asyncio.get_running_loop().time()
            if now >= until or (self._declared is not application and self._declared is not None) or self._strange:
                try:
                    await self._declare()
                    until, pauses = now + LOOK, backoff(_AGAIN, LOOK)
                except LeveretError as error:
                    if _is_any(application) or self._strange:
                        self._warnings.warning("the limits cannot be declared: %s", error)
                    until = now + next(pauses)
            await asyncio.sleep(_AGAIN)

    async def _declare(self) -> None:
        """Tell the broker, and look at what is in force."""
        declaration = self._application.limits
        if _is_any(declaration):
            await self._broker.limits.ask(declaration)
        rows = {one.row.name: one.row for one in await self._broker.limits.read()}
        self._known, self._declared = frozenset(rows) | BUILT_IN.keys(), declaration
        strange, self._strange = self._strange, set()
        for name, text in [*self._notes(declaration, rows), *_unknown(strange - self._known)]:
            if self._told.get(name) != text:
                self._told[name] = text
                log.warning("%s", text)
                if len(self._told) > _MOST_TOLD:
                    del self._told[next(iter(self._told))]

    def _notes(self, declaration: DeclareLimits, rows: Mapping[str, LimitRow]) -> Iterator[tuple[str, str]]:
        """What an operator may not expect of limits, each with its name."""
        for name, row in rows.items():
            shown, rule = in_line(name), declaration.rules.get(name)
            if rule is not None and row.declared != rule:
                yield name, f"limit {shown!r} is {rule} here, and {row.declared} in a newer program, which counts"
            elif rule is not None and row.changed is not None and row.changed != rule:
                yield name, f"limit {shown!r} is {row.changed}, as somebody has set it, and not {rule} as in the code"
            elif rule is not None and row.paused:
                yield name, f"limit {shown!r} is paused: its tasks wait"
            elif rule is None and name in map(queue_limit, self._queues):
                yield (
                    name,
                    f"limit {shown!r} is in force ({row.rule}), and not in this application's code: if no other has "
                    "it, `leveret limits remove` ends it",
                )


def _is_any(declaration: DeclareLimits) -> bool:
    return bool(declaration.rules or declaration.queues)


def _unknown(names: frozenset[str] | set[str]) -> Iterator[tuple[str, str]]:
    for name in sorted(names):
        yield (
            name,
            f"tasks have the limit {in_line(name)!r}, which no worker has declared, so it lets them all go: start a "
            "worker of the application that makes it",
        )
