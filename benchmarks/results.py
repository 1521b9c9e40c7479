"""What was measured, and what follows from it: medians, spreads, ratios of pairs."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.goals import Duel, Goal


@dataclass(frozen=True)
class Spread:
    """The middle of some rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Verdict:
    """What was reached of a goal; None: it was not measured, because its peer failed."""

    goal: Goal
    reached: Spread | None

    @property
    def is_met(self) -> bool:
        return self.reached is not None and self.goal.is_met(self.reached.median)


@dataclass
class Bout:
    """All rounds of one duel: the figures of both, by round."""

    duel: Duel
    ours: list[dict[str, float]] = field(default_factory=list)
    peer: list[dict[str, float]] = field(default_factory=list)
    failure: str = ""

    def ratio(self, figure: str) -> Spread | None:
        """Ours to the peer's, pair by pair: what slows the machine for a while slows both of a pair."""
        ratios = [ours[figure] / peer[figure] for ours, peer in zip(self.ours, self.peer, strict=True)]
        return Spread.of(ratios) if ratios else None


@dataclass
class Curve:
    """Latency over load: by rate, of one entrant."""

    name: str
    points: dict[float, dict[str, float]] = field(default_factory=dict)


@dataclass
class Results:
    """Of one broker."""

    place: str
    bouts: list[Bout] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    #: How often a pair was measured again, because its peer had failed: by the peer's name.
    repeats: Counter[str] = field(default_factory=Counter)

    def figures(self, figure: str) -> dict[str, Spread]:
        """Each entrant's, over all its bouts and rounds."""
        values: dict[str, list[float]] = {}
        for bout in self.bouts:
            for entrant, rounds in ((bout.duel.ours, bout.ours), (bout.duel.peer, bout.peer)):
                values.setdefault(entrant.name, []).extend(numbers[figure] for numbers in rounds)
        return {name: Spread.of(numbers) for name, numbers in values.items() if numbers}

    def judge_bouts(self) -> None:
        self.verdicts += [Verdict(goal, bout.ratio(goal.figure)) for bout in self.bouts for goal in bout.duel.goals]

    def judge(self, goal: Goal, values: Sequence[float]) -> None:
        self.verdicts.append(Verdict(goal, Spread.of(values) if values else None))
