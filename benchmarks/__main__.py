"""``python -m benchmarks``: run it, and write RESULTS.md."""

from __future__ import annotations

from benchmarks import entrants, places
from benchmarks.measures import throughput

with places.rabbitmq("3.10") as place:
    for entrant in (entrants.OURS_MANY, entrants.MASTER, entrants.OURS, entrants.BY_HAND, entrants.OURS_AUTO):
        print(entrant.name, throughput(entrant, place, 20_000))
