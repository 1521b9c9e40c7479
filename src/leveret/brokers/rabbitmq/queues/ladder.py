"""Which delay queue a task takes: few that every task queue has, and a closer one where the few would cost too much."""

from __future__ import annotations

from leveret.brokers.rabbitmq.queues.topology import FEW_STEPS, delay_step

#: A step that so many tasks a minute of one program would take is made: what they hop for want of it costs a worker and
#: the broker a few milliseconds a second, which is more than one more queue costs.
BUSY = 600
_MINUTE = 60.0


class Ladder:
    """The steps of one task queue: those that are there, as far as this program knows, and how often one was missed."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        #: By step: since when (seconds of that clock), and how often.
        self._missed: dict[int, tuple[float, int]] = {}

    def step(self, remaining: float, now: float | None) -> int | None:
        """For a task that is due in so many seconds; it may be one that is to be made first. None: it needs none.

        ``now``: seconds of a clock that only grows; None for a task that was asked for before.
        """
        closest = delay_step(remaining)
        if closest is None or closest in self.steps or closest in FEW_STEPS or self._is_busy(closest, now):
            return closest
        return max(step for step in (*FEW_STEPS, *self.steps) if step < closest)

    def _is_busy(self, step: int, now: float | None) -> bool:
        """Note that the step is missed; whether that is so often that it pays to make it."""
        since, count = self._missed.get(step, (0.0, 0))
        if now is not None:
            since, count = (since, count + 1) if now - since <= _MINUTE else (now, 1)
            self._missed[step] = (since, count)
        return count >= BUSY
