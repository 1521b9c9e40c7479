"""What was admitted and has not ended: permits' rows, and what is known of the messages that led to them. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from leveret.brokers.rabbitmq.admission.asked import Emptied
    from leveret.brokers.rabbitmq.admission.rows import Stored
    from leveret.brokers.rabbitmq.admission.windows import Window
    from leveret.brokers.rabbitmq.amqp import Incoming
    from leveret.brokers.rabbitmq.queues import Waiting

#: How many stays that ended are known, in case that a message comes back.
_MOST_ENDED = 20_000


class Task(NamedTuple):
    """A task that waits, as it was delivered. ``found``: what its headers say."""

    window: Window
    message: Incoming
    found: Waiting

    @property
    def id(self) -> str:
        return self.found.id

    def settle(self) -> None:
        """Its message leaves its queue."""
        self.window.settle(self.message.tag)


class Admitted:
    """``epoch``: that of the tenure, with which the names of its own permits begin."""

    def __init__(self, epoch: int) -> None:
        self._own = f"{epoch}."
        self._rows: dict[str, Stored] = {}
        #: The permit of each stay that has led to one.
        self._permit_of: dict[str, str] = {}
        #: Permits of this tenure whose tasks are known to be in their queues; and of others the messages that are kept
        #: until that is known, or the task has ended.
        self._known: set[str] = set()
        self._originals: dict[str, list[Task]] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def note(self, permit: str, stored: Stored) -> None:
        """It has this row."""
        self._rows[permit] = stored
        if stored.stay:
            self._permit_of[stored.stay] = permit

    def keep(self, permit: str, task: Task) -> None:
        """The message stays until it is sure that its task is in its queue."""
        self._originals.setdefault(permit, []).append(task)

    def kept(self, permit: str) -> list[Task]:
        """The messages that were kept, which are kept no more."""
        return self._originals.pop(permit, [])

    def know(self, permit: str) -> None:
        """Its task is in its queue."""
        self._known.add(permit)

    def take_back(self, task: Task) -> bool:
        """Whether a message that comes has led to a permit before."""
        stay = task.found.stay
        permit = self._permit_of.get(stay)
        if permit is not None and permit not in self._known:
            self.keep(permit, task)
        elif permit is not None or stay in self._ended:
            task.settle()
        else:
            return False
        return True

    def end(self, permit: str) -> None:
        """Its task has ended."""
        stay = self.forget(permit)
        if stay:
            self._ended[stay] = None
        while len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)

    def forget(self, permit: str) -> str:
        """It is given back; the stay that led to it."""
        self._known.discard(permit)
        stored = self._rows.pop(permit, None)
        stay = "" if stored is None else stored.stay
        self._permit_of.pop(stay, None)
        return stay

    def queues(self) -> set[str]:
        return {row.queue for row in self._rows.values()}

    def of(self, queue: str) -> list[str]:
        """The permits of a queue's tasks."""
        return [permit for permit, row in self._rows.items() if row.queue == queue]

    def arrived(self, queue: str) -> list[str]:
        """Those of a queue whose tasks are not on the way to it."""
        return [permit for permit in self.of(queue) if not self._is_on_the_way(permit)]

    def missing(self, permits: Iterable[str], found: Emptied | None) -> frozenset[str]:
        """Those permits of a queue whose tasks workers do not have. ``found``: see `LookInto`."""
        here = [permit for permit in permits if permit in self._rows]
        if found is None or any(map(self._is_on_the_way, here)):
            return frozenset()
        running = frozenset(found.running)
        gone = frozenset(permit for permit in here if self._rows[permit].id not in running)
        return gone if len(gone) <= len(here) - found.taken else frozenset()

    def _is_on_the_way(self, permit: str) -> bool:
        return permit in self._originals and permit.startswith(self._own)
