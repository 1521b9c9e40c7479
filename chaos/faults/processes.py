"""What happens to worker processes, on every broker."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chaos.faults.fault import Fault

if TYPE_CHECKING:
    from chaos.stage import Stage
    from tests.support.workers import Worker

#: With this, RabbitMQ gives a suspended worker up after about three seconds.
_HEARTBEAT = 1


def _victim(stage: Stage) -> Worker:
    return stage.workers.pop(stage.chance.randrange(len(stage.workers)))


def worker_killed(stage: Stage) -> None:
    with stage.busy():
        for _ in range(stage.profile.rounds):
            stage.pause()
            victim = _victim(stage)
            victim.kill()
            stage.fault_ended()
            stage.add_worker()


def group_killed(stage: Stage) -> None:
    with stage.busy():
        for _ in range(stage.profile.rounds):
            stage.pause()
            _victim(stage).kill_group()
            stage.fault_ended()
            stage.add_worker()


def child_killed(stage: Stage) -> None:
    """A child in the middle of a task. Each task of it is charged an attempt."""

    def kill_one() -> bool:
        stage.book.read()
        for pid in sorted(stage.book.running()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    with stage.busy():
        for _ in range(stage.profile.rounds):
            stage.pause()
            stage.wait_for(kill_one, "a child is in the middle of a task")
            stage.fault_ended()


def terminated(stage: Stage) -> None:
    """SIGTERM in mid-task, with time to finish and with none."""
    with stage.busy("--grace", "0"):
        for number in range(stage.profile.rounds):
            stage.wait_until_ready()  # before, it has no handler for the signal
            stage.pause()
            victim = _victim(stage)
            victim.signal(signal.SIGTERM)
            stage.fault_ended()
            assert victim.exit_code() == 0, victim.output
            stage.add_worker("--grace", str(number % 2 * 10))


def suspended(stage: Stage) -> None:
    """SIGSTOP of the worker, not of its children, for longer than the heartbeats allow; then SIGCONT."""
    url = stage.url if stage.target.node is None else f"{stage.url}?heartbeat={_HEARTBEAT}"
    with stage.busy(url=url):
        stage.pause()
        victim = stage.chance.choice(stage.workers)
        victim.signal(signal.SIGSTOP)
        time.sleep(stage.profile.outage)
        victim.signal(signal.SIGCONT)
        stage.fault_ended()


FAULTS = (
    Fault("worker-killed", "kill -9 of a worker; its children end by themselves", worker_killed),
    Fault("child-killed", "kill -9 of a child in mid-task", child_killed),
    Fault("group-killed", "kill -9 of a worker and its children", group_killed),
    Fault("terminated", "SIGTERM in mid-task, with and without time to finish", terminated),
    Fault("suspended", "SIGSTOP of a worker for longer than the heartbeat, then SIGCONT", suspended),
)
