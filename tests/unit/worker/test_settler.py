"""What a worker has the broker record of tasks that change while they run."""

from __future__ import annotations

import msgspec
import pytest

from leveret.executors import Manifest
from leveret.model import Cancelled, DeadLettered, Envelope, Outcome, Released, Retrying, Succeeded, new_id
from leveret.worker.settler import final
from tests.support.bench import Bench
from tests.support.waiting import until


def silenced(manifest: Manifest, name: str) -> Manifest:
    options = msgspec.structs.replace(manifest.tasks[name], store_result=False)
    return msgspec.structs.replace(manifest, tasks=manifest.tasks | {name: options})


async def test_one_that_becomes_silent_while_it_runs_has_an_end() -> None:
    """Its beginning was told, so its end is; a reload may have changed it meanwhile."""
    bench = Bench()
    envelope = Envelope(new_id(), "work", "wait", b'{"args":["a"]}')
    await bench.put("wait")
    await bench.broker.publish([envelope])
    async with bench.working() as worker:

        async def runs() -> bool:
            return [status.state for status in await bench.broker.statuses.read([envelope.id])] == ["running"]

        await until(runs, "it is said to run")
        worker.adopt(silenced(Manifest.of(bench.app), "wait"))
        bench.gate.set()
        (settled,) = await bench.wait_until_settled(1)
        assert settled.outcome == Succeeded(b"null")
    (status,) = await bench.broker.statuses.read([envelope.id])
    assert status.state == "succeeded"


@pytest.mark.parametrize(
    ("outcome", "becomes"),
    [
        (Succeeded(b"1"), Succeeded(b"1")),
        (Retrying("ValueError", "its lines"), DeadLettered("ValueError", "its lines")),
        (DeadLettered("it says so"), DeadLettered("it says so")),
        (Cancelled("it was told to"), Cancelled("it was told to")),
        (Released(), DeadLettered("its worker stopped before it had ended")),
    ],
)
def test_a_task_that_was_acknowledged_does_not_run_again(outcome: Outcome, becomes: Outcome) -> None:
    assert final(outcome) == becomes
