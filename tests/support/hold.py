"""Not collected by itself: `test_reaper` runs it in a pytest of its own, and kills that."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.nodes import Node
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    import pytest


def test_hold_a_node_and_a_worker(ledger: Ledger, request: pytest.FixtureRequest) -> None:
    """Until it is killed."""
    node = Node("4")
    request.addfinalizer(node.close)
    node.start()
    node.wait()
    Client(node.url).enqueue(ledger_app.fork_and_wait, "a")
    with Worker(node.url, ledger):
        ledger.wait_for("start a")
        Path(os.environ["HOLDING"]).touch()
        time.sleep(100)
