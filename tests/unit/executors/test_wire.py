"""The frames between a worker and its child: bounded, recognisable, and read in time that grows with their length."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.crossing import cross
from leveret.executors import Finished, RunRequest
from leveret.executors.wire import PIECE, BrokenFrames, FrameReader, Pipe, Run, ToChild, ToWorker, frames, runs
from leveret.model import Envelope
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1024 * 1024
HEADER = len(next(frames(b"")))
bodies = st.lists(st.binary(max_size=300) | st.integers(0, 3 * PIECE).map(bytes), max_size=5)


def sent_as(body: bytes) -> bytes:
    return b"".join(frames(body))


def feed(reader: FrameReader, data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """In pieces of those sizes, again and again."""
    batches: list[bytes] = []
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        batches += reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    return batches


@given(bodies, st.lists(st.integers(1, 1_000) | st.integers(PIECE // 2, 2 * PIECE), min_size=1, max_size=5))
def test_what_is_sent_is_read_however_it_comes(sent: list[bytes], sizes: list[int]) -> None:
    data = b"".join(map(sent_as, sent))
    if len(data) > 100 * len(sent) * max(sizes):
        sizes = [*sizes, PIECE]
    reader = FrameReader()
    assert feed(reader, data, sizes) == sent
    assert not reader.is_within


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 5 * PIECE + 7])
def test_no_frame_is_longer_than_a_piece(size: int) -> None:
    made = list(frames(bytes(size)))
    assert all(len(part) <= PIECE + HEADER for part in made)
    assert sum(map(len, made)) == size + max(1, -(-size // PIECE)) * HEADER


@pytest.mark.parametrize("stray", [b"1234", b"1", bytes(100), b"\xf1LX", b"x" * PIECE])
def test_what_is_no_frame_is_seen_at_once(stray: bytes) -> None:
    """Also when nothing comes after it. What came before it counts."""
    reader = FrameReader()
    with pytest.raises(BrokenFrames) as caught:
        reader.feed(sent_as(b"before") + stray)
    assert caught.value.batches == [b"before"]


@given(st.integers(0, 3 * PIECE), st.sampled_from([b"1234", b"\0", b"\xf1LV", b"\xf1LV.\0\0\0\0\0\0\0\0"]))
def test_what_is_written_into_a_frame_is_seen(at: int, stray: bytes) -> None:
    """At the latest when all is there, or the rest never comes; it is never taken for what was sent."""
    data = sent_as(b"a" * (2 * PIECE)) + sent_as(b"b")
    at = min(at, len(data) - HEADER - 1)
    reader = FrameReader()
    try:
        read = reader.feed(data[:at] + stray + data[at:])
    except BrokenFrames as error:
        read = list(error.batches)
    else:
        # An empty frame between two others is what it says it is.
        assert reader.is_within or stray.endswith(bytes(8))
    assert [body for body in read if body] in ([], [b"a" * (2 * PIECE)], [b"a" * (2 * PIECE), b"b"])


def test_a_beginning_is_known_as_one() -> None:
    """For those who set its rest a limit of time."""
    reader = FrameReader()
    whole = sent_as(b"abc")
    for end in range(1, len(whole)):
        assert reader.feed(whole[end - 1 : end]) == []
        assert reader.is_within
    assert reader.feed(whole[-1:]) == [b"abc"]
    assert not reader.is_within


def test_a_reader_keeps_no_more_than_a_frame() -> None:
    """Of a long batch it has the pieces, and copies none of them again for each read."""
    reader = FrameReader()
    data = sent_as(bytes(8 * PIECE))
    for at in range(0, len(data), 1_000):
        reader.feed(data[at : at + 1_000])
        assert len(reader._rest) <= PIECE + HEADER


class Ends:
    """Two pipes on the two ends of a socket pair."""

    def __init__(self) -> None:
        self.came: list[Run | Finished] = []

    async def open(self) -> tuple[Pipe[ToWorker], Pipe[ToChild]]:
        one, other = socket.socketpair()
        worker, child = await Pipe[ToWorker].open(one, ToWorker), await Pipe[ToChild].open(other, ToChild)
        worker.hear = child.hear = self._hear
        return worker, child

    def _hear(self, batch: Sequence[ToWorker | ToChild]) -> None:
        self.came += [message for message in batch if isinstance(message, (Run, Finished))]

    async def have(self, count: int) -> None:
        async def all_came() -> bool:
            return len(self.came) >= count

        await until(all_came, f"{count} messages have come")


@pytest.mark.parametrize("way", ["jobs", "results"])
async def test_a_hundred_mebibytes_cross_in_no_time(way: str) -> None:
    """Both ends take 0.3 s of the processor (``python -m benchmarks.crossing``). It was fourteen when each read copied
    all that had come before.
    """
    assert await cross(way) < 4


async def test_a_batch_is_of_use_before_all_of_it_is_there() -> None:
    """And what cannot be sent yet waits as it is, not as a copy in bytes."""
    ends = Ends()
    worker, child = await ends.open()
    first: list[int] = []

    def hear(batch: Sequence[ToChild]) -> None:
        if not first:
            first.append(worker._transport.get_write_buffer_size())
            first.append(len(worker._unsent))
        ends._hear(batch)

    child.hear = hear
    jobs = [RunRequest(key, Envelope(f"{key}", "work", "task", bytes(MIB))) for key in range(20)]
    worker.write(list(runs(jobs)))
    await ends.have(20)
    assert first[0] <= 2 * MIB
    assert first[1] >= 10
    worker.close()
    child.close()
    await asyncio.wait([worker.ended, child.ended])
