"""What a task costs on its way: calls of functions are counted, never time, and the bounds are generous."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import leveret
from leveret import App
from leveret.brokers.rabbitmq.amqp.frame_reader import FrameReader, Incoming
from leveret.brokers.rabbitmq.queues.codec import received
from leveret.brokers.sqlite.rows import insertion
from leveret.client.payload import Signature
from leveret.executors import Finished, RunRequest
from leveret.executors.attempt import JobRunner, Runner
from leveret.model import Envelope
from leveret.model.printable import in_json, printable
from tests.unit.brokers.rabbitmq.amqp.test_frame_reader import FAREWELL, TAKEN, message
from tests.unit.brokers.rabbitmq.queues.test_codec import LEASE

if TYPE_CHECKING:
    from collections.abc import Callable

TASKS = 200


def calls(work: Callable[[], object]) -> int:
    """How many calls of Python functions and of built-in ones that takes."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


async def test_to_read_a_delivery_takes_few_calls() -> None:
    """About 35; by way of aiormq it was some hundreds."""
    source = asyncio.StreamReader()
    frames = FrameReader(source)
    deliveries: list[object] = []

    def take(taken: list[Incoming]) -> None:
        deliveries.extend(received(one, "work", LEASE) for one in taken)

    frames.take_deliveries(TAKEN, take)
    source.feed_data(b"".join(message(tag, b"{}") for tag in range(1, TASKS + 1)) + FAREWELL)
    reading = frames.readexactly(1)

    def read() -> None:
        try:
            reading.send(None)
        except StopIteration:
            return

    assert calls(read) < 80 * TASKS
    assert len(deliveries) == TASKS


def test_to_run_a_task_takes_few_calls() -> None:
    """About 75, from the job to its report."""
    app = App("memory://")

    @app.task(queue="work")
    async def noop(number: int) -> None: ...

    async def run() -> None:
        crew = JobRunner(Runner(app, concurrency=TASKS), concurrency=TASKS)
        ended: list[Any] = []
        crew.report_to(lambda reports: ended.extend(one for one in reports if isinstance(one, Finished)))
        crew.submit([RunRequest(key, Envelope(f"{key}", "work", "noop", b'{"args": [1]}')) for key in range(TASKS)])
        while len(ended) < TASKS:  # noqa: ASYNC110 - each turn is part of what is counted
            await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    try:
        assert calls(lambda: loop.run_until_complete(run())) < 150 * TASKS
    finally:
        loop.close()


def test_to_enqueue_a_task_among_many_takes_few_calls() -> None:
    """About 11 for the task and its handle, and 1 for its row: what a call's tasks have in common is found once."""
    app = App("memory://")

    @app.task
    async def say(text: str) -> None: ...

    ids = [str(number) for number in range(TASKS)]
    arguments: list[Any] = [(("hello",), {})] * TASKS
    envelopes = say._envelopes(ids, arguments)
    assert calls(lambda: say._handles(say._envelopes(ids, arguments))) < 15 * TASKS
    assert calls(lambda: insertion(envelopes, {"default": 1}, now=1.0, lanes={})) < 1.5 * TASKS


def test_arguments_by_position_need_no_binding() -> None:
    def wide(number: int, text: str = "x", *more: int, flag: bool = False) -> None: ...
    def unhashable(items: list[int] = []) -> None: ...  # noqa: B006
    def keyword(number: int, *, flag: bool) -> None: ...

    signature = Signature(wide, "wide")
    assert signature.decode(b'{"args": [1, "a"]}') == ((1, "a"), {})
    assert signature.decode(b'{"args": [1, "a", 2]}') == ((1, "a", 2), {})
    assert Signature(unhashable, "unhashable").decode(b'{"args": [[1]]}') == (([1],), {})
    for function, body in ((wide, b'{"args": []}'), (wide, b'{"args": ["x"]}'), (keyword, b'{"args": [1]}')):
        try:
            Signature(function, "task").decode(body)
        except leveret.InvalidArguments:
            continue
        raise AssertionError(f"{function.__name__} took {body!r}")


def test_text_is_made_harmless_by_its_characters_and_not_by_its_length() -> None:
    """`leveret dead list --json` of 150 large letters took a second and a half for it, on a quiet machine."""
    text = '{\n"body": "é\u202e\x9b\\n"}\n' * 10_000
    harmless = text.replace("\u202e", "\\u202e")
    for function, expected in (
        (in_json, harmless.replace("\x9b", "\\u009b")),
        (printable, harmless.replace("\x9b", "\\x9b")),
    ):
        said: list[str] = []

        def work(function: Callable[[str], str] = function, said: list[str] = said) -> None:
            said.append(function(text))

        # One for each that is rewritten.
        assert calls(work) < 1_000
        assert said == [expected]


def test_the_package_imports_what_is_used() -> None:
    code = "import sys, leveret; sys.exit(any(name in sys.modules for name in ('asyncio', 'msgspec', 'logging')))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(leveret, name) is not None for name in leveret.__all__)
    assert set(leveret.__all__) <= set(dir(leveret))
