"""What happens to a RabbitMQ node and to the connections to it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pika

from chaos.app import QUEUE, work
from chaos.faults.fault import RABBITMQ, Fault
from tests.support.nodes import Node
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.stage import Stage

#: Both sides notice a silent peer within a few seconds.
_HEARTBEAT = 1
#: What is published while its queue is being deleted may be confirmed (seconds).
_IN_FLIGHT = 0.25
_CONSUMER_TIMEOUT = (
    "[{rabbit, [{consumer_timeout, 5000}, {channel_tick_interval, 1000}, {quorum_tick_interval, 1000}]}].\n"
)
#: Seconds; more than that timeout.
_LONG_TASK = 8.0


def _node(stage: Stage) -> Node:
    assert stage.target.node is not None
    return stage.target.node


def node_killed(stage: Stage) -> None:
    node = _node(stage)
    with stage.busy():
        for _ in range(min(2, stage.profile.rounds)):
            stage.pause()
            node.restart()
            stage.fault_ended()


def results_under_load(stage: Stage) -> None:
    """Results are waited for while thousands of others are told beside them."""
    node = _node(stage)
    stage.is_mixed = True
    with stage.traffic(), stage.busy():
        for _ in range(min(2, stage.profile.rounds)):
            stage.pause(2 * stage.profile.between)
            node.restart()
            stage.fault_ended()
    stage.note += f"; {stage.results()}"


def node_stopped(stage: Stage) -> None:
    node = _node(stage)
    with stage.busy(url=f"{stage.url}?heartbeat={_HEARTBEAT}"):
        stage.pause()
        node.pause()
        try:
            time.sleep(stage.profile.stopped)
        finally:
            node.resume()
        stage.fault_ended()


@contextmanager
def _proxied(stage: Stage) -> Iterator[Proxy]:
    with Proxy(_node(stage).port) as proxy, stage.busy(url=f"{proxy.url}?heartbeat={_HEARTBEAT}"):
        stage.pause()
        yield proxy


def connection_reset(stage: Stage) -> None:
    with _proxied(stage) as proxy:
        for _ in range(stage.profile.rounds * 2):
            proxy.cut()
            stage.fault_ended()
            stage.pause()


def half_open(stage: Stage) -> None:
    with _proxied(stage) as proxy:
        proxy.swallow()
        time.sleep(max(stage.profile.outage, 3 * (_HEARTBEAT + 1) + 1))
        proxy.resume()
        stage.fault_ended()


def slow_network(stage: Stage) -> None:
    with Proxy(_node(stage).port) as proxy, stage.busy(url=proxy.url):
        proxy.slow(0.05)
        time.sleep(stage.profile.outage)
        proxy.slow(0)
        stage.fault_ended()


def memory_alarm(stage: Stage) -> None:
    node = _node(stage)
    with stage.busy():
        stage.pause()
        node.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            time.sleep(stage.profile.outage)
        finally:
            node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
        stage.fault_ended()


def disk_alarm(stage: Stage) -> None:
    node = _node(stage)
    with stage.busy():
        stage.pause()
        node.ctl("set_disk_free_limit", "1000000GB")
        try:
            time.sleep(stage.profile.outage)
        finally:
            node.ctl("set_disk_free_limit", "50MB")
        stage.fault_ended()


def queue_deleted(stage: Stage) -> None:
    """What was in the queue is gone, by the operator's will; it is declared again and work goes on."""
    connection = pika.BlockingConnection(pika.URLParameters(_node(stage).url))
    with stage.busy():
        for _ in range(min(2, stage.profile.rounds)):
            stage.pause()
            connection.channel().queue_delete(QUEUE)
            stage.fault_ended()
            deleted_by = time.time() + _IN_FLIGHT
            time.sleep(_IN_FLIGHT * 2)
            stage.book.read()
            stage.deleted.update(id_ for id_ in stage.book.undone() if stage.book.safe[id_] <= deleted_by)
            stage.wait_for(lambda: stage.fresh(deleted_by) > 0, "work goes on after the deletion")  # noqa: B023
    connection.close()
    stage.note = f"{len(stage.deleted & stage.book.undone())} deleted by the operator"


def consumer_timeout(stage: Stage) -> None:
    """Some tasks run for longer than the server lets a consumer hold them."""
    node = Node(stage.target.version, advanced=_CONSUMER_TIMEOUT)
    try:
        node.start()
        node.wait()
        stage.url = node.url
        # A long task that the server takes back in mid-run is delivered again, for as long as it is there.
        stage.must_be_empty = False
        with stage.busy():
            long = stage.put(work, [(_LONG_TASK,)] * 3)
            stage.wait_for(lambda: not stage.book.undone().intersection(long), "the long tasks were run to their end")
            stage.fault_ended()
        stage.note = f"tasks of {_LONG_TASK:g} s, a consumer timeout of 5 s"
    finally:
        stage.close()
        node.close()


FAULTS = (
    Fault("node-killed", "kill -9 of the node, and a restart", node_killed, RABBITMQ),
    Fault("results-under-load", "the same, beside thousands of other tasks and results", results_under_load, RABBITMQ),
    Fault("node-stopped", "SIGSTOP of the node for a minute, then SIGCONT", node_stopped, RABBITMQ),
    Fault("connection-reset", "TCP resets of all connections", connection_reset, RABBITMQ),
    Fault("half-open", "a network that swallows everything and tells nobody", half_open, RABBITMQ),
    Fault("slow-network", "50 ms for each piece, in each direction", slow_network, RABBITMQ),
    Fault("memory-alarm", "the node takes no publishes, then does", memory_alarm, RABBITMQ),
    Fault("disk-alarm", "the same, for want of disk", disk_alarm, RABBITMQ),
    Fault("queue-deleted", "an operator deletes the queue under its consumers", queue_deleted, RABBITMQ),
    Fault("consumer-timeout", "tasks longer than the server's consumer timeout", consumer_timeout, RABBITMQ),
)
