"""Draws what was measured: throughput above, latency over load below, one column for each broker."""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib import ticker

mpl.rcParams["svg.hashsalt"] = "leveret"  # the same figures give the same file
plt.switch_backend("svg")

_OURS, _PEERS = "#c2571a", "#8899a6"


def plain(axis: Any) -> None:
    """A logarithmic axis with plain numbers at one, two and five."""
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def throughput(axes: Any, place: str, figures: dict[str, dict[str, float]]) -> None:
    names = sorted(figures["run"], key=lambda name: figures["run"][name])
    colors = [_OURS if name.startswith("leveret") else _PEERS for name in names]
    at = range(len(names))
    axes.scatter([figures["run"][name] for name in names], at, c=colors)
    axes.scatter(
        [figures["enqueue"][name] for name in names], at, edgecolors=colors, facecolors="none", label="enqueue"
    )
    axes.set_yticks(at, names)
    axes.grid(alpha=0.3)
    axes.set_xscale("log")
    plain(axes.xaxis)
    axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("tasks a second (full: run, hollow: enqueue)")
    axes.set_title(place)


def curves(axes: Any, drawn: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, points in drawn.items():
        rates = sorted(points, key=float)
        style = {"color": _OURS} if name.startswith("leveret") else {}
        (line,) = axes.plot([float(r) for r in rates], [points[r]["median"] for r in rates], "o-", label=name, **style)
        axes.plot([float(r) for r in rates], [points[r]["p99"] for r in rates], ":", color=line.get_color())
    axes.grid(alpha=0.3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.set_xlabel("enqueued a second")
    axes.set_ylabel("enqueue to start (ms; dotted: 99th percentile)")
    axes.legend(frameon=False)


def main(path: str) -> None:
    drawn = json.load(sys.stdin)
    figure, axes = plt.subplots(2, len(drawn), figsize=(7 * len(drawn), 10), squeeze=False)
    for column, one in enumerate(drawn):
        throughput(axes[0][column], one["place"], one["throughput"])
        curves(axes[1][column], one["curves"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
