"""What happens to a cluster of three nodes, and a quorum queue with a replica on each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chaos.app import QUEUE
from chaos.faults.fault import RABBITMQ, Fault
from tests.support.cluster import Cluster

if TYPE_CHECKING:
    from chaos.stage import Stage

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


FAULTS = (
    Fault("leader-killed", "three nodes; kill -9 of the queue's leader", leader_killed, RABBITMQ),
    Fault("partition", "three nodes; the queue's leader is cut off from the others", partition, RABBITMQ),
)
