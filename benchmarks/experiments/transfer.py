"""Does the best learning rate carry over to wider and to deeper models?

    python -m benchmarks.experiments.transfer            # width 64 to 512; [S] Fig. 1 and 7
    python -m benchmarks.experiments.transfer --depth    # 2 to 16 blocks of width 64
    python -m benchmarks.experiments.transfer --full     # width 64 to 1,024, sequences of 256

A GPT of 2 blocks with heads of size 64 is trained for 122 steps with 32 sequences each, over a grid
of learning rates in factors of 2; at the best one with three seeds. For larger models, above width
256 or 2 blocks, the grid is walked, from the best learning rate of the size before until both
neighbours are worse. Printed is the best learning rate of each optimizer at each size, and by how
much it moves.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.experiments import pictures
from benchmarks.experiments.optimizers import CONTESTANTS
from benchmarks.experiments.records import Records, Tuned, make_parser, tune
from benchmarks.experiments.training import Setting
from benchmarks.reporting import markdown

COMPARED = ("scion", "unconstrained_scion", "adamw", "muon")
WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 4, 8, 16)
# The largest size with a whole grid; above, it is walked from the best of the size before.
WHOLE_GRID = {"width": 256, "layers": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "transfer")
    parser.add_argument("--depth", action="store_true", help="vary the depth, not the width")
    parser.add_argument("--sizes", type=int, nargs="+", help="widths, or numbers of blocks")
    parser.add_argument("--full", action="store_true", help="a width of 1,024, longer sequences")
    parser.add_argument("--steps", type=int, default=122, help="of each run (default: 122)")
    parser.add_argument("--optimizers", nargs="+", default=COMPARED, choices=CONTESTANTS)
    options = parser.parse_args(arguments)
    varied, sizes = ("layers", DEPTHS) if options.depth else ("width", WIDTHS)
    sizes = options.sizes or ((*sizes, 2 * sizes[-1]) if options.full else sizes)
    path = options.out.with_stem("depth") if options.depth else options.out
    records = Records(path)
    sequence = 256 if options.full else 32
    base = Setting("", 0.0, sequence=sequence, steps=options.steps)
    base = dataclasses.replace(base, evaluate_every=options.steps)
    tuned: dict[str, dict[int, Tuned]] = {name: {} for name in options.optimizers}
    for size in sizes:
        for name, found in tuned.items():
            setting = dataclasses.replace(base, contestant=name, **{varied: size})
            walked = found and size > WHOLE_GRID[varied]
            smaller = list(found.values())[-1].best.learning_rate if walked else None
            found[size] = tune(records, setting, options.seeds, around=smaller)
    draw(tuned, varied, path.with_suffix(".png"))
    rows = [
        [name, str(size), *run.summary()]
        for name, found in tuned.items()
        for size, run in found.items()
    ]
    print(markdown(["optimizer", varied, "best learning rate", "loss"], rows, texts=3))
    for name, found in tuned.items():
        print(f"{name}: the best learning rate moves by a factor of 2^{moved(found):+d}")


def moved(found: Mapping[int, Tuned]) -> int:
    """Returns by how many factors of 2 the best learning rate moves from first to last size."""
    rates = [tuned.best.learning_rate for tuned in found.values()]
    return round(math.log2(rates[-1] / rates[0]))


def draw(tuned: Mapping[str, Mapping[int, Tuned]], varied: str, path: Path) -> None:
    """Draws the loss over the learning rate: panels by optimizer, lines by size."""
    figure, axes = pictures.panels(len(tuned), f"Validation loss, by {varied}")
    for (name, found), panel in zip(tuned.items(), axes, strict=True):
        colors = pictures.shades(len(found))
        for (size, run), color in zip(found.items(), colors, strict=True):
            pictures.draw_grid(panel, run.grid, run.losses, f"{varied} {size}", color)
        panel.set_title(f"{name}: best moves by $2^{{{moved(found):+d}}}$")
        panel.legend()
    figure.supylabel("validation loss (nats)", fontsize="medium")
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
