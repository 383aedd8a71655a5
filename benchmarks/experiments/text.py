"""What most experiments learn: text, by the GPT of examples/nanogpt.py, with its data and loss."""

import functools

import numpy as np
from flax import nnx

from benchmarks.experiments.optimizers import LABELS
from benchmarks.experiments.training import Setting, Task
from examples.nanogpt import GPT, mean_loss, random_windows, read_tokens

HEAD_SIZE = 64
HELD_OUT = 0.1
EVALUATION_WINDOWS = 128


def make_model(setting: Setting, rngs: nnx.Rngs) -> GPT:
    """Makes the model of a run; a byte is a token."""
    return GPT(
        vocabulary=256,
        width=setting.width,
        layers=setting.layers,
        heads=max(1, setting.width // HEAD_SIZE),
        tied=False,
        rngs=rngs,
    )


@functools.cache
def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on and those to validate on: the standard library's sources."""
    (tokens,), _ = read_tokens([])
    count = round((1 - HELD_OUT) * len(tokens))
    return tokens[:count], tokens[count:]


def batches(setting: Setting, first: int, count: int) -> np.ndarray:
    """Draws the batches of some steps, ``(count, batch, sequence + 1)``."""
    drawn = [
        random_windows(corpus()[0], setting.seed, step, setting.batch, setting.sequence + 1)
        for step in range(first, first + count)
    ]
    return np.stack(drawn)


def even_windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """Cuts windows ``(count, length)`` out, spread evenly over the tokens."""
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def validation(setting: Setting) -> np.ndarray:
    """Returns the windows to validate on."""
    return even_windows(corpus()[1], EVALUATION_WINDOWS, setting.sequence + 1)


TEXT = Task(make_model, mean_loss, batches, validation, LABELS)
