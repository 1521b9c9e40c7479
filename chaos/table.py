"""The results as a Markdown table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.stage import Result

_HEAD = (
    "broker",
    "fault",
    "tasks",
    "lost",
    "doubled",
    "dead",
    "unknown",
    "recovered (s)",
    "all done (s)",
    "longest wait (s)",
)


def brief(result: Result) -> str:
    """One line for whoever watches."""
    if result.skipped:
        return f"skipped: {result.note}"
    if result.failed:
        return f"FAILED: {result.note}"
    words = f"{result.tasks} tasks, {result.lost} lost, {result.doubled} doubled"
    if result.lost:
        return f"{words}. FAILED: {result.note}"
    return f"{words}, recovered in {_seconds(result.recovered)} s"


def table(results: Sequence[Result]) -> str:
    rows = [_HEAD, tuple("-" * len(name) for name in _HEAD), *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def legend() -> str:
    return """\
tasks: those whose `enqueue` returned. lost: neither done nor a dead letter at the end. doubled: begun more than once.
dead: kept as a dead letter. unknown: `enqueue` raised, so stored or not; they are in no other column.
recovered: from the end of the fault (its moment, where it has no end; the last one, where it is repeated) to the first
task that began after it. all done: from there until all that was stored by then was done. longest wait: of any task,
from the moment when it was stored to the end of its first whole run, outage and all."""


def _row(result: Result) -> tuple[str, ...]:
    head = (result.broker, result.fault)
    if result.skipped:
        return (*head, *["-"] * (len(_HEAD) - len(head)))
    # Where something hung, it was not waited until all is done, so nobody knows what is lost.
    lost = "?" if result.failed else result.lost
    counts = (result.tasks, lost, result.doubled, result.dead, result.unknown)
    times = (result.recovered, result.done, result.longest)
    return (*head, *map(str, counts), *map(_seconds, times))


def notes(results: Sequence[Result]) -> str:
    return "\n".join(f"- {one.broker}, {one.fault}: {_verdict(one)}{one.note}" for one in results if one.note)


def _verdict(result: Result) -> str:
    return "skipped: " if result.skipped else "FAILED: " if result.failed else ""


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
