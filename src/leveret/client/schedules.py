"""``App.schedules``: schedules that are data, and what an operator does with all of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.client.handle import Handle
from leveret.client.task import Call
from leveret.errors import ConfigurationError
from leveret.model import Cron, Every, Pause, Put, Remove, Resume, Trigger
from leveret.model.durations import show

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from leveret.client.client import Client
    from leveret.model import ScheduleRow


class Schedules:
    """The schedules that the application's broker keeps; ``App.schedules`` makes it.

    ``async for row in app.schedules`` gives each by name: ``row.next`` and ``row.last`` are its next and last instant
    (Unix times), ``row.paused`` and ``row.schedule.timing`` tell the rest.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def __aiter__(self) -> AsyncIterator[ScheduleRow]:
        for row in await self._client.broker.schedules.read():
            yield row

    async def put(self, name: str, call: Call[Any], timing: Cron | Every) -> None:
        """Keep a schedule until it is removed: ``put("digest:42", digest.call(42), cron("0 7 * * *"))``.

        One of that name gets the new call and timing, and keeps its last instant.

        Args:
            name: The name, with which the ids of its tasks begin: printable, at most 230 bytes.
            call: The task and its arguments. ``task.options(queue=...).call(...)`` has other options.
            timing: ``cron(...)`` or ``every(...)``.

        Raises:
            ConfigurationError: The name, the call or the timing is not what it must be, or the code has a schedule of
                that name.
            InvalidArguments: The arguments do not fit the task.
            BrokerError: The broker cannot be reached or used.
        """
        if not isinstance(call, Call):
            raise ConfigurationError(f"schedule {name!r}: {show(call)} is no call of a task; give it task.call(...)")
        if not isinstance(timing, (Cron, Every)):
            raise ConfigurationError(
                f"schedule {name!r}: {show(timing)} says nothing of when; give it cron('0 7 * * *') or every(minutes=5)"
            )
        if timing.args or timing.kwargs:
            raise ConfigurationError(f"schedule {name!r}: the arguments are the call's; leave with_args(...) out")
        timing = msgspec.structs.replace(timing, args=call.args, kwargs=dict(call.kwargs))
        schedule = call.task.scheduled(name, timing)
        await self._client.require([schedule.message.queue])
        await self._client.broker.schedules.ask(Put(schedule))

    async def remove(self, name: str) -> None:
        """Forget a schedule that is data. Its tasks that are enqueued stay.

        Args:
            name: The schedule's name.

        Raises:
            ScheduleNotFound: There is none of that name.
            ConfigurationError: It is the code's.
        """
        await self._client.broker.schedules.ask(Remove(name))

    async def pause(self, name: str) -> None:
        """Have a schedule enqueue nothing until it is resumed, whatever workers come and go.

        Args:
            name: The schedule's name.

        Raises:
            ScheduleNotFound: There is none of that name.
        """
        await self._client.broker.schedules.ask(Pause(name))

    async def resume(self, name: str) -> None:
        """End the pause of a schedule. It goes on with its next instant; what passed is not made up for.

        Args:
            name: The schedule's name.

        Raises:
            ScheduleNotFound: There is none of that name.
        """
        await self._client.broker.schedules.ask(Resume(name))

    async def trigger(self, name: str) -> Handle[Any]:
        """Enqueue a schedule's task once, now and besides.

        Args:
            name: The schedule's name.

        Returns:
            The handle of the task.

        Raises:
            ScheduleNotFound: There is none of that name.
        """
        request = Trigger(name, round(time.time(), 3))
        change = await self._client.broker.schedules.ask(request)
        task, queue = (change.tasks[0].task, change.tasks[0].queue) if change.tasks else (None, None)
        return Handle(request.id, self._client, task, queue)
