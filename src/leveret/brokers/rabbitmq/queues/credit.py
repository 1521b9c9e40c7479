"""How much a queue's consumers lack, of the credit that was asked for. Pure: no I/O.

A consumer's credit is for good. What its deliveries keep of it for long is given by one more consumer.
"""

from __future__ import annotations

#: So many deliveries of a queue are made up for; then it gets slower, and at last it stands still.
_MOST_STUCK = 1_000
#: One more consumer for each eighth that is missing: each is one on the server.
_SHARE = 8


class QueueCredit:
    """The credit of one queue's living consumers in one session."""

    def __init__(self, credit: int) -> None:
        #: What was asked for; 0: no limit.
        self._credit = credit
        #: Deliveries from before a pause, which have some of it, and give it back as they end; and how much that is.
        self._older: set[int] = set()
        self._free = 0
        #: Deliveries that end nobody knows when, and how much is given for them.
        self._stuck: set[int] = set()
        self._lent = 0

    @property
    def total(self) -> int:
        return self._credit + self._lent if self._credit else 0

    @property
    def is_uneven(self) -> bool:
        """Whether anything is to be given, or taken into account, as deliveries are settled."""
        return bool(self._older or self._stuck)

    def resume(self, older: set[int]) -> int | None:
        """What to consume with when nothing consumes; None: nothing yet. ``older``: deliveries that keep their part."""
        self._older, self._free = set(older), 0
        self._stuck, self._lent = set(), 0
        if not self._credit:
            return 0
        return self._credit - len(older) if len(older) < self._credit else None

    def settled(self, tag: int) -> int:
        """How much to give now that a delivery is. In halves: each gift is one more consumer on the server."""
        self._stuck.discard(tag)
        if tag not in self._older:
            return 0
        self._older.discard(tag)
        self._free += 1
        if self._free < len(self._older):
            return 0
        given, self._free = self._free, 0
        return given

    def stuck(self, tag: int) -> int:
        """How much to give now that a delivery will not end soon."""
        if not self._credit or tag in self._stuck:
            return 0
        if tag in self._older:
            return self.settled(tag)
        self._stuck.add(tag)
        missing = len(self._stuck) - self._lent
        if missing < max(1, self.total // _SHARE) or len(self._stuck) > _MOST_STUCK:
            return 0
        self._lent += missing
        return missing
