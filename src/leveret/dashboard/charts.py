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
#: Lines in the same place take turns after so many steps: each is drawn there, and none hides another.
_TURN = 4


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
        marked=text.mark,
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
    marked: Callable[[float], str] | None = None,
) -> Chart:
    """``marked``: how the scale is written, if not as the numbers are."""
    known = [value for _, _, row in rows for value in row if value is not None]
    top = round_up(max([*known, least]))
    heights = [[None if value is None else HEIGHT - value / top * HEIGHT for value in row] for _, _, row in rows]
    lines = [
        Line(label, kind, _line(heights, number), _area(heights[number]), _now(row, written))
        for number, (label, kind, row) in enumerate(rows)
    ]
    words = "; ".join(f"{line.label} {line.now}" for line in lines)
    peak = f", at most {written(max(known))} in the last minutes" if known else ""
    span = text.lasted(round(STEP * KEPT))
    scale = marked or written
    return Chart(title, scale(top), scale(top / 2), lines, f"{title}: now {words}{peak}", f"{span} ago")


def _now(row: list[float | None], written: Callable[[float], str]) -> str:
    return text.UNKNOWN if not row or row[-1] is None else written(row[-1])


def _line(heights: Sequence[list[float | None]], number: int) -> str:
    """One of the lines, without those steps that are another one's turn."""
    pieces = []
    for piece in _pieces(heights[number]):
        parts = [[piece[0]]]
        for step, point in piece[1:]:
            if _has_turn(heights, number, step):
                parts[-1].append((step, point))
            else:
                parts.append([(step, point)])
        pieces += [part for part in parts if len(part) > 1 or len(piece) == 1]
    return " ".join(_path(_placed(piece, len(heights[number]))) for piece in pieces)


def _area(row: list[float | None]) -> str:
    pieces = [_placed(piece, len(row)) for piece in _pieces(row)]
    return " ".join(f"{_path(piece)} V{HEIGHT} H{piece[0][0]:.1f} Z" for piece in pieces if len(piece) > 1)


def _pieces(row: list[float | None]) -> list[list[tuple[int, float]]]:
    """The steps that are known, and their heights, in pieces without a gap."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, height in enumerate(row):
        if height is None:
            pieces.append([])
        else:
            pieces[-1].append((step, height))
    return [piece for piece in pieces if piece]


def _has_turn(heights: Sequence[list[float | None]], number: int, step: int) -> bool:
    """Whether a line is the one to be drawn up to that step, of all those that lie there."""
    places = [[None if height is None else round(height) for height in row[step - 1 : step + 1]] for row in heights]
    there = [other for other, place in enumerate(places) if place == places[number]]
    return there[step // _TURN % len(there)] == number


def _placed(piece: list[tuple[int, float]], steps: int) -> list[tuple[float, float]]:
    """As points of the image; the last step is at its right edge."""
    width = WIDTH / (KEPT - 1)
    begin = WIDTH - width * (steps - 1)
    return [(begin + step * width, height) for step, height in piece]


def _path(piece: list[tuple[float, float]]) -> str:
    # A point that stands alone is drawn as a dash: it would not be seen.
    return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in piece) + (" h-2" if len(piece) == 1 else "")


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is no less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 5) if step * power >= value), 10 * power)
