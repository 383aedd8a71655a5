"""In how many steps does each optimizer reach the loss that tuned AdamW ends at?

    python -m benchmarks.experiments.steps_to_loss         # [S] Fig. 1, Table 5, at a small size
    python -m benchmarks.experiments.steps_to_loss --full  # nanoGPT's depth, width and length

Every optimizer is tuned over its grid of learning rates, with three seeds at the best one. Then it
makes shorter runs at that learning rate, each with its own decay to zero: a loss in the middle of a
long run would count the noise that the decay is there to remove. The steps are read off the line
through their final losses where it meets AdamW's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.experiments import pictures
from benchmarks.experiments.optimizers import CONTESTANTS
from benchmarks.experiments.records import Records, make_parser, tune
from benchmarks.experiments.training import Outcome, Setting
from benchmarks.reporting import markdown

PEER = "adamw"
COMPARED = ("adamw", "muon", "scion", "unconstrained_scion", "scion_light", "almond")
PARTS = (0.5, 0.625, 0.75, 0.875, 1.0)  # of the steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "steps_to_loss")
    parser.add_argument("--full", action="store_true", help="12 blocks of width 768, 5,100 steps")
    parser.add_argument("--steps", type=int, help="of the longest run")
    parser.add_argument("--optimizers", nargs="+", default=COMPARED, choices=CONTESTANTS)
    options = parser.parse_args(arguments)
    size = {"width": 768, "layers": 12, "sequence": 1024} if options.full else {}
    steps = options.steps or (5100 if options.full else 400)
    base = Setting("", 0.0, steps=steps, evaluate_every=steps, **size)
    records = Records(options.out)
    rows = []
    runs: dict[str, dict[int, list[Outcome]]] = {}
    for name in dict.fromkeys((PEER, *options.optimizers)):
        tuned = tune(records, dataclasses.replace(base, contestant=name), options.seeds)
        shorter = {round(part * steps) for part in PARTS} - {steps}
        runs[name] = {
            count: list(
                records.run(
                    dataclasses.replace(tuned.best, steps=count, evaluate_every=count, seed=seed)
                    for seed in range(options.seeds)
                ).values()
            )
            for count in sorted(shorter)
        } | {steps: tuned.outcomes}
        needed = steps_needed(runs[name], target(runs))
        shown = "more" if needed is None else f"{needed:.0f} ({needed / steps:.2f})"
        milliseconds = 1000 * mean(outcome.seconds for outcome in tuned.outcomes) / steps
        rows.append([name, *tuned.summary(), shown, f"{milliseconds:.1f}"])
    draw(runs, options.out.with_suffix(".png"))
    titles = ["optimizer", "best learning rate", "loss", f"steps to {PEER}'s loss", "ms a step"]
    print(markdown(titles, rows))


def target(runs: Mapping[str, Mapping[int, Sequence[Outcome]]]) -> float:
    """Returns the loss to reach: the peer's mean after the longest run."""
    return mean(outcome.loss for outcome in runs[PEER][max(runs[PEER])])


def steps_needed(runs: Mapping[int, Sequence[Outcome]], loss: float) -> float | None:
    """Reads off at how many steps the mean final loss falls to ``loss``.

    Args:
        runs: The outcomes of all seeds by number of steps.
        loss: What to reach.

    Returns:
        The steps, between those of two runs; of the shortest run if that reaches it already; None
        if none does.
    """
    counts = sorted(runs)
    losses = [mean(outcome.loss for outcome in runs[count]) for count in counts]
    if losses[-1] > loss:
        return None
    # From the longest run downwards, so that noise in a short one does not count.
    reached = len(counts) - 1
    while reached and losses[reached - 1] <= loss:
        reached -= 1
    if not reached:
        return float(counts[0])
    low, high = reached, reached - 1  # np.interp wants rising losses
    return float(np.interp(loss, [losses[low], losses[high]], [counts[low], counts[high]]))


def draw(runs: Mapping[str, Mapping[int, Sequence[Outcome]]], path: Path) -> None:
    """Draws the final loss over the length of the run, with the spread over seeds."""
    figure, (axes,) = pictures.panels(1, "Final validation loss by length of the run", width=7)
    for name, outcomes in runs.items():
        losses = np.array([[outcome.loss for outcome in seeds] for seeds in outcomes.values()])
        middle, color = losses.mean(axis=1), pictures.COLORS[name]
        bars = [middle - losses.min(axis=1), losses.max(axis=1) - middle]
        axes.errorbar(list(outcomes), middle, bars, marker=".", capsize=3, label=name, color=color)
    axes.axhline(target(runs), color=pictures.COLORS[PEER], linestyle=":")
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.legend()
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
