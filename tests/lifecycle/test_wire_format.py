"""What docs/wire-format.md says, tried from outside: its examples are run, and other clients publish."""

from __future__ import annotations

import gzip
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pika
import pytest

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.foreign import Raw, headers_in, publish, table, text
from tests.support.foreign import time as timestamp
from tests.support.workers import Worker, leveret

if TYPE_CHECKING:
    from tests.support.nodes import Node
    from tests.support.workers import Ledger

PAGE = Path(__file__).parents[2] / "docs/wire-format.md"
HOUR = 3600


def example(heading: str, node: Node) -> str:
    """The program below a heading of the page, for a node of the tests'."""
    code: str = re.findall(rf"^### {heading}$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    assert 'URL = "amqp://guest:guest@localhost/"' in code
    return code.replace("amqp://guest:guest@localhost/", node.url)


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_became_of_a_task_is_read_by_another_client(node: Node, ledger: Ledger) -> None:
    client = Client(node.url)
    done, dead = client.enqueue(ledger_app.measure, 3, 4), client.enqueue(ledger_app.give_up, "a")
    with Worker(node.url, ledger):
        client.wait_until_dead("work", 1)
        leveret("result", done, "--wait", "--url", node.url)
    reader = example("What became of a task, with aio-pika", node)
    told = run(reader, done).splitlines()
    assert (told[0], told[-1]) == ("queued None", "succeeded {'width': 3, 'height': 4}")
    states = run(reader, dead).splitlines()
    assert states[-1].startswith("dead ")
    assert "gave up" in states[-1]


def test_each_message_of_the_streams_has_its_version(node: Node, ledger: Ledger) -> None:
    """The page tells readers to ignore other versions, so it must be written though it is the only one."""
    client = Client(node.url)
    done = client.enqueue(ledger_app.measure, 3, 4)
    with Worker(node.url, ledger):
        leveret("result", done, "--wait", "--url", node.url)
        later = client.enqueue(ledger_app.say.options(delay=HOUR), "later")
        leveret("cancel", later, "--url", node.url)
    for stream in ("leveret.events", "leveret.cancelled"):
        messages = in_stream(node, stream)
        assert messages
        assert {message["v"] for message in messages} == {1}
    documented = set(re.findall(r"`(\w+)`", PAGE.read_text().partition("## What became of a task")[2]))
    members = {
        member for message in in_stream(node, "leveret.events") for one in message.get("updates", []) for member in one
    }
    assert members <= documented


def in_stream(node: Node, stream: str) -> list[dict[str, Any]]:
    """All that is in a stream."""
    messages = []
    with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=100)
        parts = channel.consume(stream, arguments={"x-stream-offset": "first"}, inactivity_timeout=2)
        for method, _, body in parts:
            if method is None:
                break
            channel.basic_ack(method.delivery_tag)
            messages.append(json.loads(body))
    return messages


def named(task: str, id_: str, encoding: str) -> Any:
    return pika.BasicProperties(type=task, message_id=id_, content_encoding=encoding)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_call_runs(node: Node, ledger: Ledger, encoding: str) -> None:
    """Each attempt, and put back after it died: the copies are compressed as the first message was."""
    client = Client(node.url)
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    messages = [
        (named("say", "m-0", encoding), compress(b'{"args": ["a"]}')),
        (
            pika.BasicProperties(type="fail_always", message_id="m-1", content_encoding=encoding),
            compress(b'{"args": ["b"]}'),
        ),
        (pika.BasicProperties(type="say", message_id="m-2", content_encoding=encoding), b'{"args": ["c"]}'),
    ]
    publish(node, "work", messages)
    with Worker(node.url, ledger):
        ledger.wait_for("said a")
        letters = {letter.envelope.id: letter for letter in client.wait_until_dead("work", 2)}
        assert ledger.count("try b") == 3
        assert f"content_encoding is '{encoding}', and the body is not compressed so" in letters["m-2"].reason
        leveret("dead", "retry", "work", "m-1", "--url", node.url)
        ledger.wait_for("try b", 6)


def dated(id_: bytes, header: bytes, value: bytes) -> Raw:
    return Raw(type=b"say", message_id=id_, headers=table({header: value}))


def test_a_time_in_another_type_is_understood(node: Node, ledger: Ledger) -> None:
    """It counted as missing: what was due in an hour ran at once, and what should expire never did."""
    client = Client(node.url)
    soon = time.time() + HOUR
    milliseconds = b"%d" % (soon * 1_000)
    due = {
        b"text": text(milliseconds),
        b"timestamp": timestamp(int(soon)),
        b"timestamp in milliseconds": timestamp(int(soon * 1_000)),
        b"double": b"d" + struct.pack(">d", soon * 1_000),
    }
    expired = {b"expired text": text(b"1700000000000"), b"expired time": timestamp(1_700_000_000)}
    later = [(dated(name, b"leveret-due", value), b'{"args": ["later"]}') for name, value in due.items()]
    late = [(dated(name, b"leveret-expires-at", value), b'{"args": ["late"]}') for name, value in expired.items()]
    wrong = [
        (dated(header + b": " + name, header, value), b'{"args": ["wrong"]}')
        for header in (b"leveret-due", b"leveret-expires-at")
        for name, value in {b"words": text(b"tomorrow"), b"seconds": text(b"%d" % soon), b"true": b"t\x01"}.items()
    ]
    publish(node, "work", [*later, *late, *wrong])
    client.enqueue(ledger_app.say, "at last")
    with Worker(node.url, ledger):
        ledger.wait_for("said at last")
        letters = {letter.envelope.id: letter.reason for letter in client.wait_until_dead("work", 8)}
        client.wait_until_empty("work")
    assert ledger.lines() == ["said at last"]
    for name, reason in letters.items():
        assert ("it expired" if name.startswith("expired") else f"its header {name.split(':')[0]} is ") in reason
    assert client.stats("work").delayed == len(later)
    waiting = headers_in(node, "work.delay.512000")  # the longest of those that every queue has
    assert sorted(one[b"leveret-due"] for one in waiting) == sorted(due.values())
