"""What does a larger batch cost, at equal tokens?

    python -m benchmarks.experiments.batch_size   # [S] Fig. 2: batches of 8 to 512 sequences

Every run sees as many sequences; a batch of twice the size makes half the steps. Each optimizer is
tuned anew for every batch size, over its grid of learning rates, with three seeds at the best one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.experiments import pictures
from benchmarks.experiments.optimizers import CONTESTANTS
from benchmarks.experiments.records import Records, Tuned, make_parser, tune
from benchmarks.experiments.training import Setting
from benchmarks.reporting import markdown

COMPARED = ("scion", "unconstrained_scion", "adamw", "muon")
BATCHES = (8, 32, 128, 512)
SEQUENCES = 8192


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "batch_size")
    parser.add_argument("--full", action="store_true", help="ten times the sequences, width 512")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="that a run sees")
    parser.add_argument("--optimizers", nargs="+", default=COMPARED, choices=CONTESTANTS)
    options = parser.parse_args(arguments)
    sequences = 10 * options.sequences if options.full else options.sequences
    records = Records(options.out)
    tuned: dict[str, dict[int, Tuned]] = {name: {} for name in options.optimizers}
    for batch in options.batches:
        steps = sequences // batch
        base = Setting("", 0.0, batch=batch, steps=steps, evaluate_every=steps)
        base = dataclasses.replace(base, width=512 if options.full else base.width)
        for name, found in tuned.items():
            setting = dataclasses.replace(base, contestant=name)
            found[batch] = tune(records, setting, options.seeds)
    draw(tuned, options.out.with_suffix(".png"))
    rows = [
        [name, str(batch), *run.summary()]
        for name, found in tuned.items()
        for batch, run in found.items()
    ]
    print(markdown(["optimizer", "batch", "best learning rate", "loss"], rows, texts=3))


def draw(tuned: Mapping[str, Mapping[int, Tuned]], path: Path) -> None:
    """Draws the loss at the best learning rate over the batch size."""
    figure, (axes,) = pictures.panels(1, "Validation loss at equal tokens", width=6)
    for name, found in tuned.items():
        losses = np.array([run.losses for run in found.values()])
        middle = losses.mean(axis=1)
        bars = [middle - losses.min(axis=1), losses.max(axis=1) - middle]
        color = pictures.COLORS[name]
        axes.errorbar(list(found), middle, bars, marker=".", capsize=3, label=name, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequences in a batch")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.legend()
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
