"""Three RabbitMQ nodes of one cluster on this machine, and a partition between them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from tests.support.nodes import Family, Node, new_name
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

#: Seconds. Three nodes on two busy cores.
_PATIENCE = 120.0


class Cluster:
    """Killed nodes keep their data. Queues that are declared when all three are up have a replica on each."""

    def __init__(self, version: str, *, config: Mapping[str, Any] | None = None) -> None:
        self._family = Family()
        names = [new_name() for _ in range(3)]
        settings = {
            "cluster_formation.peer_discovery_backend": "classic_config",
            **{f"cluster_formation.classic_config.nodes.{i}": name for i, name in enumerate(names, 1)},
            # What RabbitMQ's documentation advises for three nodes. Quorum queues would go on without it, but the other
            # data of a healed cluster stays split until somebody restarts a node. 4.3 has Khepri, and ignores this.
            "cluster_partition_handling": "pause_minority",
            **(config or {}),
        }
        self.nodes = [Node(version, config=settings, name=name, family=self._family) for name in names]

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            for node in self.nodes:
                node.wait()
            self.wait_for_running(3)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """All three hosts."""
        return f"amqp://guest:guest@{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}/"

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self._family.close()

    def leader(self, queue: str) -> Node:
        """The node that has the quorum queue's leader."""
        rows = self.nodes[0].queues("name", "leader")
        name = next(row["leader"] for row in rows if row["name"] == queue)
        return next(node for node in self.nodes if node.name == name)

    def others(self, node: Node) -> Sequence[Node]:
        return [other for other in self.nodes if other is not node]

    def running(self, seen_from: Node) -> set[str]:
        """The nodes that run, as one of them sees it; none, when it does not run itself (``pause_minority``)."""
        try:
            status = json.loads(seen_from.ctl("cluster_status", "--formatter", "json"))
        except RuntimeError:
            return set()
        return set(status["running_nodes"])

    def wait_for_running(self, count: int, seen_from: Node | None = None) -> None:
        node = seen_from or self.nodes[0]
        wait_until(lambda: len(self.running(node)) == count, f"{node.name} sees {count} running nodes", _PATIENCE)

    def cut_off(self, node: Node) -> None:
        """Part a node from the other two: their connections end, and a wrong cookie forbids new ones, both ways."""
        peers = _atoms(self.others(node))
        node.evaluate(
            f"[erlang:set_cookie(P, '{os.urandom(4).hex()}') || P <- {peers}], "
            f"[erlang:disconnect_node(P) || P <- {peers}]."
        )
        self.wait_for_running(2, self.others(node)[0])

    def rejoin(self, node: Node) -> None:
        """End the partition."""
        peers = _atoms(self.others(node))
        node.evaluate(
            f"[erlang:set_cookie(P, erlang:get_cookie()) || P <- {peers}], "
            f"[net_kernel:connect_node(P) || P <- {peers}]."
        )


def _atoms(nodes: Sequence[Node]) -> str:
    return f"[{', '.join(repr(node.name) for node in nodes)}]"
