"""The entries of the claims log, and what they add up to: who has which key. Values and pure rules, no I/O.

Every program that reads the log applies the same entries in the same order, so all come to the same holders. Nothing
here goes by a clock of the reader's.
"""

from __future__ import annotations

import heapq
import sys
from contextlib import suppress
from functools import partial
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
_NO_TASK = msgspec.Raw(b"null")
_NO_TASKS = (_NO_TASK, msgspec.Raw())


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """Of a claim whose task later claims of the key may replace."""

    #: It replaces the task of the claim that is there, instead of giving way to it.
    replaces: bool = False
    #: When its task is due, and later than when no other claim makes it due (Unix time).
    due: float | None = None
    latest: float | None = None
    #: The key is free when the task is taken.
    until_taken: bool = False


class AnotherKey(msgspec.Struct, frozen=True, array_like=True):
    """A key that a claim is for besides its first one."""

    key: str
    until: float
    #: See `NewClaim`.
    kept_until: float = 0.0


class NewClaim(msgspec.Struct, frozen=True, array_like=True):
    """Somebody is about to store a task with a key, or several, if no other has any of them."""

    key: str
    id: str
    queue: str
    #: The key is free from then on, whatever was lost (Unix time).
    until: float
    #: The whole task, for whoever stores it when the claimer has died. Others do not decode it.
    task: msgspec.Raw = msgspec.Raw()
    #: Only ``until`` ends it, not the task.
    is_kept: bool = False
    #: What tells the task from another one with the same id; empty: nothing needs to.
    token: str = ""
    #: The key is not free before then, though the task has ended (Unix time).
    kept_until: float = 0.0
    more: tuple[AnotherKey, ...] = ()
    #: The task is a dead letter, and has the key still.
    is_dead: bool = False
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
    #: The dead letters too.
    with_dead: bool = False


class Row(msgspec.Struct, frozen=True, array_like=True):
    """A claim in a snapshot; without its task if that is stored."""

    owner: str
    claim: NewClaim
    #: What has replaced its task.
    newest: msgspec.Raw = _NO_TASK
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
    #: Keys that are free, with the ids, or the tokens, of the tasks that had them.
    freed: list[tuple[str, str]] = []
    #: Ids that producers chose, as keys, with the tokens of their tasks, which have ended: dead letters, which keep
    #: them (true), or not.
    ended: list[tuple[str, str, bool]] = []
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
    keys = [*(one.key for one in claims), *(more.key for one in claims for more in one.more)]
    if all(is_name(one.id) and is_name(one.queue) for one in claims) and all(fits(key, MAX_UNIQUE_KEY) for key in keys):
        return entry
    return None


class Claim(msgspec.Struct, gc=False):
    """A key that is taken. A program may hold a hundred thousand of these."""

    #: As a number, if it is one of Leveret's: that takes half as much memory.
    _id: int | str
    queue: str
    until: float
    #: The program that stores its task, or has stored it.
    owner: str
    is_kept: bool = False
    token: str = ""
    kept_until: float = 0.0
    is_dead: bool = False

    @classmethod
    def of(cls, new: NewClaim, owner: str) -> Claim:
        return cls(
            *(_packed(new.id), sys.intern(new.queue), new.until, sys.intern(owner), new.is_kept),
            *(new.token, new.kept_until, new.is_dead),
        )

    @property
    def mark(self) -> str:
        """What tells its task from all others."""
        return self.token or self.id

    @property
    def id(self) -> str:
        return self._id if isinstance(self._id, str) else _ID % self._id


_ID = "%032x"


def _packed(id_: str) -> int | str:
    with suppress(ValueError):
        if _ID % (number := int(id_, 16)) == id_:
            return number
    return id_


class Pending(msgspec.Struct, gc=False):
    """A claim whose task is not known to be stored."""

    claim: Claim
    task: bytes
    #: When the reader got to know that it is to be stored (the reader's loop's time).
    since: float

    def envelope(self) -> Envelope | None:
        """The task; None: what is there is no task of that claim."""
        found = decoded(_decode_task, self.task)
        claim = self.claim
        return found if found is not None and (found.id, found.queue) == (claim.id, claim.queue) else None


class Replaceable(msgspec.Struct, gc=False):
    """What later claims have made of a claim's task."""

    terms: Terms
    due: float | None
    #: None: nothing has replaced it.
    newest: bytes | None = None


class Over(msgspec.Struct, gc=False):
    """A task that has its key no more, and runs, or may run, with what had replaced it."""

    key: str
    id: str
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
        self._pending: dict[str, Pending] = {}
        self._replaceable: dict[str, Replaceable] = {}
        #: By what tells the task from all others.
        self._over: dict[str, Over] = {}
        #: A heap: until when each of them is remembered.
        self._forgotten: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._claims)

    def get(self, key: str) -> Claim | None:
        return self._claims.get(key)

    def pending(self, key: str) -> Pending | None:
        return self._pending.get(key)

    def items(self) -> Iterator[tuple[str, Claim]]:
        return iter(self._claims.items())

    def rows(self, after: float) -> Iterator[Row]:
        """For a snapshot: those that are not void before that time (Unix time)."""
        for key, one in self._claims.items():
            if one.until < after:
                continue
            waiting = self._pending.get(key)
            task = _NO_TASK if waiting is None else msgspec.Raw(waiting.task)
            terms, newest = self._state(key)
            new = NewClaim(key, one.id, one.queue, one.until, task, one.is_kept, one.token, one.kept_until, terms=terms)
            yield Row(one.owner, msgspec.structs.replace(new, is_dead=True) if one.is_dead else new, newest)
        for mark, over in self._over.items():
            if over.until >= after:
                token = "" if mark == over.id else mark
                claim = NewClaim(over.key, over.id, over.queue, over.until, _NO_TASK, token=token)
                yield Row("", claim, msgspec.Raw(over.newest), is_over=True)

    def _state(self, key: str) -> tuple[Terms | None, msgspec.Raw]:
        mine = self._replaceable.get(key)
        if mine is None:
            return None, _NO_TASK
        newest = _NO_TASK if mine.newest is None else msgspec.Raw(mine.newest)
        return msgspec.structs.replace(mine.terms, due=mine.due), newest

    def turn(self, key: str, mark: str, at: float) -> Turn:
        """What is to become of a task that is about to begin, as of that time (Unix time)."""
        held, mine = self._claims.get(key), self._replaceable.get(key)
        if held is not None and mine is not None and held.mark == mark and held.until > at:
            if mine.due is not None and mine.due > at:
                return Turn(due=mine.due)
            return Turn(newest=mine.newest)
        over = self._over.get(mark)
        return Turn() if over is None else Turn(newest=over.newest)

    def is_over(self, mark: str) -> bool:
        """Whether it is a task that has its key no more, and something had replaced it."""
        return mark in self._over

    def overdue(self, before: float) -> list[tuple[str, Pending]]:
        """The claims that have waited for their tasks since before that time."""
        return [(key, pending) for key, pending in self._pending.items() if pending.since < before]

    def apply(self, entry: Entry, now: float) -> None:
        """``now``: the reader's loop's time."""
        for key, id_ in entry.freed:
            self._free(key, id_)
            self._remember_from(id_, entry.at)
        for key, mark, is_dead in entry.ended:
            self._ended(key, mark, entry.at, is_dead=is_dead)
        if entry.cancelled:
            self._end_where(lambda claim: claim.id in entry.cancelled and not claim.is_dead, entry.at)
        for emptied in entry.emptied:
            self._end_where(partial(_is_gone, emptied), entry.at)
        for new in entry.claims:
            self._claim(new, entry, now)
        for key, mark in entry.stored:
            self._stored(key, mark)
        for one in entry.adopted:
            pending = self._pending.get(one.key)
            if pending is not None and (pending.claim.id, pending.claim.owner) == (one.id, one.owner):
                pending.claim.owner, pending.since = entry.by, now
        for key, mark in entry.taken:
            self._take(key, mark, entry.at)

    def restore(self, rows: Iterable[Row], now: float) -> None:
        """Begin with what a snapshot says."""
        for row in rows:
            one = row.claim
            if row.is_over:
                over = Over(one.key, one.id, sys.intern(one.queue), one.until, bytes(row.newest))
                self._remember(one.token or one.id, over)
                continue
            self._put(one, row.owner, now)
            if row.newest not in _NO_TASKS and one.key in self._replaceable:
                self._replaceable[one.key].newest = bytes(row.newest)

    def _claim(self, new: NewClaim, entry: Entry, now: float) -> None:
        """All of its keys, or none. Those that it has already stay as they are."""
        mark = new.token or new.id
        wanted = []
        for one in (new, *(_alone(new, more) for more in new.more)) if new.more else (new,):
            held = self._claims.get(one.key)
            if held is None or held.mark != mark:
                if held is not None and held.until > entry.at:
                    if one is new:
                        self._replace(new, held)
                    return
                wanted.append(one)
            else:
                held.is_dead = False  # it is about to live again
        for number, one in enumerate(wanted):
            # The task is to be stored once.
            self._put(msgspec.structs.replace(one, task=_NO_TASK) if number else one, entry.by, now)

    def _replace(self, new: NewClaim, held: Claim) -> None:
        mine = self._replaceable.get(new.key)
        if mine is not None and new.terms is not None and new.terms.replaces:
            mine.newest = bytes(new.task)
            mine.due = moved(mine.due, new.terms.due, mine.terms.latest)
            held.until = max(held.until, new.until)

    def _put(self, new: NewClaim, owner: str, now: float) -> None:
        claim = self._claims[new.key] = Claim.of(new, owner)
        self._pending.pop(new.key, None)
        if new.task not in _NO_TASKS:
            self._pending[new.key] = Pending(claim, bytes(new.task), now)
        self._replaceable.pop(new.key, None)
        if new.terms is not None:
            self._replaceable[new.key] = Replaceable(new.terms, new.terms.due)

    def _take(self, key: str, mark: str, at: float) -> None:
        held, mine = self._claims.get(key), self._replaceable.get(key)
        if held is None or mine is None or held.mark != mark or not mine.terms.until_taken:
            return
        if self.turn(key, mark, at).due is None:
            self._drop(key, held)

    def _remember_from(self, mark: str, at: float) -> None:
        """A task has ended: what had replaced it is known for a while from then on."""
        over = self._over.get(mark)
        if over is not None:
            over.until = at + REMEMBERED
            self._remember(mark, over)
        while self._forgotten and self._forgotten[0][0] < at:
            until, forgotten = heapq.heappop(self._forgotten)
            if forgotten in self._over and self._over[forgotten].until == until:
                del self._over[forgotten]

    def _remember(self, mark: str, over: Over) -> None:
        self._over[mark] = over
        heapq.heappush(self._forgotten, (over.until, mark))

    def _free(self, key: str, id_: str) -> None:
        """``id_``: the task's, or its token; empty: whoever has the key."""
        held = self._claims.get(key)
        if held is not None and id_ in (held.id, held.token, ""):
            self._drop(key, held)

    def _stored(self, key: str, mark: str) -> None:
        held = self._claims.get(key)
        if held is not None and held.mark == mark:
            self._pending.pop(key, None)

    def _ended(self, key: str, mark: str, at: float, *, is_dead: bool) -> None:
        held = self._claims.get(key)
        if held is not None and held.mark == mark:
            held.is_dead = is_dead
            if not is_dead:
                self._end(key, held, at)

    def _end(self, key: str, held: Claim, at: float) -> None:
        """Its task has ended, which may not be all that there is to wait for."""
        if held.kept_until > at:
            held.until, held.is_kept = held.kept_until, True
            self._pending.pop(key, None)
        else:
            self._drop(key, held)
        self._remember_from(held.mark, at)

    def _drop(self, key: str, held: Claim) -> None:
        del self._claims[key]
        self._pending.pop(key, None)
        mine = self._replaceable.pop(key, None)
        if mine is not None and mine.newest is not None:
            self._remember(held.mark, Over(key, held.id, held.queue, held.until, mine.newest))

    def _end_where(self, is_meant: Callable[[Claim], bool], at: float) -> None:
        for key, claim in [
            (key, claim) for key, claim in self._claims.items() if not claim.is_kept and is_meant(claim)
        ]:
            self._end(key, claim, at)


def _is_gone(emptied: Emptied, claim: Claim) -> bool:
    return claim.queue == emptied.queue and claim.id not in emptied.running and (emptied.with_dead or not claim.is_dead)


def _alone(new: NewClaim, more: AnotherKey) -> NewClaim:
    """The claim of another key by itself."""
    return NewClaim(more.key, new.id, new.queue, more.until, new.task, token=new.token, kept_until=more.kept_until)


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
        #: Snapshots of which only some parts have come: which, and what they say.
        self._begun: dict[str, tuple[set[int], Holders]] = {}

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
            # Its rows are taken now: those of all parts would be more than what they come to.
            self._held_back.append((offset, msgspec.structs.replace(entry, snapshot=None)))
        if entry.snapshot is not None:
            self._take(entry.snapshot, now)

    def _take(self, part: Snapshot, now: float) -> None:
        parts, holders = self._begun.setdefault(part.token, (set(), Holders()))
        parts.add(part.part)
        if self._held_back is not None:
            holders.restore(part.rows, now)
        if len(parts) < part.parts:
            return
        del self._begun[part.token]
        if self._held_back is None:
            if part.upto >= self.base:
                self.base, self.weight = part.upto + 1, 0
        elif part.upto == self.base - 1:
            held_back, self._held_back = self._held_back, None
            self.holders = holders
            self._begun = {token: (parts, Holders()) for token, (parts, _) in self._begun.items()}
            for offset, entry in held_back:
                if offset > part.upto:
                    self._apply(entry, now)

    def _apply(self, entry: Entry, now: float) -> None:
        self.holders.apply(entry, now)
        self._applied(entry)
