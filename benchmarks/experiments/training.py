"""A training run of an experiment: what it depends on, and what comes out.

The model, its data and its loss are those of examples/nanogpt.py. Learning rate and ρ are arguments
of the compiled function, so that a grid of them is compiled once for each shape of model.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nanogpt import GPT, mean_loss, random_windows, read_tokens
from optimizers import CONTESTANTS, LABELS, Contestant
from scion_jax import init_params

HEAD_SIZE = 64
HELD_OUT = 0.1
EVALUATION_WINDOWS = 128
DEVIATION = 0.02  # of the first parameters, for AdamW and Muon, as in nanoGPT


@dataclass(frozen=True)
class Setting:
    """Everything that one run depends on, beside its contestant's code.

    Attributes:
        contestant: The name of an optimizer.
        learning_rate: The largest.
        seed: Of initialization and batches.
        rho: ρ of a clipped optimizer.
        width: Of the residual stream, a multiple of 64, the size of an attention head.
        layers: Blocks.
        batch: Sequences in a step.
        sequence: Bytes in a sequence.
        steps: Of the run.
        decayed: The part of the steps, at the end, over which the learning rate falls to 0.
        evaluate_every: Steps between two validation losses; divides ``steps``.
    """

    contestant: str
    learning_rate: float
    seed: int = 0
    rho: float = 1.0
    width: int = 64
    layers: int = 2
    batch: int = 32
    sequence: int = 32
    steps: int = 122
    decayed: float = 0.285
    evaluate_every: int = 61


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        validation: The validation loss in nats per byte, after each ``evaluate_every`` steps.
        pairing: The mean pairing of these steps, where the optimizer keeps it.
        seconds: What the steps took, without compiling and evaluating.
    """

    validation: list[float]
    pairing: list[float]
    seconds: float

    @property
    def loss(self) -> float:
        """The validation loss at the end; infinite where a run diverged."""
        last = self.validation[-1]
        return last if np.isfinite(last) else np.inf


def train(setting: Setting, contestants: Mapping[str, Contestant] = CONTESTANTS) -> Outcome:
    """Trains a GPT.

    Args:
        setting: What to train, and how.
        contestants: Optimizers by name.

    Returns:
        The losses.
    """
    shape = dataclasses.replace(setting, learning_rate=1.0, rho=1.0, seed=0)
    start, steps, loss = compiled(shape, contestants[setting.contestant])
    held_out = even_windows(corpus()[1], EVALUATION_WINDOWS, setting.sequence + 1)
    state = start(jax.random.key(setting.seed))
    outcome = Outcome([], [], 0.0)
    for first in range(0, setting.steps, setting.evaluate_every):
        windows = batches(setting, first, setting.evaluate_every)
        before = time.perf_counter()
        state, pairing = jax.block_until_ready(
            steps(state, windows, setting.learning_rate, setting.rho)
        )
        outcome = Outcome(
            [*outcome.validation, round(float(loss(state[0], held_out)), 5)],
            outcome.pairing if pairing is None else [*outcome.pairing, float(pairing.mean())],
            outcome.seconds + time.perf_counter() - before,
        )
    return outcome


@functools.lru_cache(maxsize=2)
def compiled(setting: Setting, contestant: Contestant) -> tuple[Callable, Callable, Callable]:
    """Compiles the functions of a run.

    Args:
        setting: Its shapes; learning rate, ρ and seed do not matter.
        contestant: Its optimizer.

    Returns:
        Three functions: the state (parameters, optimizer's state) from a random key; the new state
        and the pairings from state, batches ``(steps, batch, sequence + 1)``, learning rate and ρ;
        the loss from parameters and windows.
    """
    loss = loss_of(setting)

    def optimizer(learning_rate: jax.Array, rho: jax.Array) -> optax.GradientTransformation:
        decay = round(setting.decayed * setting.steps)
        shape = optax.join_schedules(
            [optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, max(1, decay))],
            boundaries=[setting.steps - decay],
        )
        return contestant.build(lambda count: learning_rate * shape(count), rho)

    def start(key: jax.Array) -> tuple[Any, Any]:
        params = nnx.state(make_model(setting, nnx.Rngs(key)), nnx.Param)
        if contestant.norms is None:
            params = optax.tree.random_like(key, params, jax.random.normal)
            params = optax.tree.scale(DEVIATION, params)
        else:
            params = init_params(key, params, contestant.norms, LABELS)
        return params, optimizer(jnp.ones([]), jnp.ones([])).init(params)

    def steps(state: Any, batches: jax.Array, learning_rate: Any, rho: Any) -> tuple[Any, Any]:
        update = optimizer(jnp.float32(learning_rate), jnp.float32(rho)).update

        def step(state: Any, windows: jax.Array) -> tuple[Any, Any]:
            params, memory = state
            updates, memory = update(jax.grad(loss)(params, windows), memory, params)
            pairing = optax.tree.get(memory, "pairing")
            return (optax.apply_updates(params, updates), memory), pairing

        return jax.lax.scan(step, state, batches)

    return jax.jit(start), jax.jit(steps, donate_argnums=0), jax.jit(loss)


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


def loss_of(setting: Setting) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the loss of parameters on windows, a function of arrays alone."""
    structure = structure_of(setting)

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        return mean_loss(nnx.merge(structure, params), windows)

    return loss


def structure_of(setting: Setting) -> nnx.GraphDef[GPT]:
    """Returns what `nnx.merge` makes the model of, together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_model(setting, nnx.Rngs(0))))


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
