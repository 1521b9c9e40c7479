"""Charts as the paths of an SVG image: pure geometry. Words and numbers stand beside it, as text that can be read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from leveret.dashboard import text
from leveret.dashboard.history import KEPT, STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.dashboard.history import Sample

#: The image's own units; it is stretched to what room there is.
WIDTH, HEIGHT = 300, 100


class Line(msgspec.Struct, frozen=True):
    """One row of numbers, as it is drawn. ``kind`` is its class in the style sheet."""

    label: str
    kind: str
    path: str
    area: str
    #: The last number, as text.
    now: str


class Chart(msgspec.Struct, frozen=True):
    title: str
    #: What the upper edge stands for, and the middle.
    top: str
    middle: str
    lines: list[Line]
    #: What it shows, for those who do not see it.
    summary: str
    #: How far back it goes.
    since: str


def throughput(samples: Sequence[Sample]) -> Chart:
    return _chart(
        "Throughput",
        lambda value: f"{text.rate(value)}/s",
        [("finished", "good", [one.finished for one in samples]), ("failed", "bad", [one.failed for one in samples])],
    )


def run_time(samples: Sequence[Sample]) -> Chart:
    return _chart(
        "Run time",
        text.lasted,
        [("95 %", "slow", [one.slow for one in samples]), ("median", "plain", [one.median for one in samples])],
        least=0.001,
    )


def depth(samples: Sequence[Sample], queue: str | None = None) -> Chart:
    """Of one queue, or of all together."""
    chosen = [
        [one for name, one in sample.queues.items() if queue in (None, name)]  # the others are not looked at
        for sample in samples
    ]
    return _chart(
        "Queue depth",
        text.count,
        [
            ("ready", "plain", [float(sum(one.ready for one in stats)) for stats in chosen]),
            ("running", "good", [float(sum(one.running for one in stats)) for stats in chosen]),
            ("delayed", "slow", [float(sum(one.delayed for one in stats)) for stats in chosen]),
            ("dead", "bad", [float(sum(one.dead for one in stats)) for stats in chosen]),
        ],
        least=4,
    )


def _chart(
    title: str,
    written: Callable[[float], str],
    rows: list[tuple[str, str, list[float | None]]],
    *,
    least: float = 1.0,
) -> Chart:
    known = [value for _, _, row in rows for value in row if value is not None]
    top = round_up(max([*known, least]))
    lines = [_line(label, kind, row, top, written) for label, kind, row in rows]
    words = "; ".join(f"{line.label} {line.now}" for line in lines)
    peak = f", at most {written(max(known))} in the last minutes" if known else ""
    span = text.lasted(round(STEP * KEPT))
    return Chart(title, written(top), written(top / 2), lines, f"{title}: now {words}{peak}", f"{span} ago")


def _line(label: str, kind: str, row: list[float | None], top: float, written: Callable[[float], str]) -> Line:
    step = WIDTH / (KEPT - 1)
    begin = WIDTH - step * (len(row) - 1)
    pieces: list[list[tuple[float, float]]] = [[]]
    for number, value in enumerate(row):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((begin + number * step, HEIGHT - value / top * HEIGHT))
    pieces = [piece for piece in pieces if piece]
    now = row[-1] if row else None
    return Line(
        label,
        kind,
        " ".join(_path(piece) for piece in pieces),
        " ".join(f"{_path(piece)} V{HEIGHT} H{piece[0][0]:.1f} Z" for piece in pieces if len(piece) > 1),
        text.UNKNOWN if now is None else written(now),
    )


def _path(piece: list[tuple[float, float]]) -> str:
    # A point that stands alone is drawn as a dash: it would not be seen.
    return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in piece) + (" h-2" if len(piece) == 1 else "")


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is no less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 5) if step * power >= value), 10 * power)
