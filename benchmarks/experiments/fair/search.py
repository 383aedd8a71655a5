"""The search: one knob at a time, greedily, with as many tries for everybody.

The learning rate goes first and, in factors of 2, after every knob that was turned. A knob is tried
at the values beside its own, and goes on in the direction that was better. What counts is the mean
loss of a few seeds, which are the same for all tries.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator

from benchmarks.experiments.fair.entrants import Entrant
from benchmarks.experiments.fair.trials import Ledger, Trial

RATE = "learning rate"
TOGETHER = ("momentum", "optimistic", "nesterov")
HEAD = "head start"


class Search:
    """A search for an entrant's knobs, until its tries are used up."""

    def __init__(self, ledger: Ledger, entrant: Entrant, tries: int, seeds: int) -> None:
        """Prepares it.

        Args:
            ledger: Where runs are kept.
            entrant: Whose knobs.
            tries: How many settings may be tried.
            seeds: How many runs make a try.
        """
        self._ledger, self._entrant, self._seeds = ledger, entrant, seeds
        self._left = tries
        self._seen: dict[Trial, float] = {}

    def best(self, trial: Trial) -> Trial:
        """Returns the best setting that was found from ``trial`` on.

        At the end, in at most eight tries more, momentum and look ahead are tried together, since
        they depend on each other.
        """
        trial = self._walk_rate(trial)
        before = None
        while before != trial and self._left > 0:
            before = trial
            for knob in self._entrant.moves:
                turned = self._turn(trial, knob)
                if turned != trial:
                    trial = self._walk_rate(turned)
        for values in self._together():
            tried = min(self._seen, key=self._seen.__getitem__).turned(**values)
            self._left = max(self._left, 1)
            self._loss(tried)
        return min(self._seen, key=self._seen.__getitem__)

    def _together(self) -> Iterator[dict[str, float]]:
        moves = {
            knob: self._entrant.moves[knob] for knob in TOGETHER if knob in self._entrant.moves
        }
        if len(moves) > 1:
            for pair in itertools.product(*moves.values()):
                yield dict(zip(moves, pair, strict=True))

    def _loss(self, trial: Trial) -> float:
        if trial not in self._seen:
            if self._left <= 0:
                return float("inf")
            self._left -= 1
            self._seen[trial] = mean_loss(self._ledger, trial, self._seeds)
        return self._seen[trial]

    def _walk_rate(self, trial: Trial) -> Trial:
        best = trial
        self._loss(trial)
        for factor in (2.0, 0.5):
            while self._loss(tried := scaled(best, factor)) < self._loss(best):
                best = tried
        return best

    def _turn(self, trial: Trial, knob: str) -> Trial:
        values = self._entrant.moves[knob]
        if knob == HEAD:  # a worse value lies between the best two
            return min((trial.turned(**{HEAD: value}) for value in values), key=self._loss)
        best, at = trial, values.index(dict(trial.knobs)[knob])
        for direction in (1, -1):
            index = at + direction
            while 0 <= index < len(values):
                tried = trial.turned(**{knob: values[index]})
                if knob == self._entrant.follows:
                    tried = scaled(tried, values[at] / values[index])
                if self._loss(tried) >= self._loss(best):
                    break
                best, index = tried, index + direction
            if best != trial:
                break
        return best


def scaled(trial: Trial, factor: float) -> Trial:
    """Returns the same at ``factor`` times the learning rate."""
    return trial.turned(**{RATE: dict(trial.knobs)[RATE] * factor})


def seeded(trial: Trial, seeds: int) -> list[Trial]:
    """Returns the same with seeds 0, 1 and so on."""
    return [dataclasses.replace(trial, seed=seed) for seed in range(seeds)]


def mean_loss(ledger: Ledger, trial: Trial, seeds: int) -> float:
    """Returns the mean loss of a few seeds; infinite if one run diverged."""
    return statistics.mean(ledger.losses(seeded(trial, seeds)))


def walk(ledger: Ledger, trial: Trial, seeds: int) -> Trial:
    """Walks the learning rate in factors of 2 until both neighbours are worse.

    Args:
        ledger: Where runs are kept.
        trial: Where to begin.
        seeds: How many runs judge a learning rate.

    Returns:
        The same at the best learning rate.
    """
    best = trial
    for factor in (0.5, 2.0):
        while mean_loss(ledger, scaled(best, factor), seeds) < mean_loss(ledger, best, seeds):
            best = scaled(best, factor)
    return best
