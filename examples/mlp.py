"""Trains a multilayer perceptron on scikit-learn's digits, or on a file of your own.

    python examples/mlp.py --data FILE.npz   # x: n rows of numbers on one scale, y: n integers

Prints the accuracy on a fifth of the data, held out. Norms, radii and γ are the published ones.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from scion_jax import Sign, describe, infer_norms, init_params, scaled_relu, scion


def load(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of numbers (n, features) and their classes (n,), counted from 0."""
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            x, y = file["x"].astype(np.float32), file["y"]
    except Exception as error:  # NumPy's, zipfile's or zlib's
        raise SystemExit(f"{path}: expected an .npz file with arrays x and y ({error})") from None
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or min(x.size, y.size) < 5:
        raise SystemExit(f"{path}: expected x (n, …) and integer y (n,), n at least 5")
    if not np.isfinite(x).all() or np.ptp(x) == 0:
        raise SystemExit(f"{path}: expected numbers x that are finite and not all the same")
    return x.reshape(len(x), -1), np.unique(y, return_inverse=True)[1]


def mean_loss(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns nats per row."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@partial(nnx.jit, donate_argnums=(0, 1))
def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Makes one step and returns the loss before it."""
    loss, gradients = nnx.value_and_grad(mean_loss)(model, x, y)
    optimizer.update(model, gradients)
    return loss


def main(arguments: list[str] | None = None) -> None:
    """Trains, and prints the accuracy on held-out data."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE.npz")
    for name, default in {"width": 64, "steps": 300, "learning-rate": 2**-6, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    if min(options.width, options.steps, options.seed + 1) < 1:
        parser.error("--width and --steps must be at least 1, --seed at least 0")

    x, y = load(options.data) if options.data else load_digits(return_X_y=True)
    x, y = np.float32((x - x.mean()) / x.std()), np.int32(y)
    layer, width = partial(nnx.Linear, rngs=nnx.Rngs(options.seed)), options.width
    first, hidden, last = layer(x.shape[1], width), layer(width, width), layer(width, y.max() + 1)
    model = nnx.Sequential(first, scaled_relu, hidden, scaled_relu, last)
    norms = infer_norms(mean_loss, model, x, y, last=Sign(2**10, zero_init=True))
    params = nnx.state(model, nnx.Param)
    print(describe(params, norms))
    nnx.update(model, init_params(jax.random.key(options.seed), params, norms))
    schedule = optax.linear_schedule(options.learning_rate, 0.0, options.steps)
    optimizer = nnx.Optimizer(model, scion(schedule, norms), wrt=nnx.Param)

    x, test_x, y, test_y = train_test_split(x, y, test_size=0.2, random_state=options.seed)
    chance = np.random.default_rng(options.seed)
    for batch in (bar := tqdm(chance.integers(len(x), size=(options.steps, 128)))):
        loss = step(model, optimizer, x[batch], y[batch])
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    print(f"test accuracy: {(model(test_x).argmax(-1) == test_y).mean():.4f}")


if __name__ == "__main__":
    main()
