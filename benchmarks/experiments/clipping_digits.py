"""Does clipping by the pairing save steps at a constant learning rate, on a convolutional network?

    python -m benchmarks.experiments.clipping_digits   # [C] Fig. 3, at a small size

Three convolutions and a linear layer learn scikit-learn's digits, 8 × 8 pixels, by batches of 64.
Tuned and compared as in clipping.py.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from benchmarks.experiments.clipping import PAIRS, compare
from benchmarks.experiments.optimizers import Contestant, clipped_and_not
from benchmarks.experiments.records import Records, make_parser
from benchmarks.experiments.training import Setting, Task
from scion_jax import Assignment, Sign, Spectral, infer_norms, scaled_relu

HELD_OUT = 360  # of 1,797 digits
WIDTH = 16


class Network(nnx.Module):
    """Three convolutions, the first two before a pooling; the mean over what is left; classes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes = [(1, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]
        self.convolutions = nnx.List(
            [nnx.Conv(*size, (3, 3), use_bias=False, rngs=rngs) for size in sizes]
        )
        self.head = nnx.Linear(WIDTH, 10, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(batch, 8, 8, 1)`` to logits."""
        for convolution in self.convolutions:
            x = scaled_relu(convolution(x))
            if x.shape[1] > 2:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its pictures.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "clipping_digits")
    parser.add_argument("--steps", type=int, default=300, help="of a run (default: 300)")
    parser.add_argument("--optimizers", nargs="+", default=tuple(PAIRS), choices=PAIRS)
    options = parser.parse_args(arguments)
    steps = options.steps
    base = Setting("", 0.0, width=WIDTH, batch=64, steps=steps, decayed=0.0)
    base = dataclasses.replace(base, evaluate_every=max(1, steps // 20))
    compare(Records(options.out, contestants(), task()), base, options.optimizers, options.seeds)


@functools.cache
def task() -> Task:
    """Returns what is learned."""
    return Task(make_model, loss, draw, lambda setting: whole(slice(HELD_OUT)))


@functools.cache
def contestants() -> dict[str, Contestant]:
    """Returns the optimizers by name; the constrained ones have eight times the room."""
    return clipped_and_not(norms(8.0), norms(1.0))


def norms(radius: float) -> Assignment:
    """Reads the norms off the loss."""
    network = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    last = Sign(16 * radius, zero_init=True)
    return infer_norms(loss, network, whole(slice(1)), hidden=Spectral(radius), last=last)


def make_model(setting: Setting, rngs: nnx.Rngs) -> Network:
    """Makes the network of a run."""
    del setting
    return Network(rngs)


def loss(model: Network, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns nats per digit."""
    images, classes = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), classes).mean()


def draw(setting: Setting, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the batches of some steps."""
    images, classes = whole(slice(HELD_OUT, None))
    rows = [
        np.random.default_rng((setting.seed, step)).integers(len(classes), size=setting.batch)
        for step in range(first, first + count)
    ]
    return images[np.array(rows)], classes[np.array(rows)]


def whole(part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Returns a part of the digits, and what they are."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))[part]
    return images[order].reshape(-1, 8, 8, 1).astype(np.float32) / 8 - 1, classes[order]


if __name__ == "__main__":
    main()
