"""What is shown where there is no terminal: lines that programs can read too."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import TYPE_CHECKING

from leveret.model.printable import in_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.cli.top.figures import Figures
    from leveret.model import ScheduleRow


def length(seconds: float) -> str:
    """A time span, short."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes}m{seconds % 60:02.0f}s" if minutes < 10 else f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d"


def upcoming(schedules: Sequence[ScheduleRow], now: float) -> tuple[str, float] | None:
    """The schedule that comes next, and in how many seconds."""
    due = [(row.due, row.name) for row in schedules if row.due is not None and row.state(now) == "active"]
    moment, name = min(due, default=(0.0, ""))
    return (name, max(0.0, moment - now)) if name else None


def _schedules(figures: Figures) -> str:
    states = Counter(row.state(figures.at) for row in figures.schedules)
    following = upcoming(figures.schedules, figures.at)
    after = f" next={in_line(following[0])} in={length(following[1])}" if following else ""
    counts = f"count={len(figures.schedules)} paused={states['paused']} resting={states['resting']}"
    return f"schedules {counts}{after}"


def block(figures: Figures) -> str:
    """One look, a line for each thing."""
    lines = [dt.datetime.fromtimestamp(figures.at, dt.UTC).isoformat(timespec="seconds")]
    for one in figures.queues:
        rate = figures.rates.get(one.name)
        rates = f" in={rate.incoming:.1f}/s out={rate.outgoing:.1f}/s" if rate else ""
        lines.append(
            f"queue {in_line(one.name)} ready={one.ready} limited={one.limited} running={one.running}"
            f" delayed={one.delayed} dead={one.dead} consumers={one.consumers}{rates}{' paused' if one.paused else ''}"
        )
    if figures.schedules:
        lines.append(_schedules(figures))
    lines += [
        f"limit {in_line(one.row.name)} admitted={one.admitted} waiting={one.waiting} keys={one.keys}"
        f" state={one.row.state(figures.at)} allows={one.row.rule}"
        for one in figures.limits
    ]
    for worker in figures.workers:
        lines.append(
            f"worker {in_line(worker.name)} children={len(worker.children)} waiting={worker.waiting}"
            f" finished={worker.finished} failed={worker.failed} queues={in_line(','.join(worker.queues))}"
        )
        lines += [
            f"running {in_line(run.task or '-')} {in_line(run.id)} child={child.pid} queue={in_line(run.queue)}"
            f" attempt={run.attempt} for={length(figures.at - run.since)}"
            for child in worker.children
            for run in child.running
        ]
    lines += [
        f"failed {in_line(one.task or '-')} {in_line(one.id)} queue={in_line(one.queue)} {one.state}"
        f" attempt={one.attempt} {length(figures.at - one.at)} ago: {in_line(one.error or '')}"
        for one in figures.failures
    ]
    return "\n".join(lines)
