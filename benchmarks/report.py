"""RESULTS.md and the plot, or a table on the terminal."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.programs import PEERS_PYTHON, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.entrants import Entrant
    from benchmarks.programme import Size
    from benchmarks.results import Bout, Results, Spread, Verdict

_FOLDER = Path(__file__).parent
RESULTS = _FOLDER / "RESULTS.md"
PLOT = _FOLDER / "results.svg"


def goals(results: Sequence[Results]) -> list[str]:
    """The table of goals, as Markdown."""
    verdicts = [verdict for one in results for verdict in one.verdicts]
    rows = [(v.goal.text, _reached(v), v.goal.wanted, "yes" if v.is_met else "**no**") for v in verdicts]
    return _table(("goal", "reached (lowest to highest round)", "wanted", "met"), rows)


def write(results: Sequence[Results], size: Size) -> None:
    """Write RESULTS.md and the plot beside it."""
    _plot(results)
    lines = [
        "# What was measured",
        "",
        "Written by `make bench`; how to read it is in [docs/performance.md](../docs/performance.md). All entrants:",
        "durable, confirmed, acknowledged after the run. Each was measured right after or before ours, in each round,",
        "and each task was counted: it ran exactly once, or the run failed.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}.",
        f"{size.rounds} rounds of {size.tasks:,} no-op tasks (slower peers: fewer).",
        "",
        "## Goals",
        "",
        *goals(results),
        "",
        f"![Throughput, and latency over load]({PLOT.name})",
    ]
    for one in results:
        if one.bouts:
            lines += ["", f"## {one.place}", "", *_throughput(one)]
        if one.curves:
            lines += [
                "",
                "Latency over load, enqueue to start, up to 256 outstanding (milliseconds):",
                "",
                *_curves(one),
            ]
    lines += ["", "## What each was set to", "", *_settings(results), "", "## Versions", "", *_versions(results), ""]
    RESULTS.write_text("\n".join(lines))


def machine() -> str:
    """In general words: cores, processor, memory."""
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), {memory:.0f} GiB, {platform.system()}"
    )


def _reached(verdict: Verdict) -> str:
    if verdict.reached is None:
        return "not measured: the peer failed"
    reached, unit = verdict.reached, verdict.goal.unit
    spread = "" if reached.low == reached.high else f" ({reached.low:.2f} to {reached.high:.2f})"
    return f"{reached.median:.2f} {unit}{spread}"


def _failure(bout: Bout) -> str:
    name = bout.duel.peer.name
    return f"{name}: {bout.failure.splitlines()[0].removeprefix(f'{name}: ')}"


def _throughput(results: Results) -> list[str]:
    enqueue, run = results.figures("enqueue"), results.figures("run")
    cpu = [results.figures("enqueue cpu"), results.figures("run cpu")]
    rows = [
        (name, _rate(enqueue[name]), _rate(run[name]), " / ".join(f"{spent[name].median:,.0f}" for spent in cpu))
        for name in enqueue
    ]
    head = ("tasks a second, median (lowest to highest)", "enqueue", "run", "processor time, enqueue / run (us)")
    table = _table(head, rows)
    failures = [f"- not measured: {_failure(bout)}" for bout in results.bouts if bout.failure]
    again = [f"- measured again, as {peer} failed: {count} times" for peer, count in sorted(results.repeats.items())]
    return [*table, "", *failures, *again] if failures or again else table


def _rate(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.low:,.0f} to {spread.high:,.0f})"


def _curves(results: Results) -> list[str]:
    rates = sorted({rate for curve in results.curves for rate in curve.points})
    rows = []
    for curve in results.curves:
        points = [curve.points.get(rate) for rate in rates]
        rows.append((curve.name, *(f"{p['median']:.1f} / {p['p99']:.1f}" if p else "" for p in points)))
    return _table(("median / 99th percentile, at tasks a second", *(f"{rate:g}" for rate in rates)), rows)


def _settings(results: Sequence[Results]) -> list[str]:
    duels = [bout.duel for one in results for bout in one.bouts]
    entrants: dict[str, Entrant] = {one.name: one for duel in duels for one in (duel.ours, duel.peer)}
    return _table(("entrant", "set to"), [(one.name, one.settings) for one in entrants.values()])


def _versions(results: Sequence[Results]) -> list[str]:
    ours = [f"leveret {metadata.version('leveret')} ({_commit()})", f"Python {platform.python_version()}"]
    ours += [f"{name} {metadata.version(name)}" for name in ("aio-pika", "aiormq", "msgspec")]
    pinned = (_FOLDER / "peers.txt").read_text().splitlines()
    peers = [re.sub(r"\[.*?\]", "", line).replace("==", " ") for line in pinned if line and line[0] != "#"]
    places = [one.place for one in results if one.bouts]
    return [f"{', '.join([*places, *ours])}. Peers: {', '.join(peers)}."]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def _plot(results: Sequence[Results]) -> None:
    """matplotlib is in the peers' environment alone."""
    drawn = [
        {
            "place": one.place,
            "throughput": {
                figure: {name: s.median for name, s in one.figures(figure).items()} for figure in ("enqueue", "run")
            },
            "curves": {curve.name: {str(rate): point for rate, point in curve.points.items()} for curve in one.curves},
        }
        for one in results
        if one.bouts
    ]
    command = [str(PEERS_PYTHON), "-m", "benchmarks.peers.plot", str(PLOT)]
    subprocess.run(command, cwd=ROOT, input=json.dumps(drawn), text=True, check=True)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
