"""Does clipping by the pairing save steps at a constant learning rate?

    python -m benchmarks.experiments.clipping         # [C] Fig. 1, 2, 8 and 11, at a small size
    python -m benchmarks.experiments.clipping --full  # nanoGPT's depth, width and length

Scion and unconstrained Scion are tuned over their grids at a constant learning rate, without decay.
The median pairing of the best run is where ρ begins: it and its multiples are tried, each with a
learning rate of its own, walked from the unclipped optimizer's best. Printed is how many steps each
needs to the loss at which the unclipped optimizer ends; drawn are the losses and the pairing.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.experiments import pictures
from benchmarks.experiments.records import Records, Tuned, make_parser, tune
from benchmarks.experiments.training import Setting
from benchmarks.reporting import markdown

PAIRS = {"scion": "clipped_scion", "unconstrained_scion": "unconstrained_clipped_scion"}
MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # of the median pairing
SMOOTHING = 3  # evaluations; at a constant learning rate a single one is noisy


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "clipping")
    parser.add_argument("--full", action="store_true", help="12 blocks of width 768, 5,100 steps")
    parser.add_argument("--steps", type=int, default=400, help="of a run (default: 400)")
    parser.add_argument("--optimizers", nargs="+", default=tuple(PAIRS), choices=PAIRS)
    options = parser.parse_args(arguments)
    size = {"width": 768, "layers": 12, "sequence": 1024} if options.full else {}
    steps = 5100 if options.full else options.steps
    base = Setting("", 0.0, steps=steps, evaluate_every=steps // 20, decayed=0.0, **size)
    compare(Records(options.out), base, options.optimizers, options.seeds)


def compare(records: Records, base: Setting, optimizers: Sequence[str], seeds: int) -> None:
    """Tunes optimizers, clipped and not, prints a table and draws a picture of each.

    Args:
        records: Where runs are kept.
        base: The rest of the setting.
        optimizers: Names of unclipped ones.
        seeds: How many for the best learning rates.
    """
    rows = []
    for name in optimizers:
        plain = tune(records, dataclasses.replace(base, contestant=name), seeds)
        middle = median(plain.outcomes[0].pairing)
        clipped = {
            rho: tune(
                records,
                dataclasses.replace(base, contestant=PAIRS[name], rho=rho),
                seeds,
                around=plain.best.learning_rate,
            )
            for rho in (float(f"{multiple * middle:.2g}") for multiple in MULTIPLES)
        }
        target = float(curve(plain)[-1])
        rows.append([name, "", *plain.summary(), f"{steps_to(plain, target):.0f}"])
        for rho, tuned in clipped.items():
            needed = f"{steps_to(tuned, target):.0f}"
            rows.append([PAIRS[name], f"{rho:g}", *tuned.summary(), needed])
        picture = records.path.with_name(f"{records.path.stem}_{name}.png")
        draw(name, plain, clipped, picture)
    titles = ["optimizer", "ρ", "best learning rate", "loss", "steps to the unclipped's end"]
    print(markdown(titles, rows, texts=3))


def curve(tuned: Tuned) -> np.ndarray:
    """Returns the validation loss, averaged over seeds and a few evaluations."""
    losses = np.mean([outcome.validation for outcome in tuned.outcomes], axis=0)
    window = min(SMOOTHING, len(losses))
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def evaluated(tuned: Tuned) -> np.ndarray:
    """Returns the steps to which the entries of `curve` belong: the last that each averages."""
    count = len(curve(tuned))
    ends = np.arange(1, 1 + len(tuned.outcomes[0].validation)) * tuned.best.evaluate_every
    return ends[-count:]


def steps_to(tuned: Tuned, loss: float) -> float:
    """Returns the steps after which the curve falls to ``loss``; infinite if it does not."""
    losses, ends = curve(tuned), evaluated(tuned)
    if not (losses <= loss).any():
        return np.inf
    index = int(np.argmax(losses <= loss))
    if index == 0:
        return float(ends[0])
    return float(np.interp(loss, losses[[index, index - 1]], ends[[index, index - 1]]))


def draw(name: str, plain: Tuned, clipped: dict[float, Tuned], path: Path) -> None:
    """Draws the losses, clipped and not, and beside them the pairings."""
    figure, (losses, pairings) = pictures.panels(
        2, f"{name} at a constant learning rate", width=5.5, sharey=False
    )
    runs = {name: plain} | {f"clipped, ρ = {rho:g}": tuned for rho, tuned in clipped.items()}
    colors = ["black", *pictures.shades(len(clipped))]
    for (label, tuned), color in zip(runs.items(), colors, strict=True):
        losses.plot(evaluated(tuned), curve(tuned), label=label, color=color)
        pairing = np.mean([outcome.pairing for outcome in tuned.outcomes], axis=0)
        ends = np.arange(1, 1 + len(pairing)) * tuned.best.evaluate_every
        pairings.plot(ends, pairing, label=label, color=color)
    pairings.set_yscale("log")
    pairings.set_ylabel(r"pairing $\langle d, w\rangle$")
    losses.set_ylabel("validation loss (nats)")
    losses.set_ylim(top=curve(plain)[0])
    losses.legend()
    for axes in (losses, pairings):
        axes.set_xlabel("steps")
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
