"""Does the best learning rate carry over to wider models, whatever the norm of the last layer?

    python -m benchmarks.experiments.output_layers   # [S] Fig. 5, on scikit-learn's digits

A perceptron of three layers learns by `unconstrained_scion`, its first layer with
`Spectral(max=True)`, the second with `Spectral()`, the last with one of three norms. The smallest
width gets the whole grid; for the others it is walked, as in transfer.py.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from benchmarks.experiments.clipping_digits import HELD_OUT, draw, loss, whole
from benchmarks.experiments.optimizers import Contestant
from benchmarks.experiments.records import Records, Tuned, make_parser, tune
from benchmarks.experiments.training import Setting, Task
from benchmarks.experiments.transfer import draw as draw_tuned
from benchmarks.experiments.transfer import moved
from benchmarks.reporting import markdown
from scion_jax import (
    Norm,
    RowNorm,
    Sign,
    Spectral,
    label_by_path,
    scaled_relu,
    unconstrained_scion,
)

WIDTHS = (64, 128, 256, 512)
LAST = {"Sign": Sign(16.0), "Spectral": Spectral(16.0), "RowNorm": RowNorm(16.0)}
LABELS = label_by_path([("^first", "first"), ("^hidden", "hidden"), ("^last", "last")])


class Perceptron(nnx.Module):
    """Three matrices."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, width, use_bias=False, rngs=rngs)
        self.hidden = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.last = nnx.Linear(width, 10, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(batch, 8, 8, 1)`` to logits."""
        x = scaled_relu(self.first(x.reshape(len(x), 64)))
        return self.last(scaled_relu(self.hidden(x)))


def contestant(last: Norm) -> Contestant:
    """Returns the optimizer with a norm for the last layer."""
    norms = {"first": Spectral(max=True), "hidden": Spectral(), "last": last}
    return Contestant(lambda rate, rho: unconstrained_scion(rate, norms, LABELS), -9, norms)


TASK = Task(
    lambda setting, rngs: Perceptron(setting.width, rngs),
    loss,
    draw,
    lambda setting: whole(slice(HELD_OUT)),
    LABELS,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "output_layers")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options = parser.parse_args(arguments)
    records = Records(options.out, {name: contestant(last) for name, last in LAST.items()}, TASK)
    tuned: dict[str, dict[int, Tuned]] = {name: {} for name in LAST}
    for name, found in tuned.items():
        for width in options.widths:
            setting = Setting(name, 0.0, width=width, batch=256, evaluate_every=122)
            narrower = list(found.values())[-1].best.learning_rate if found else None
            found[width] = tune(records, setting, options.seeds, around=narrower)
    draw_tuned(tuned, "width", options.out.with_suffix(".png"))
    rows = [
        [name, str(width), *run.summary()]
        for name, found in tuned.items()
        for width, run in found.items()
    ]
    print(markdown(["last layer", "width", "best learning rate", "loss"], rows, texts=3))
    for name, found in tuned.items():
        print(f"{name}: the best learning rate moves by a factor of 2^{moved(found):+d}")


if __name__ == "__main__":
    main()
