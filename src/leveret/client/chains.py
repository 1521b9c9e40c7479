"""Chains: steps that run one after the other, each with the result of the one before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from leveret.client.handle import CANCEL_TIMEOUT, Handle
from leveret.errors import ConfigurationError, ResultTimeout, TaskNotFound
from leveret.model import arguments, new_id, slip, step_id
from leveret.model.durations import show

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from typing import Self

    from leveret.client.handle import Source
    from leveret.client.task import Task
    from leveret.model import Envelope, Status

R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
R = TypeVar("R")


class Chain(Generic[R_co]):
    """Steps that run one after the other: ``fetch.step(url) | parse.step() | store.step()``.

    Each gets the result of the one before as its first argument, unless it is ``immutable()``. The parameter of the
    type is what the last one returns.
    """

    __slots__ = ("steps",)

    def __init__(self, steps: tuple[Step[Any], ...]) -> None:
        #: The steps, in the order in which they run.
        self.steps = steps

    def __or__(self, other: Chain[T]) -> Chain[T]:
        """The steps of both, one after the other.

        Args:
            other: What follows: a step, or a chain.

        Returns:
            The longer chain. Neither of the two is changed.
        """
        given: object = other
        if not isinstance(given, Chain):
            raise ConfigurationError(f"{show(other)} is no step of a chain; give it task.step(...)")
        return Chain((*self.steps, *other.steps))

    def __repr__(self) -> str:
        return f"<Chain {' | '.join(step.task.name for step in self.steps)}>"

    async def enqueue(self) -> ChainHandle[R_co]:
        """Store the first step durably, and with it all that follows. When it returns, the chain is safe.

        Returns:
            The handle of the whole chain.

        Raises:
            InvalidArguments: The arguments of a step do not fit its task, besides the result that it gets. Nothing was
                sent.
            ConfigurationError: The steps after the first one are over 64 KiB; a step has an id, a unique key or a
                limit by what it gets as the result, is another application's, takes the raw body behind another one, or
                has ``acknowledge="before"`` before another one.
            LeveretError: As with ``Task.enqueue``.
        """
        first, handle = self._made()
        producer = self.steps[0].task.producer
        await producer.require({step.task.queue for step in self.steps})
        await producer.publish([first], notify=self.steps[0].task.store_result)
        return handle

    def enqueue_sync(self) -> ChainHandle[R_co]:
        """``enqueue`` for code without an event loop. See ``App.wait``.

        Returns:
            The handle of the whole chain.

        Raises:
            RuntimeError: This thread runs an event loop, which the call would block.
            LeveretError: As with ``enqueue``.
        """
        return self.steps[0].task.producer.wait(self.enqueue())

    def _made(self) -> tuple[Envelope, ChainHandle[R_co]]:
        """The message of the first step, and the handle. Raises ConfigurationError, InvalidArguments, ..."""
        first, *others = self.steps
        producer, flow = first.task.producer, new_id()
        for step in self.steps:
            if step.task.producer is not producer:
                raise ConfigurationError(f"step {step.task.name!r} is another application's than the first one")
            if step.task.acknowledge == "before" and step is not self.steps[-1]:
                raise ConfigurationError(
                    f"task {step.task.name!r} has acknowledge='before', so it may be lost, and the steps after it with "
                    "it: it can be the last step of a chain alone"
                )
        following = [step.task.following(step.args, step.kwargs, immutable=step.is_immutable) for step in others]
        envelope = first.task.beginning(
            step_id(flow, 1), first.args, first.kwargs, flow, slip(following) if following else None
        )
        at = envelope.enqueued_at
        handles: list[Handle[Any]] = [
            Handle(step_id(flow, number), producer, one.task.name, one.task.queue, one.task.store_result, at)
            for number, one in enumerate(self.steps, 1)
        ]
        return envelope, ChainHandle(flow, producer, handles)


class Step(Chain[R_co]):
    """A call of a task as a part of a chain, and a chain of one; ``Task.step`` makes it."""

    __slots__ = ("args", "is_immutable", "kwargs", "task")

    def __init__(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, is_immutable: bool = False
    ) -> None:
        super().__init__((self,))
        #: With what ``options`` said.
        self.task = task
        self.args = args
        self.kwargs = kwargs
        #: It does not get the result of the step before.
        self.is_immutable = is_immutable

    def immutable(self) -> Self:
        """The same step, which does not get the result of the step before: it has its own arguments alone.

        Returns:
            The step. This one is not changed.
        """
        return type(self)(self.task, self.args, self.kwargs, is_immutable=True)

    def __repr__(self) -> str:
        given = [*map(show, self.args), *(f"{name}={show(value)}" for name, value in self.kwargs.items())]
        return f"<Step {self.task.name}({', '.join(given)})>"


class ChainHandle(Generic[R]):
    """A chain that is safely stored. ``Chain.enqueue`` makes it."""

    __slots__ = ("_source", "id", "steps")

    def __init__(self, id_: str, source: Source, steps: Sequence[Handle[Any]]) -> None:
        #: The chain's id; its steps have the ids ``<id>.1``, ``<id>.2``, ...
        self.id = id_
        self._source = source
        #: The handles of its steps. A step is known as soon as the one before it has succeeded.
        self.steps = steps

    def __repr__(self) -> str:
        return f"<ChainHandle {self.id} of {len(self.steps)} steps>"

    async def status(self) -> Status:
        """What is known of the step where the chain is now: the last one that there is.

        Returns:
            The step's status. With ``dead`` the chain waits until its dead letter is put back (``leveret dead retry``).

        Raises:
            TaskNotFound: Nothing is known of any step.
            BrokerError: The broker cannot be asked.
        """
        return (await self._now())[1]

    async def result(self, timeout: float | timedelta | None = None) -> R:
        """Wait until the last step has ended, and give what it returned. Ask within the application's ``keep_results``.

        Args:
            timeout: How long to wait (seconds, or a timedelta). None: as long as it takes.

        Returns:
            What the last step returned, as its task's annotation says.

        Raises:
            TaskFailed: A step is dead. The chain goes on if its dead letter is put back.
            TaskCancelled: A step was cancelled.
            NoResult: The last step succeeded, but what it returned could not be kept.
            NotSerializable: What the last step returned does not fit its annotation.
            ResultTimeout: The last step had not ended in time, and the chain goes on.
            ConfigurationError: The last step has ``store_result=False``, or ``timeout`` is no duration.
            BrokerError: The broker cannot be asked.
        """
        seconds = arguments.timeout(timeout)
        last: Handle[R] = self.steps[-1]
        last.check_stored()
        try:
            async with asyncio.timeout(seconds) as limit, self._source.follow(self._ids) as feed:
                async for statuses in feed:
                    for status in statuses:
                        is_end = status.id == last.id and status.is_final
                        if is_end or status.state in ("dead", "cancelled"):
                            return last.result_in(status)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ResultTimeout(f"chain {self.id} had not ended after {seconds or 0.0:.15g} s; it goes on") from error
        raise AssertionError("a feed ends with its reader")

    async def cancel(self, *, timeout: float | timedelta = CANCEL_TIMEOUT) -> Status:
        """Have the step that waits or runs not run, or end, and those after it never begin.

        Args:
            timeout: How long to wait for a running step to end (seconds, or a timedelta).

        Returns:
            The status of the step where the chain has ended: ``cancelled``. With ``succeeded`` or ``dead`` it was too
            late; with any other state the step still runs after ``timeout``.

        Raises:
            TaskNotFound: Nothing is known of any step.
            ConfigurationError: ``timeout`` is no duration.
            BrokerError: The broker cannot be asked.
        """
        seconds = arguments.seconds("timeout", timeout)
        place, _ = await self._now()
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            left = max(0.0, deadline - asyncio.get_running_loop().time())
            status = await self.steps[place].cancel(timeout=left)
            # One that had ended before has set the next one going, and that is known by now.
            if status.state != "succeeded" or place == len(self.steps) - 1:
                return status
            place += 1

    @property
    def _ids(self) -> list[str]:
        return [step.id for step in self.steps]

    async def _now(self) -> tuple[int, Status]:
        """The place of the step where it is, and that step's status."""
        known = {status.id: status for status in await self._source.statuses(self._ids)}
        for place in reversed(range(len(self.steps))):
            if (status := known.get(self.steps[place].id)) is not None:
                return place, status
        raise TaskNotFound(f"nothing is known of chain {self.id!r}: its results were kept long enough, or are not kept")
