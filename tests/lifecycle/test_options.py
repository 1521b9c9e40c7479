"""What one enqueue says in place of its task's options, with real workers, on every broker that outlives a process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pika

from leveret import App
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.foreign import publish
from tests.support.workers import Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.model import Envelope, Header, Store
    from tests.conftest import Place
    from tests.support.nodes import Node
    from tests.support.workers import Ledger


def test_attempts_of_one_enqueue_hold_for_each_of_its_lives(place: Place, client: Client, ledger: Ledger) -> None:
    """For what raises and for what kills its process; and again when the dead letter is put back."""
    raising = client.enqueue(ledger_app.fail_always.options(max_attempts=1), "a")
    killing = client.enqueue(ledger_app.kill_the_child.options(max_attempts=2), "b")
    with Worker(place.url, ledger, "--concurrency", "1"):
        letters = {letter.envelope.id: letter for letter in client.wait_until_dead("work", 2)}
        assert letters[raising].reason == "ValueError: a; attempt 1 of 1 failed"
        assert "was killed by SIGKILL; attempt 2 of 2 failed" in letters[killing].reason
        assert (ledger.count("try a"), ledger.count("try b")) == (1, 2)
        leveret("dead", "retry", "work", raising, "--url", place.url)
        ledger.wait_for("try a", 2)
        letters = {letter.envelope.id: letter for letter in client.wait_until_dead("work", 2)}
        assert letters[raising].reason == "ValueError: a; attempt 1 of 1 failed"
    assert ledger.count("try a") == 2


def test_a_timeout_of_one_enqueue(place: Place, client: Client, ledger: Ledger) -> None:
    """Longer than the decorator's, and shorter; a plain task's child is ended for it."""
    client.enqueue(ledger_app.overrun.options(timeout=30), "long", 1.5)
    client.enqueue(ledger_app.hang.options(timeout=0.5, max_attempts=1), "short")
    with Worker(place.url, ledger):
        ledger.wait_for("end long")
        (letter,) = client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
    assert "timeout of 0.5 s" in letter.reason
    assert ledger.count("try long") == 1


def test_whether_the_result_of_one_enqueue_is_stored(place: Place, client: Client, ledger: Ledger) -> None:
    kept = client.enqueue(ledger_app.silent.options(store_result=True), "a")
    untold = client.enqueue(ledger_app.say.options(store_result=False), "b")
    with Worker(place.url, ledger):
        assert json.loads(leveret("result", kept, "--wait", "--url", place.url)) == "a"
        ledger.wait_for("said b")
        client.wait_until_empty("work")
        assert "nothing is known" in leveret("status", untold, "--url", place.url, fails=True)


def test_headers_are_there_on_every_attempt(place: Place, client: Client, ledger: Ledger) -> None:
    """Delayed, tried again after a wait, and put back after its death."""
    headers: dict[str, Header] = {"tenant": "acmé", "n": 2**40, "ratio": 0.1, "is_test": True, "nothing": None}
    id_ = client.enqueue(ledger_app.note_headers.options(headers=headers, delay=0.3, max_attempts=2, timeout=60))
    with Worker(place.url, ledger):
        client.wait_until_dead("work", 1)
        leveret("dead", "retry", "work", id_, "--url", place.url)
        ledger.wait_for("headers", 4)
        client.wait_until_dead("work", 1)
    assert [json.loads(line.removeprefix("headers ")) for line in ledger.lines_of("headers")] == [headers] * 4


def test_headers_that_an_enqueue_middleware_adds_are_there_on_every_attempt(place: Place, ledger: Ledger) -> None:
    async def with_tenant(envelopes: Sequence[Envelope], store: Store) -> None:
        await store([envelope.with_headers({"tenant": "acmé"}) for envelope in envelopes])

    app = App(place.url, enqueue_middleware=[with_tenant])
    note_headers = app.task(name="note_headers", queue="work")(lambda: None)
    note_headers.options(headers={"request": 7}, max_attempts=2).enqueue_sync()
    app.close_sync()
    with Worker(place.url, ledger):
        Client(place.url).wait_until_dead("work", 1)
    noted = [json.loads(line.removeprefix("headers ")) for line in ledger.lines_of("headers")]
    assert noted == [{"request": 7, "tenant": "acmé"}] * 2


def test_a_foreign_producer_sends_options(node: Node, ledger: Ledger) -> None:
    """In the types that its language has; what does not fit is a dead letter that says so, and is there to see."""

    def properties(id_: str, **headers: object) -> pika.BasicProperties:
        named = {f"leveret-{name.replace('_', '-')}": value for name, value in headers.items()}
        return pika.BasicProperties(type="fail_always", message_id=id_, headers=named)

    client = Client(node.url)
    messages = [
        properties("fine", max_attempts="1", timeout="60000", store_result=False),
        properties("late", timeout="soon"),
        properties("few", max_attempts=0),
        properties("odd", store_result="perhaps", max_attempts=True),
    ]
    publish(node, "work", [(one, b'{"args": ["a"]}') for one in messages])
    with Worker(node.url, ledger):
        letters = {letter.envelope.id: letter.reason for letter in client.wait_until_dead("work", 4)}
        client.wait_until_empty("work")
    assert ledger.count("try a") == 1
    assert letters["fine"] == "ValueError: a; attempt 1 of 1 failed"
    assert letters["late"].startswith("its header leveret-timeout is 'soon': it must be milliseconds, more than 0")
    assert letters["few"].startswith("its header leveret-max-attempts is 0: it must be a whole number from 1")
    assert "its header leveret-max-attempts is True" in letters["odd"]
    assert "its header leveret-store-result is 'perhaps': it must be an AMQP boolean" in letters["odd"]
