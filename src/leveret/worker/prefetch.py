"""How many deliveries a worker holds with ``prefetch="auto"``: what it can run, and a moment's work ahead."""

from __future__ import annotations

#: What waits in a worker is worth at most so much work: it hides the way to the broker and back (seconds).
AHEAD = 0.04
#: However short the tasks are.
MOST_AHEAD = 256
#: How often it is decided while tasks run: a slow one is noticed after so long (seconds).
TICK = 0.05


def credit(run_time: float, *, slots: int, queues: int, present: int) -> int:
    """The credit of each queue, when a task takes ``run_time`` seconds of a slot.

    It grows twofold at most, and small changes are not worth a transaction; but when nothing is to wait, nothing does.
    """
    worth = AHEAD * slots / run_time if run_time > 0 else MOST_AHEAD
    wanted = slots + int(min(worth, MOST_AHEAD) / queues)
    if wanted == slots or wanted * 2 <= present:
        return wanted
    return min(wanted, 2 * present) if wanted * 2 >= present * 3 else present


class Pace:
    """What a task takes of a slot, measured from one decision to the next (seconds)."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._began: dict[int, float] = {}
        self._used = 0.0
        self._ended = 0

    def began(self, job: int, now: float) -> None:
        self._began[job] = now

    def ended(self, job: int, now: float) -> None:
        began = self._began.pop(job, None)
        if began is not None:
            self._used += now - max(began, self._since)
            self._ended += 1

    def run_time(self, now: float) -> float | None:
        """Of the time since it was asked last. None: nothing ran.

        While none has ended it is all that they have used: at least so long does one take.
        """
        used = self._used + sum(now - max(began, self._since) for began in self._began.values())
        ended = self._ended
        self._since, self._used, self._ended = now, 0.0, 0
        return used / max(1, ended) if used or ended else None
