"""The parts of the comparison: each makes the runs that the ledger lacks, and returns a table.

Everybody is tuned once, at width 64 and 122 steps. What is found is carried over: to other widths
only the learning rate is walked, in factors of 2 from the best of the width before; to other
lengths and batches learning rate and momentum are chosen anew, at width 64 again.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.experiments.fair.entrants import BALLS, ENTRANTS, STARTS
from benchmarks.experiments.fair.next_steps import NAMES, OURS, entrants
from benchmarks.experiments.fair.picture import draw_widths
from benchmarks.experiments.fair.search import RATE, Search, mean_loss, scaled, seeded, walk
from benchmarks.experiments.fair.trials import Ledger, Trial

TRIES, TUNING_SEEDS = 28, 2
SEEDS = 3
WIDTHS = (64, 128, 256, 512)
BLOCKS = (2, 4, 8, 16)
LONG = 1000
LONG_WIDTHS = (64, 128)
MOMENTA = (0.05, 0.1, 0.2, 0.4)
SEQUENCES, BATCHES = 8192, (8, 32, 128, 512)
SIZES = ((64, 122), (128, 122), (64, LONG))  # width and steps at which next steps are judged

Rows = list[list[str]]


class Table(NamedTuple):
    """A part's result.

    Attributes:
        heading: What it shows.
        titles: Of the columns.
        rows: The cells.
    """

    heading: str
    titles: Sequence[str]
    rows: Rows


@functools.cache
def settled(ledger: Ledger, name: str) -> Trial:
    """Returns what tuning at width 64 comes to."""
    entrant = ENTRANTS[name]
    first = Trial(name, tuple(sorted(entrant.knobs.items())))
    return Search(ledger, entrant, TRIES, TUNING_SEEDS).best(first)


def tuned(ledger: Ledger, names: Sequence[str]) -> Table:
    """Tunes everybody at width 64, 122 steps."""
    rows = []
    for name in names:
        best = settled(ledger, name)
        knobs = [f"{knob} {shown(value)}" for knob, value in best.knobs if knob != RATE]
        rows.append([name, rate_of(best), spread(ledger, best), ", ".join(knobs)])
    heading = f"Tuned at width 64, 122 steps, {TRIES} tries of {TUNING_SEEDS} runs each"
    return Table(heading, ["optimizer", RATE, "loss", "knobs"], rows)


def widths(ledger: Ledger, names: Sequence[str], sizes: Sequence[int] = WIDTHS) -> Table:
    """Carries the settings over to wider models."""
    found: dict[str, dict[int, Trial]] = {name: {} for name in names}
    for width in sizes:
        for name, by_width in found.items():
            before = list(by_width.values())[-1] if by_width else settled(ledger, name)
            setting = dataclasses.replace(before, width=width)
            by_width[width] = walk(ledger, setting, TUNING_SEEDS if width == 64 else 1)
            spread(ledger, by_width[width])
    draw_widths(ledger, found, ledger.path.with_suffix(".png"))
    rows = [
        [name, str(width), rate_of(best), spread(ledger, best)]
        for name, by_width in found.items()
        for width, best in by_width.items()
    ]
    return Table("Wider, 122 steps", ["optimizer", "width", RATE, "loss"], rows)


def depths(ledger: Ledger, names: Sequence[str], sizes: Sequence[int] = BLOCKS) -> Table:
    """Carries the settings over to deeper models."""
    rows = []
    for name in names:
        best = settled(ledger, name)
        for blocks in sizes:
            best = walk(ledger, dataclasses.replace(best, layers=blocks), 1)
            rows.append([name, str(blocks), rate_of(best), spread(ledger, best)])
    return Table("Deeper, width 64, 122 steps", ["optimizer", "blocks", RATE, "loss"], rows)


@functools.cache
def settled_for(ledger: Ledger, name: str, steps: int, batch: int) -> Trial:
    """Returns the settings at width 64 with learning rate and momentum chosen anew."""
    best = dataclasses.replace(settled(ledger, name), steps=steps, batch=batch)
    # The best learning rate falls about as the root of the length does.
    halvings = round(math.log2(steps * 32 / batch / 122) / 2 + math.log2(32 / batch) / 2)
    best = scaled(best, 2.0**-halvings)
    momenta = MOMENTA[:3] if steps >= LONG else MOMENTA
    tried = [best.turned(momentum=momentum) for momentum in momenta]
    best = min(tried, key=lambda trial: mean_loss(ledger, trial, 1))
    return walk(ledger, best, 1)


def lengths(ledger: Ledger, names: Sequence[str], sizes: Sequence[int] = LONG_WIDTHS) -> Table:
    """Trains for 1,000 steps."""
    found = {name: settled_for(ledger, name, LONG, 32) for name in names}
    rows = []
    for width in sizes:
        for name, before in found.items():
            best = dataclasses.replace(before, width=width)
            found[name] = best = best if width == 64 else walk(ledger, best, 1)
            momentum = shown(dict(best.knobs)["momentum"])
            rows.append([name, str(width), rate_of(best), momentum, spread(ledger, best)])
    rows.sort(key=lambda row: names.index(row[0]))
    return Table(f"{LONG:,} steps", ["optimizer", "width", RATE, "momentum", "loss"], rows)


def fewer_steps(ledger: Ledger, names: Sequence[str]) -> Table:
    """Looks at which length each is at the loss of AdamW after 1,000 steps; width 64."""
    target = mean_loss(ledger, settled_for(ledger, "adamw", LONG, 32), 2)
    rows = []
    for name in names:
        best = settled_for(ledger, name, LONG, 32)
        lengths = (1000, 750, 625, 500)
        losses = {}
        for steps in lengths:
            losses[steps] = mean_loss(ledger, dataclasses.replace(best, steps=steps), 2)
            if losses[steps] > target:
                break
        rows.append([name, *(f"{losses[n]:.3f}" if n in losses else "" for n in lengths)])
    titles = ["optimizer", "1,000 steps", "750", "625", "500"]
    return Table(f"Shorter runs; AdamW ends at {target:.3f} after 1,000 steps", titles, rows)


def batch_sizes(ledger: Ledger, names: Sequence[str], sizes: Sequence[int] = BATCHES) -> Table:
    """Trains with other batches, as many sequences in all."""
    rows = []
    for name in names:
        for batch in sizes:
            best = settled_for(ledger, name, SEQUENCES // batch, batch)
            momentum = shown(dict(best.knobs)["momentum"])
            rows.append([name, str(batch), rate_of(best), momentum, spread(ledger, best, 2)])
    heading = f"Batches, {SEQUENCES:,} sequences in all, width 64"
    return Table(heading, ["optimizer", "batch", RATE, "momentum", "loss"], rows)


def next_steps(ledger: Ledger, names: Sequence[str]) -> Table:
    """Judges the field's next steps against each other, and starts against the published ones."""
    del names
    ours = settled(ledger, "unconstrained_scion")
    found = {"as tuned": ours}
    start = {name: BALLS[name] for name in STARTS}
    found["hidden start 1"] = ours.turned(**{"hidden start": 1.0})  # as fixed norms start
    found["published start"] = walk(ledger, ours.turned(**start), TUNING_SEEDS)
    for name in NAMES:
        entrant = dataclasses.replace(OURS, **vars(entrants()[name]))
        first = dataclasses.replace(ours.turned(**entrant.knobs), entrant=name)
        found[name] = Search(ledger, entrant, 12, TUNING_SEEDS).best(first)
    long = settled_for(ledger, "unconstrained_scion", LONG, 32)
    rows = []
    for name, best in found.items():
        cells = []
        for width, steps in SIZES:
            trial = dataclasses.replace(best, width=width, steps=steps)
            if steps == LONG:
                factor = dict(long.knobs)[RATE] / dict(ours.knobs)[RATE]
                trial = scaled(trial, factor).turned(momentum=dict(long.knobs)["momentum"])
            cells.append(spread(ledger, trial, SEEDS if steps < LONG else 2))
        knobs = [f"{knob} {shown(dict(best.knobs)[knob])}" for knob in own_knobs(name)]
        rows.append([name, rate_of(best), ", ".join(knobs), *cells])
    titles = ["unconstrained_scion", RATE, "knob", *(f"{w}, {n} steps" for w, n in SIZES)]
    return Table("Next steps", titles, rows)


def own_knobs(name: str) -> list[str]:
    """Returns the names of the knobs that are a next step's own."""
    return list(entrants()[name].moves) if name in NAMES else []


PARTS: dict[str, Callable[[Ledger, Sequence[str]], Table]] = {
    "tuned": tuned,
    "widths": widths,
    "depths": depths,
    "lengths": lengths,
    "fewer_steps": fewer_steps,
    "batch_sizes": batch_sizes,
    "next_steps": next_steps,
}


def rate_of(trial: Trial) -> str:
    """Returns the learning rate as a power of 2."""
    return f"2^{round(math.log2(dict(trial.knobs)[RATE]))}"


def shown(value: float) -> str:
    """Returns a knob's value; -1 stands for normal numbers."""
    return "normal" if value == -1 else f"{value:g}"


def spread(ledger: Ledger, trial: Trial, seeds: int = SEEDS) -> str:
    """Returns mean and standard deviation of the loss over seeds."""
    losses = ledger.losses(seeded(trial, seeds))
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
