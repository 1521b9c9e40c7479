"""Plays faults one after another, on nodes that are started when they are first needed."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pika
import pika.exceptions

from chaos.app import QUEUE
from chaos.stage import Hung, NotPossible, Profile, Result, Stage, Target
from leveret.brokers.rabbitmq.queues.topology import dead_queue, gate_queue
from tests.support.nodes import MissingServer, Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.faults.fault import Fault

FULL = Profile(
    rounds=5,
    between=1.5,
    outage=12.0,
    stopped=60.0,
    disconnected=None,
    backlog=1_000_000,
    backlog_rabbitmq=1_000_000,
    traffic=5_000,
    scheduled=120.0,
    kills=200,
    limited=10_000,
    limited_workers=8,
    patience=90.0,
)
QUICK = Profile(
    rounds=1,
    between=0.3,
    outage=4.0,
    stopped=4.0,
    disconnected=2_000,
    backlog=20_000,
    backlog_rabbitmq=5_000,
    traffic=1_000,
    scheduled=12.0,
    kills=12,
    limited=400,
    limited_workers=3,
    patience=60.0,
)


class Nodes:
    """One node of each version, started when it is first asked for."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def get(self, version: str) -> Node:
        if version not in self._nodes:
            self._nodes[version] = Node(version)
            self._nodes[version].start()
        self._nodes[version].wait()
        return self._nodes[version]

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()


class Theatre:
    """Plays faults. ``node``: the node of a version, for all faults that need no other."""

    def __init__(self, profile: Profile, seed: int, node: Callable[[str], Node]) -> None:
        self._profile = profile
        self._seed = seed
        self._node = node

    def play(self, fault: Fault, kind: str) -> Result:
        """One fault on one broker; never raises, so that the others are played too."""
        folder = Path(tempfile.mkdtemp(prefix="leveret-chaos-"))
        keep = False
        try:
            stage = Stage(self._target(kind, folder), folder, self._profile, f"{self._seed} {fault.name} {kind}")
            result = _played(fault, stage)
            keep = result.lost > 0 or result.failed
            return msgspec.structs.replace(result, note=f"{result.note}; see {folder}") if keep else result
        except MissingServer as error:
            return Result(fault.name, kind, skipped=True, note=str(error))
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _target(self, kind: str, folder: Path) -> Target:
        if kind == "sqlite":
            return Target(kind, f"sqlite:///{folder / 'leveret.db'}")
        node = self._node(kind.removeprefix("rabbitmq-"))
        _purge(node)
        return Target(kind, node.url, node)


def _played(fault: Fault, stage: Stage) -> Result:
    try:
        fault.play(stage)
    except NotPossible as reason:
        return Result(fault.name, stage.target.kind, skipped=True, note=str(reason))
    except Hung as error:
        return msgspec.structs.replace(stage.result(fault.name), failed=True, note=str(error))
    except Exception:  # noqa: BLE001 - whatever it is, it is this line's of the table
        (stage.folder / "error.txt").write_text(traceback.format_exc())
        what = traceback.format_exc().strip().splitlines()[-1]
        return msgspec.structs.replace(stage.result(fault.name), failed=True, note=what)
    finally:
        stage.close()
    return stage.result(fault.name)


def _purge(node: Node) -> None:
    """What another fault left behind: unknown tasks, dead letters."""
    connection = pika.BlockingConnection(pika.URLParameters(node.url))
    for queue in (QUEUE, dead_queue(QUEUE), gate_queue(QUEUE)):
        channel = connection.channel()
        try:
            channel.queue_purge(queue)
        except pika.exceptions.ChannelClosedByBroker:
            continue  # there is no such queue
        channel.close()
    connection.close()
