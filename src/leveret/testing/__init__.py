"""For people who build on Leveret: tests of an application's tasks, and the checks that every broker passes.

`under_test` and the pytest fixture ``leveret_app`` (`leveret.testing.plugin`) are for applications,
`leveret.testing.conformance` for authors of brokers.
"""

from leveret.testing.application import AppUnderTest, Enqueued, Expectation, Run, TasksFailed, under_test
from leveret.testing.clock import ManualClock
from leveret.testing.faulty import Faults

__all__ = ["AppUnderTest", "Enqueued", "Expectation", "Faults", "ManualClock", "Run", "TasksFailed", "under_test"]
