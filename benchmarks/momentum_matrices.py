"""Saves the averaged gradients of the example's GPT in training: real input for orthogonalizers.

    python benchmarks/momentum_matrices.py momentum.npz --steps 100
    python benchmarks/momentum_matrices.py momentum.npz --steps 20 --width 64 --data book.txt

It trains as examples/gpt.py does, and takes that program's flags; the learning rate decays over the
steps asked for. Saved are the averages of the hidden matrices after the last step, in float32,
under their paths.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import numpy as np
import optax

from gpt_data import load_corpus
from gpt_optimizers import OPTIMIZERS, layer_labels
from gpt_settings import Settings, parse_settings
from gpt_training import make_trainer

STEPS = 100


def parse(arguments: Sequence[str] | None = None) -> tuple[Path, Settings]:
    """Reads the command line.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.

    Returns:
        Where to save, and the settings of the run.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="where to save the matrices")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"to train (default: {STEPS})")
    options, flags = parser.parse_known_args(arguments)
    optimizers = {name: choice.defaults for name, choice in OPTIMIZERS.items()}
    return options.file, parse_settings(["--steps", str(options.steps), *flags], "", optimizers)


def hidden_averages(settings: Settings) -> dict[str, np.ndarray[Any, Any]]:
    """Trains and takes the averages out of the optimizer's state.

    Args:
        settings: The settings of the run.

    Returns:
        The average gradient of each hidden matrix by its path.

    Raises:
        ValueError: If the optimizer keeps no average of gradients.
    """
    corpus = load_corpus(settings.data)
    text, _ = corpus.split()
    trainer = make_trainer(settings, corpus.vocabulary)
    state = trainer.initial
    for step in range(settings.steps):
        batch = text.random_windows(settings.seed, step, settings.batch, settings.sequence + 1)
        state, _ = trainer.steps(state, batch[None])
    average = optax.tree.get(state.optimizer, "average")
    if average is None:
        raise ValueError(f"{settings.optimizer} keeps no average of gradients")
    labels = jax.tree.leaves(layer_labels(settings)(state.params))
    leaves, _ = jax.tree_util.tree_flatten_with_path(average)
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
    path, settings = parse(arguments)
    averages = hidden_averages(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a file object: given a name, NumPy may append a suffix to it.
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **averages)
    print(f"{len(averages)} matrices after {settings.steps} steps: {path}")


if __name__ == "__main__":
    main()
