"""What happens to a cluster of three nodes, and a quorum queue with a replica on each."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from chaos.app import QUEUE
from chaos.faults.fault import RABBITMQ, Fault
from tests.support.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.stage import Stage
    from tests.support.nodes import Node

_HEARTBEAT = 2


def _cluster(stage: Stage) -> Cluster:
    timeout = stage.profile.disconnected
    known = stage.target.version == "4" and timeout is not None
    return Cluster(stage.target.version, config={"consumer_disconnected_timeout": timeout} if known else {})


def leader_killed(stage: Stage) -> None:
    """The next leader is elected by the two that are left; the fault does not end."""
    with _cluster(stage) as cluster:
        url = f"{cluster.url}?heartbeat={_HEARTBEAT}"
        stage.url = url
        with stage.busy():
            leader = cluster.leader(QUEUE)
            stage.pause()
            leader.kill()
            stage.fault_ended()


def partition(stage: Stage) -> None:
    """The leader's node sees neither of the other two, nor they it; later it does again."""
    with _cluster(stage) as cluster:
        url = f"{cluster.url}?heartbeat={_HEARTBEAT}"
        stage.url = url
        with stage.busy():
            leader = cluster.leader(QUEUE)
            stage.pause()
            cut = time.time()
            cluster.cut_off(leader)
            time.sleep(stage.profile.outage)
            stage.book.read()
            first = stage.book.first_start(cut + 1.0)
            cluster.rejoin(leader)
            stage.fault_ended()
            cluster.wait_for_running(3, leader)
            went_on = "never" if first is None else f"{first - cut:.1f} s after it began"
            stage.note = f"work went on {went_on}"


def storm(stage: Stage) -> None:
    """One fault after another, in an order that the seed decides, while tasks are retried, delayed and waited for."""
    stage.is_mixed = True
    with _cluster(stage) as cluster:
        stage.url = f"{cluster.url}?heartbeat={_HEARTBEAT}"
        with stage.busy(workers=3):
            for _ in range(stage.profile.rounds):
                faults: list[Callable[[Stage, Cluster, Node], None]]
                faults = [_kill_worker, _freeze_worker, _kill_node, _freeze_node, _cut_node_off]
                stage.chance.shuffle(faults)
                for fault in faults:
                    stage.pause()
                    fault(stage, cluster, stage.chance.choice(cluster.nodes))
                    stage.fault_ended()
        stage.note = stage.results()


def _kill_worker(stage: Stage, *_: object) -> None:
    stage.workers.pop(stage.chance.randrange(len(stage.workers))).kill_group()
    stage.add_worker()


def _freeze_worker(stage: Stage, *_: object) -> None:
    victim = stage.chance.choice(stage.workers)
    victim.signal(signal.SIGSTOP)
    time.sleep(stage.profile.outage)
    victim.signal(signal.SIGCONT)


def _kill_node(stage: Stage, cluster: Cluster, node: Node) -> None:
    node.kill()
    stage.pause()
    node.start()
    node.wait()
    _wait_for_majority(cluster, node)


def _freeze_node(stage: Stage, cluster: Cluster, node: Node) -> None:
    node.pause()
    try:
        time.sleep(stage.profile.outage)
    finally:
        node.resume()
    _wait_for_majority(cluster, node)


def _cut_node_off(stage: Stage, cluster: Cluster, node: Node) -> None:
    cluster.cut_off(node)
    time.sleep(stage.profile.outage)
    cluster.rejoin(node)
    _wait_for_majority(cluster, node)


def _wait_for_majority(cluster: Cluster, node: Node) -> None:
    """The next fault may take it if this one is not over."""
    cluster.wait_for_running(len(cluster.nodes), node)


FAULTS = (
    Fault("leader-killed", "three nodes; kill -9 of the queue's leader", leader_killed, RABBITMQ),
    Fault("partition", "three nodes; the queue's leader is cut off from the others", partition, RABBITMQ),
    Fault("storm", "three nodes; nodes and workers killed, frozen, cut off in turn", storm, RABBITMQ),
)
