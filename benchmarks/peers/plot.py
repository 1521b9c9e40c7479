"""Draws what was measured: bars of throughput above, latency over load below, one column for each broker."""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "leveret"  # the same figures give the same file

from matplotlib import pyplot as plt  # noqa: E402 - after the choice of how to draw

_OURS, _PEERS = "#c2571a", "#8899a6"


def bars(axes: Any, place: str, figures: dict[str, dict[str, float]]) -> None:
    names = sorted(figures["run"], key=lambda name: figures["run"][name])
    for offset, (figure, alpha) in enumerate((("run", 1.0), ("enqueue", 0.5))):
        values = [figures[figure][name] for name in names]
        colors = [_OURS if name.startswith("leveret") else _PEERS for name in names]
        at = [number + 0.4 * offset for number in range(len(names))]
        axes.barh(at, values, height=0.4, color=colors, alpha=alpha)
    axes.set_yticks([number + 0.2 for number in range(len(names))], names)
    axes.set_xscale("log")
    axes.set_xlabel("tasks a second (full: run, pale: enqueue)")
    axes.set_title(place)


def curves(axes: Any, drawn: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, points in drawn.items():
        rates = sorted(points, key=float)
        style = {"color": _OURS} if name.startswith("leveret") else {}
        (line,) = axes.plot([float(r) for r in rates], [points[r]["median"] for r in rates], "o-", label=name, **style)
        axes.plot([float(r) for r in rates], [points[r]["p99"] for r in rates], ":", color=line.get_color())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("enqueued a second")
    axes.set_ylabel("enqueue to start (ms; dotted: 99th percentile)")
    axes.legend(frameon=False)


def main(path: str) -> None:
    drawn = json.load(sys.stdin)
    figure, axes = plt.subplots(2, len(drawn), figsize=(7 * len(drawn), 10), squeeze=False)
    for column, one in enumerate(drawn):
        bars(axes[0][column], one["place"], one["bars"])
        curves(axes[1][column], one["curves"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
