"""What a candidate for a table decides: deliveries, confirms and the time go in, what is to be done comes out. No I/O.

The rules are those of docs/adr/0038. In short: whoever receives what it has sent to the table's queue is the active
consumer at that moment. A row that was confirmed was not thereby delivered, and one that was not may come late.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from leveret.brokers.rabbitmq.coordination.entries import Hello, Row, Version

if TYPE_CHECKING:
    from collections.abc import Iterable

    from leveret.brokers.rabbitmq.coordination.entries import Entry

#: How often a candidate sends a hello, and how long nothing may come back (seconds).
HELLO = 1.0
DOUBT = 2.0
#: For how long a proof of being active counts (seconds): what is published in that time may be stored after another
#: one took over.
FRESH = 0.25
#: A row is published anew when its message is so old (seconds): below the consumer timeout of 30 minutes before
#: RabbitMQ 4.3, and a message that stays keeps the queue's log on disk.
RENEW = 600.0
#: How long a removed row's tombstone stays, so that the row's own acknowledgment is applied before it (seconds).
TOMBSTONE = 60.0
#: By how much the wall clock and the monotonic one may part between two looks (seconds).
_JUMP = 2.0
#: A look that comes so late tells that this process stood still: what came meanwhile is read first (seconds).
_LATE = 1.0
#: How often rows are looked through for what is to be renewed (seconds).
_TEND = 5.0
#: Rows that are renewed at one look, at most this part of all of them, and some.
_RENEWED = 50
#: The key of the epoch's own row.
EPOCH = ""


class Phase(enum.Enum):
    STANDING_BY = enum.auto()
    #: Something was delivered, so this one is active: it reads up to a hello of its own.
    LOADING = enum.auto()
    #: All rows are here, and the row that begins its epoch is on the way.
    CLAIMING = enum.auto()
    HOLDING = enum.auto()
    OVER = enum.auto()


class Send(msgspec.Struct, frozen=True):
    """Publish it; tell `Candidate.confirmed` or `refused` what became of it. ``number``: its own, for that."""

    entry: Row | Hello
    number: int


class Acknowledge(msgspec.Struct, frozen=True):
    tags: list[int]


class Applied(msgspec.Struct, frozen=True):
    """A row of ours came back: it counts."""

    version: Version


class Stored(msgspec.Struct, frozen=True):
    """A row that rides on a task came back and was confirmed: both are stored."""

    version: Version


class Refused(msgspec.Struct, frozen=True):
    """The task that a row rides on was refused; the row is put back as it was."""

    version: Version


class Proved(msgspec.Struct, frozen=True):
    """Something of ours came back; see `Candidate.is_fresh`."""


class Holding(msgspec.Struct, frozen=True):
    """From now on this one may act."""


class Doubt(msgspec.Struct, frozen=True):
    """Close the connection, forget all and join again. ``reason``: for the log."""

    reason: str


Action: TypeAlias = "Send | Acknowledge | Applied | Stored | Refused | Proved | Holding | Doubt"


class _Held:
    """The newest row of a key, and the unacknowledged messages of it."""

    __slots__ = ("lower", "row", "since", "tags", "was")

    def __init__(self, row: Row, tag: int, since: float) -> None:
        self.row = row
        #: More than one if the same message was delivered again.
        self.tags = [tag]
        #: Messages of older rows of the key, which are acknowledged when this one counts for good.
        self.lower: list[int] = []
        #: The value before, while this one rides on a task that is not confirmed.
        self.was: bytes | None = None
        self.since = since


class _Sent(NamedTuple):
    entry: Row | Hello
    at: float


class _Ride(NamedTuple):
    """A row on a task. ``outcome``: whether it was confirmed, or refused; None: neither yet."""

    key: str
    outcome: bool | None = None


class Candidate:
    """One connection's stay at a table's queue. ``me``: a name that nobody else has, and this one never again.

    ``reads``: only reads, and takes no epoch.
    """

    def __init__(self, me: str, now: float, wall: float, *, reads: bool = False) -> None:
        self._me = me
        self._reads = reads
        self.phase = Phase.STANDING_BY
        self.epoch = 0
        self._held: dict[str, _Held] = {}
        self._numbers = 0
        #: Ours that are on the way: stood by until their confirm, later until they come back.
        self._out: dict[int, _Sent] = {}
        #: Rows of ours that are on the way, by key.
        self._changing: Counter[str] = Counter()
        #: Keys that were dropped while a row of theirs was on the way.
        self._dropped: set[str] = set()
        #: Rows on tasks, by their number.
        self._riding: dict[int, _Ride] = {}
        self._sentinel = 0
        #: To be acknowledged when this one holds the table.
        self._settled: list[int] = []
        self._heard_at = now
        self._hello_at = now
        self._looked_at = now
        self._tended_at = now
        self._skew = wall - now
        #: When what came back last was sent, and when it came.
        self._proof = float("-inf"), float("-inf")
        #: Hellos of its own.
        self._own: list[int] = []

    # What it has

    def value(self, key: str) -> bytes | None:
        held = self._held.get(key)
        return None if held is None else held.row.value

    def rows(self) -> dict[str, bytes]:
        found = ((key, held.row.value) for key, held in self._held.items() if key != EPOCH)
        return {key: value for key, value in found if value is not None}

    def __len__(self) -> int:
        return len(self._held)

    def uncertain(self) -> frozenset[str]:
        """Keys whose row rode on a task of which the last holder did not say that it is stored."""
        return frozenset(key for key, held in self._held.items() if held.row.rides and held.lower)

    def is_fresh(self, now: float) -> bool:
        """Whether it was just seen that this one is active: then it may publish."""
        sent_at, came_at = self._proof
        return self.phase is Phase.HOLDING and now - came_at <= FRESH and now - sent_at <= DOUBT

    # What it does

    def begin(self, now: float) -> list[Action]:
        """It consumes from now on; something may have been delivered by now."""
        self._heard_at = now
        return [self._hello(now)] if self.phase is Phase.STANDING_BY else []

    def prove(self, now: float) -> list[Action]:
        """Send what proves, when it comes back, that this one is active now."""
        return [self._hello(now)]

    def change(self, key: str, value: bytes | None, now: float, *, rides: bool = False) -> Send:
        """Publish a key's next row. It counts when it comes back (`Applied`, or `Stored` of one that rides)."""
        assert self.phase is Phase.HOLDING
        send = self._send_row(key, value, now, rides=rides)
        if rides:
            self._riding[send.number] = _Ride(key)
        return send

    def drop(self, keys: Iterable[str]) -> list[Action]:
        """Forget rows whose keys never come again, without a tombstone: see docs/adr/0042."""
        tags: list[int] = []
        for key in keys:
            held = self._held.pop(key, None)
            if held is not None:
                tags += held.tags + held.lower
            if key in self._changing:
                self._dropped.add(key)
        return [Acknowledge(tags)] if tags else []

    def look(self, now: float, wall: float) -> list[Action]:
        """The time has passed: hellos, renewals, doubts. To be called about every half of `HELLO`."""
        since, self._looked_at = now - self._looked_at, now
        skew, self._skew = self._skew, wall - now
        if self.phase is Phase.OVER:
            return []
        if abs(self._skew - skew) > _JUMP:
            return self._doubt(f"the clock jumped by {self._skew - skew:.1f} s")
        if since > _LATE:
            return [self._hello(now)]
        waits = any(sent.at <= now - DOUBT for sent in self._out.values())
        if waits and now - self._heard_at > DOUBT:
            return self._doubt(f"RabbitMQ {self._silence()} nothing for {now - self._heard_at:.1f} s")
        actions: list[Action] = []
        # Whoever is delivered something, if only the hellos of those that stand by, is active.
        quiet_since = self._hello_at if self.phase is Phase.STANDING_BY else max(self._hello_at, self._heard_at)
        if now - quiet_since >= HELLO:
            actions.append(self._hello(now))
        if self.phase is Phase.HOLDING:
            actions += self._tend(now)
        return actions

    def rest(self, now: float) -> None:
        """An alarm keeps RabbitMQ from taking anything: silence means nothing."""
        self._heard_at = self._looked_at = now

    def confirmed(self, number: int, now: float) -> list[Action]:
        """RabbitMQ has stored what was sent. It proves nothing about who is active."""
        if self.phase is Phase.STANDING_BY:
            self._heard_at = now
            self._out.pop(number, None)
        if number not in self._riding:
            return []
        self._riding[number] = self._riding[number]._replace(outcome=True)
        return self._complete(number, now)

    def refused(self, number: int, now: float) -> list[Action]:
        """RabbitMQ has not stored it, or not in each of its queues."""
        if number not in self._riding:
            return self._doubt("RabbitMQ refused a row")
        self._riding[number] = self._riding[number]._replace(outcome=False)
        return self._complete(number, now)

    def delivered(self, entries: Iterable[tuple[Entry, int, bool]], now: float) -> list[Action]:
        """Deliveries, in order: what each is, its tag, and whether RabbitMQ says that it was delivered before."""
        self._heard_at = now
        actions: list[Action] = []
        spent: list[int] = []
        for entry, tag, redelivered in entries:
            if self.phase is Phase.OVER:
                break
            if self.phase is Phase.STANDING_BY:
                actions += self._load(now)
            if redelivered and self.phase is Phase.HOLDING:
                actions += self._doubt("what was delivered before came again: somebody may hold the table besides")
            else:
                actions += self._take(entry, tag, now, spent)
        if self.phase is not Phase.OVER:
            self._settled += spent
            if self.phase is Phase.HOLDING and self._settled:
                actions.append(Acknowledge(self._settled))
                self._settled = []
        return actions

    # How

    def _take(self, entry: Entry, tag: int, now: float, spent: list[int]) -> list[Action]:
        if isinstance(entry, Row):
            return self._take_row(entry, tag, now, spent)
        if isinstance(entry, Hello):
            return self._take_hello(entry, tag, now, spent)
        if not entry.is_kept:
            spent.append(tag)
        return []

    def _load(self, now: float) -> list[Action]:
        self.phase = Phase.LOADING
        # Hellos from before may be in front of rows of the last holder that are still coming back.
        self._out.clear()
        hello = self._hello(now)
        self._sentinel = hello.number
        return [hello]

    def _take_hello(self, hello: Hello, tag: int, now: float, spent: list[int]) -> list[Action]:
        if hello.by != self._me:
            spent.append(tag)
            return []
        (self._own if self._reads else spent).append(tag)
        actions: list[Action] = []
        if self.phase is not Phase.LOADING:
            actions += self._prove(hello.number, now)
        elif hello.number == self._sentinel:
            self._out.pop(hello.number, None)
            if self._reads:
                self.phase = Phase.OVER
                return [Acknowledge(self._own), Holding()]
            self.phase = Phase.CLAIMING
            self.epoch = 1 + max((held.row.version.epoch for held in self._held.values()), default=0)
            actions.append(self._send_row(EPOCH, b"", now))
        return actions

    def _take_row(self, row: Row, tag: int, now: float, spent: list[int]) -> list[Action]:
        if row.version.by == self._me:
            return self._take_own(row, tag, now)
        held = self._held.get(row.key)
        if self.phase is Phase.HOLDING:
            if row.version.epoch >= self.epoch:
                return self._doubt(f"{row.version.by} began epoch {row.version.epoch} beside {self.epoch}")
            if held is None or held.row.version < row.version:
                return self._doubt(f"a row of {row.version.by} came late, which this one has not read")
        if held is None or held.row.version < row.version:
            self._supersede(row, tag, now)
        elif held.row.version == row.version:
            held.tags.append(tag)  # the same message; which of the tags is alive cannot be told
        elif held.row.rides:
            held.lower.append(tag)  # see `uncertain`
        else:
            spent.append(tag)
        if self.phase is Phase.CLAIMING and row.version.epoch >= self.epoch:
            return self._doubt(f"{row.version.by} began epoch {row.version.epoch} beside {self.epoch}")
        return []

    def _supersede(self, row: Row, tag: int, now: float) -> None:
        held = self._held.get(row.key)
        self._held[row.key] = new = _Held(row, tag, now)
        if held is None:
            return
        new.was = held.row.value
        older = held.tags + held.lower
        if row.rides:
            new.lower = older
        else:
            self._settled += older

    def _take_own(self, row: Row, tag: int, now: float) -> list[Action]:
        number = row.version.number
        actions = self._prove(number, now)
        self._changing[row.key] -= 1
        if self._changing[row.key] <= 0:
            del self._changing[row.key]
        held = self._held.get(row.key)
        if row.key in self._dropped:
            self._settled.append(tag)
            if row.key not in self._changing:
                self._dropped.discard(row.key)
        elif held is not None and held.row.version > row.version:
            self._settled.append(tag)
        else:
            self._supersede(row, tag, now)
        if row.key == EPOCH and self.phase is Phase.CLAIMING:
            self.phase = Phase.HOLDING
            actions.append(Holding())
        actions.append(Applied(row.version))
        return actions + self._complete(number, now)

    def _complete(self, number: int, now: float) -> list[Action]:
        """Of a row on a task: what follows when both its delivery and its confirm have come."""
        ride = self._riding.get(number)
        if ride is None or ride.outcome is None or number in self._out:
            return []
        del self._riding[number]
        held = self._held.get(ride.key)
        is_newest = held is not None and held.row.version.number == number
        version = Version(self.epoch, number, self._me)
        if ride.outcome:
            actions: list[Action] = [Stored(version)]
            if held is not None and is_newest and held.lower:
                actions.append(Acknowledge(held.lower))
                held.lower = []
            return actions
        if held is not None and is_newest and not self._changing[ride.key]:
            return [self._send_row(ride.key, held.was, now), Refused(version)]
        return [Refused(version)]

    def _prove(self, number: int, now: float) -> list[Action]:
        sent = self._out.pop(number, None)
        if sent is None:
            return []
        self._proof = max(self._proof, (sent.at, now))
        return [Proved()]

    def _tend(self, now: float) -> list[Action]:
        if now - self._tended_at < _TEND:
            return []
        self._tended_at = now
        return [*self._renew(now), *self._bury(now)]

    def _renew(self, now: float) -> list[Action]:
        """Publish the oldest rows anew, some at a time."""
        old = [
            (held.since, key)
            for key, held in self._held.items()
            if now - held.since > RENEW
            and held.row.value is not None
            and not (held.row.rides and held.lower)
            and key not in self._changing
        ]
        old.sort()
        return [
            self._send_row(key, self._held[key].row.value, now) for _, key in old[: 10 + len(self._held) // _RENEWED]
        ]

    def _bury(self, now: float) -> list[Action]:
        """Acknowledge the tombstones whose rows are gone for good."""
        gone = [
            key
            for key, held in self._held.items()
            if held.row.value is None and now - held.since > TOMBSTONE and key not in self._changing
        ]
        if not gone:
            return []
        return [Acknowledge([tag for key in gone for tag in self._held.pop(key).tags])]

    def _hello(self, now: float) -> Send:
        self._hello_at = now
        return self._send(Hello(self._me, self._numbers + 1), now)

    def _send_row(self, key: str, value: bytes | None, now: float, *, rides: bool = False) -> Send:
        self._changing[key] += 1
        return self._send(Row(key, Version(self.epoch, self._numbers + 1, self._me), value, rides), now)

    def _send(self, entry: Row | Hello, now: float) -> Send:
        self._numbers += 1
        self._out[self._numbers] = _Sent(entry, now)
        return Send(entry, self._numbers)

    def _silence(self) -> str:
        return "confirmed" if self.phase is Phase.STANDING_BY else "delivered"

    def _doubt(self, reason: str) -> list[Action]:
        self.phase = Phase.OVER
        return [Doubt(reason)]
