"""What a worker has the broker record of tasks that change while they run."""

from __future__ import annotations

import msgspec

from leveret.executors import Manifest
from leveret.model import Envelope, Succeeded, new_id
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
            return [status.state for status in await bench.broker.statuses([envelope.id])] == ["running"]

        await until(runs, "it is said to run")
        worker.adopt(silenced(Manifest.of(bench.app), "wait"))
        bench.gate.set()
        (settled,) = await bench.wait_until_settled(1)
        assert settled.outcome == Succeeded(b"null")
    (status,) = await bench.broker.statuses([envelope.id])
    assert status.state == "succeeded"
