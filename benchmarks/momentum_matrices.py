"""Saves the averaged gradients of a small GPT in training: real input for orthogonalizers.

    python -m benchmarks.momentum_matrices momentum.npz --steps 100

It trains a small GPT by unconstrained Scion, with heads of size 64 and a learning rate that decays
over the steps asked for. Saved are the averages of the hidden matrices after the last step, in
float32, under their paths.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.experiments.optimizers import CONTESTANTS, LABELS
from benchmarks.experiments.text import TEXT
from benchmarks.experiments.training import Setting, compiled


def parse(arguments: Sequence[str] | None = None) -> tuple[Path, Setting]:
    """Reads the command line.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.

    Returns:
        Where to save, and the setting of the run.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="where to save the matrices")
    for name, default in {"steps": 100, "width": 128, "layers": 3, "sequence": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = vars(parser.parse_args(arguments))
    return options.pop("file"), Setting("unconstrained_scion", 2**-5, batch=16, **options)


def hidden_averages(setting: Setting) -> dict[str, np.ndarray[Any, Any]]:
    """Trains and takes the averages out of the optimizer's state.

    Args:
        setting: The run.

    Returns:
        The average gradient of each hidden matrix by its path.
    """
    start, steps, _ = compiled(setting, CONTESTANTS[setting.contestant], TEXT)
    windows = TEXT.draw(setting, 0, setting.steps)
    (params, memory), _ = steps(
        start(jax.random.key(setting.seed)), windows, setting.learning_rate, setting.rho
    )
    labels = jax.tree.leaves(LABELS(params))
    average = nnx.to_pure_dict(optax.tree.get(memory, "average"))
    leaves = jax.tree_util.tree_leaves_with_path(average)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float32)
        for (path, leaf), label in zip(leaves, labels, strict=True)
        if label == "hidden"
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and saves.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    path, setting = parse(arguments)
    averages = hidden_averages(setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a file object: given a name, NumPy may append a suffix to it.
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **averages)
    print(f"{len(averages)} matrices after {setting.steps} steps: {path}")


if __name__ == "__main__":
    main()
