"""The entries of the claims log, and what they add up to: who has which key. Values and pure rules, no I/O.

Every program that reads the log applies the same entries in the same order, so all come to the same holders. Nothing
here goes by a clock of the reader's.
"""

from __future__ import annotations

import heapq
import sys
from typing import TYPE_CHECKING

import msgspec

from leveret.model import MAX_UNIQUE_KEY, Envelope, decoded, is_name, moved
from leveret.model.names import fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

VERSION = 1
#: A task that has ended may come once more, if its worker died before it could say so to its queue: for so long it is
#: known what had replaced its arguments (seconds).
REMEMBERED = 300.0


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """Of a claim whose task later claims of the key may replace."""

    #: It replaces the task of the claim that is there, instead of giving way to it.
    replaces: bool = False
    #: When its task is due, and later than when no other claim makes it due (Unix time).
    due: float | None = None
    latest: float | None = None
    #: The key is free when the task is taken.
    until_taken: bool = False


class NewClaim(msgspec.Struct, frozen=True, array_like=True):
    """Somebody is about to store a task with a key, if no other has it."""

    key: str
    id: str
    queue: str
    #: The key is free from then on, whatever was lost (Unix time).
    until: float
    #: The whole task, for whoever stores it when the claimer has died. Others do not decode it.
    task: msgspec.Raw = msgspec.Raw()
    #: Only ``until`` ends it, not the task.
    is_kept: bool = False
    terms: Terms | None = None


class Adopted(msgspec.Struct, frozen=True, array_like=True):
    """A claim whose task may not have been stored is another program's to complete, if it is still ``owner``'s."""

    key: str
    id: str
    owner: str


class Emptied(msgspec.Struct, frozen=True, array_like=True):
    """What waited in a queue was deleted; not the tasks that ran."""

    queue: str
    running: list[str] = []


class Row(msgspec.Struct, frozen=True, array_like=True):
    """A claim in a snapshot; without its task if that is stored."""

    owner: str
    claim: NewClaim
    #: What has replaced its task.
    newest: msgspec.Raw = msgspec.Raw()
    #: It has its key no more: its task was taken with what had replaced it, or has ended.
    is_over: bool = False


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A part of what all entries up to an offset add up to: who begins to read behind it needs no older ones."""

    upto: int
    #: Of the parts that belong together.
    token: str
    part: int
    parts: int
    rows: list[Row]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of the log. Readers ignore a newer version, and members that they do not know."""

    #: Always written, though it is the default: readers in other languages go by it.
    v: int = msgspec.field(default_factory=lambda: VERSION)
    #: The program that wrote it, and its number there: who reads its own back knows what has come of it.
    by: str = ""
    n: int = 0
    #: When it was written (Unix time).
    at: float = 0.0
    #: Keys that are free, with the ids of the tasks that had them.
    freed: list[tuple[str, str]] = []
    #: Tasks that were cancelled before they ran.
    cancelled: list[str] = []
    emptied: list[Emptied] = []
    claims: list[NewClaim] = []
    #: Claims whose tasks are stored.
    stored: list[tuple[str, str]] = []
    adopted: list[Adopted] = []
    #: Claims whose tasks are about to begin, if they are due.
    taken: list[tuple[str, str]] = []
    #: Who begins to read can begin at that offset: a snapshot of what was before comes behind it. 0: not known.
    base: int = 0
    snapshot: Snapshot | None = None

    @property
    def weight(self) -> int:
        """How much it says."""
        return 1 + len(self.freed) + len(self.claims) + len(self.stored) + len(self.taken)


encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode
_decode_task = msgspec.json.Decoder(Envelope).decode


def entry_of(body: bytes) -> Entry | None:
    """None for what makes no sense here: the log is open to others."""
    entry = decoded(_decode, body)
    if entry is None or entry.v != VERSION:
        return None
    rows = [] if entry.snapshot is None else entry.snapshot.rows
    claims = [*entry.claims, *(row.claim for row in rows)] if rows else entry.claims
    if all(is_name(one.id) and is_name(one.queue) and fits(one.key, MAX_UNIQUE_KEY) for one in claims):
        return entry
    return None


_NO_TASK = msgspec.Raw(b"null")
_NO_TASKS = (_NO_TASK, msgspec.Raw())


class Claim(msgspec.Struct, gc=False):
    """A key that is taken."""

    id: str
    queue: str
    until: float
    #: The program that stores its task, or has stored it.
    owner: str
    #: None: it is stored.
    task: bytes | None = None
    is_kept: bool = False
    #: When the reader got to know that it is to be stored (the reader's loop's time).
    since: float = 0.0

    def envelope(self) -> Envelope | None:
        """The task; None: it is stored, or what is there is no task of that claim."""
        found = None if self.task is None else decoded(_decode_task, self.task)
        return found if found is not None and (found.id, found.queue) == (self.id, self.queue) else None


class Replaceable(msgspec.Struct, gc=False):
    """What later claims have made of a claim's task."""

    terms: Terms
    due: float | None
    #: None: nothing has replaced it.
    newest: bytes | None = None


class Over(msgspec.Struct, gc=False):
    """A task that has its key no more, and runs, or may run, with what had replaced it."""

    key: str
    queue: str
    until: float
    newest: bytes


class Turn(msgspec.Struct, frozen=True):
    """What is to become of a task that is about to begin."""

    #: It is to wait until then (Unix time).
    due: float | None = None
    #: What has replaced it.
    newest: bytes | None = None

    def replacement(self) -> Envelope | None:
        return None if self.newest is None else decoded(_decode_task, self.newest)


class Holders:
    """Who has which key."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        #: Those whose tasks are not known to be stored.
        self._pending: dict[str, Claim] = {}
        self._replaceable: dict[str, Replaceable] = {}
        #: By the task's id.
        self._over: dict[str, Over] = {}
        #: A heap: until when each of them is remembered.
        self._forgotten: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._claims)

    def get(self, key: str) -> Claim | None:
        return self._claims.get(key)

    def items(self) -> Iterator[tuple[str, Claim]]:
        return iter(self._claims.items())

    def rows(self, after: float) -> Iterator[Row]:
        """For a snapshot: those that are not void before that time (Unix time)."""
        for key, one in self._claims.items():
            if one.until < after:
                continue
            task = _NO_TASK if one.task is None else msgspec.Raw(one.task)
            terms, newest = self._state(key)
            yield Row(one.owner, NewClaim(key, one.id, one.queue, one.until, task, one.is_kept, terms), newest)
        for id_, over in self._over.items():
            if over.until >= after:
                claim = NewClaim(over.key, id_, over.queue, over.until, _NO_TASK)
                yield Row("", claim, msgspec.Raw(over.newest), is_over=True)

    def _state(self, key: str) -> tuple[Terms | None, msgspec.Raw]:
        mine = self._replaceable.get(key)
        if mine is None:
            return None, _NO_TASK
        newest = _NO_TASK if mine.newest is None else msgspec.Raw(mine.newest)
        return msgspec.structs.replace(mine.terms, due=mine.due), newest

    def turn(self, key: str, id_: str, at: float) -> Turn:
        """What is to become of a task that is about to begin, as of that time (Unix time)."""
        held, mine = self._claims.get(key), self._replaceable.get(key)
        if held is not None and mine is not None and held.id == id_ and held.until > at:
            if mine.due is not None and mine.due > at:
                return Turn(due=mine.due)
            return Turn(newest=mine.newest)
        over = self._over.get(id_)
        return Turn() if over is None else Turn(newest=over.newest)

    def is_over(self, id_: str) -> bool:
        """Whether it is a task that has its key no more, and something had replaced it."""
        return id_ in self._over

    def overdue(self, before: float) -> list[tuple[str, Claim]]:
        """The claims that have waited for their tasks since before that time."""
        return [(key, claim) for key, claim in self._pending.items() if claim.since < before]

    def apply(self, entry: Entry, now: float) -> None:
        """``now``: the reader's loop's time."""
        for key, id_ in entry.freed:
            self._end(key, id_, entry.at)
        if entry.cancelled:
            self._end_where(lambda claim: claim.id in entry.cancelled, entry.at)
        for emptied in entry.emptied:
            self._end_where(
                lambda claim, e=emptied: claim.queue == e.queue and claim.id not in e.running,  # type: ignore[misc]
                entry.at,
            )
        for new in entry.claims:
            self._claim(new, entry, now)
        for key, id_ in entry.stored:
            held = self._claims.get(key)
            if held is not None and held.id == id_:
                held.task = None
                self._pending.pop(key, None)
        for one in entry.adopted:
            held = self._pending.get(one.key)
            if held is not None and (held.id, held.owner) == (one.id, one.owner):
                held.owner, held.since = entry.by, now
        for key, id_ in entry.taken:
            self._take(key, id_, entry.at)

    def restore(self, rows: Iterable[Row], now: float) -> None:
        """Begin with what a snapshot says."""
        for row in rows:
            one = row.claim
            if row.is_over:
                self._remember(one.id, Over(one.key, sys.intern(one.queue), one.until, bytes(row.newest)))
                continue
            self._put(one, row.owner, now)
            if row.newest not in _NO_TASKS and one.key in self._replaceable:
                self._replaceable[one.key].newest = bytes(row.newest)

    def _claim(self, new: NewClaim, entry: Entry, now: float) -> None:
        held = self._claims.get(new.key)
        if held is None or (held.id != new.id and held.until <= entry.at):
            self._put(new, entry.by, now)
        elif held.id != new.id and new.terms is not None and new.terms.replaces:
            mine = self._replaceable.get(new.key)
            if mine is not None:
                mine.newest = bytes(new.task)
                mine.due = moved(mine.due, new.terms.due, mine.terms.latest)
                held.until = max(held.until, new.until)

    def _put(self, new: NewClaim, owner: str, now: float) -> None:
        task = None if new.task in _NO_TASKS else bytes(new.task)
        claim = Claim(new.id, sys.intern(new.queue), new.until, sys.intern(owner), task, new.is_kept, now)
        self._claims[new.key] = claim
        self._pending.pop(new.key, None)
        if claim.task is not None:
            self._pending[new.key] = claim
        self._replaceable.pop(new.key, None)
        if new.terms is not None:
            self._replaceable[new.key] = Replaceable(new.terms, new.terms.due)

    def _take(self, key: str, id_: str, at: float) -> None:
        mine = self._replaceable.get(key)
        if mine is not None and mine.terms.until_taken and self.turn(key, id_, at).due is None:
            self._free(key, id_)

    def _end(self, key: str, id_: str, at: float) -> None:
        self._free(key, id_)
        over = self._over.get(id_)
        if over is not None:
            over.until = at + REMEMBERED
            self._remember(id_, over)
        while self._forgotten and self._forgotten[0][0] < at:
            until, forgotten = heapq.heappop(self._forgotten)
            if forgotten in self._over and self._over[forgotten].until == until:
                del self._over[forgotten]

    def _remember(self, id_: str, over: Over) -> None:
        self._over[id_] = over
        heapq.heappush(self._forgotten, (over.until, id_))

    def _free(self, key: str, id_: str) -> None:
        held = self._claims.get(key)
        if held is None or id_ not in (held.id, ""):
            return
        del self._claims[key]
        self._pending.pop(key, None)
        mine = self._replaceable.pop(key, None)
        if mine is not None and mine.newest is not None:
            self._remember(held.id, Over(key, held.queue, held.until, mine.newest))

    def _end_where(self, is_meant: Callable[[Claim], bool], at: float) -> None:
        for key, claim in [
            (key, claim) for key, claim in self._claims.items() if not claim.is_kept and is_meant(claim)
        ]:
            self._end(key, claim.id, at)


class History:
    """What one reader has read. ``applied``: called with each entry when it is part of what the holders say."""

    def __init__(self, applied: Callable[[Entry], None]) -> None:
        self._applied = applied
        self.begin(0)

    def begin(self, base: int) -> None:
        """Read anew: from an offset behind which a snapshot comes, or, with 0, from the first entry."""
        self.holders = Holders()
        #: Where who comes later can begin, and about how much there is to read from there.
        self.base = base
        self.weight = 0
        #: What came before the snapshot did; None: nothing is waited for.
        self._held_back: list[tuple[int, Entry]] | None = [] if base else None
        self._parts: dict[str, dict[int, list[Row]]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the holders are known."""
        return self._held_back is None

    def read(self, offset: int, entry: Entry, now: float, size: int = 0) -> None:
        """``now``: the reader's loop's time. ``size``: of the entry (bytes)."""
        self.weight += entry.weight + size // 1024
        if self._held_back is None:
            self._apply(entry, now)
        else:
            self._held_back.append((offset, entry))
        if entry.snapshot is not None:
            self._take(entry.snapshot, now)

    def _take(self, part: Snapshot, now: float) -> None:
        parts = self._parts.setdefault(part.token, {})
        parts[part.part] = part.rows if self._held_back is not None else []
        if len(parts) < part.parts:
            return
        del self._parts[part.token]
        if self._held_back is None:
            if part.upto >= self.base:
                self.base, self.weight = part.upto + 1, 0
        elif part.upto == self.base - 1:
            held_back, self._held_back = self._held_back, None
            for rows in parts.values():
                self.holders.restore(rows, now)
            for offset, entry in held_back:
                if offset > part.upto:
                    self._apply(entry, now)

    def _apply(self, entry: Entry, now: float) -> None:
        self.holders.apply(entry, now)
        self._applied(entry)
