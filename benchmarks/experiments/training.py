"""A training run of an experiment: what it depends on, and what comes out.

Learning rate and ρ are arguments of the compiled function, so that a grid of them is compiled once
for each shape of model.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.experiments.optimizers import Contestant
from scion_jax import init_params

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


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        make_model: Makes the model of a run; every parameter of it is trained.
        loss: The mean loss of a model on a batch.
        draw: Draws the batches of some steps, from the number of the first and how many, each array
            with a leading axis for the steps.
        held_out: What to validate on, a batch.
        labels: Of the parameters, for norms by label; None where these are assignments.
    """

    make_model: Callable[[Setting, nnx.Rngs], nnx.Module]
    loss: Callable[[Any, Any], jax.Array]
    draw: Callable[[Setting, int, int], Any]
    held_out: Callable[[Setting], Any]
    labels: Any = None


def train(setting: Setting, contestant: Contestant, task: Task) -> Outcome:
    """Trains a model.

    Args:
        setting: What to train, and how.
        contestant: The optimizer.
        task: What to learn.

    Returns:
        The losses.
    """
    shape = dataclasses.replace(setting, learning_rate=1.0, rho=1.0, seed=0)
    start, steps, loss = compiled(shape, contestant, task)
    held_out = task.held_out(setting)
    state = start(jax.random.key(setting.seed))
    outcome = Outcome([], [], 0.0)
    for first in range(0, setting.steps, setting.evaluate_every):
        drawn = task.draw(setting, first, setting.evaluate_every)
        before = time.perf_counter()
        state, pairing = jax.block_until_ready(
            steps(state, drawn, setting.learning_rate, setting.rho)
        )
        outcome = Outcome(
            [*outcome.validation, round(float(loss(state[0], held_out)), 5)],
            outcome.pairing if pairing is None else [*outcome.pairing, float(pairing.mean())],
            outcome.seconds + time.perf_counter() - before,
        )
    return outcome


@functools.lru_cache(maxsize=2)
def compiled(
    setting: Setting, contestant: Contestant, task: Task
) -> tuple[Callable, Callable, Callable]:
    """Compiles the functions of a run.

    Args:
        setting: Its shapes; learning rate, ρ and seed do not matter.
        contestant: Its optimizer.
        task: What is learned.

    Returns:
        Three functions: the state (parameters, optimizer's state) from a random key; the new state
        and the pairings from state, batches, learning rate and ρ; the loss from parameters and a
        batch.
    """
    loss = loss_of(setting, task)

    def optimizer(learning_rate: jax.Array, rho: jax.Array) -> optax.GradientTransformation:
        decay = round(setting.decayed * setting.steps)
        shape = optax.join_schedules(
            [optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, max(1, decay))],
            boundaries=[setting.steps - decay],
        )
        return contestant.build(lambda count: learning_rate * shape(count), rho)

    def start(key: jax.Array) -> tuple[Any, Any]:
        params = nnx.state(task.make_model(setting, nnx.Rngs(key)), nnx.Param)
        if contestant.norms is None:
            params = optax.tree.random_like(key, params, jax.random.normal)
            params = optax.tree.scale(DEVIATION, params)
        else:
            params = init_params(key, params, contestant.norms, task.labels)
        return params, optimizer(jnp.ones([]), jnp.ones([])).init(params)

    def steps(state: Any, batches: jax.Array, learning_rate: Any, rho: Any) -> tuple[Any, Any]:
        update = optimizer(jnp.float32(learning_rate), jnp.float32(rho)).update

        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            params, memory = state
            updates, memory = update(jax.grad(loss)(params, batch), memory, params)
            pairing = optax.tree.get(memory, "pairing")
            return (optax.apply_updates(params, updates), memory), pairing

        return jax.lax.scan(step, state, batches)

    return jax.jit(start), jax.jit(steps, donate_argnums=0), jax.jit(loss)


def loss_of(setting: Setting, task: Task) -> Callable[[Any, Any], jax.Array]:
    """Returns the loss of parameters on a batch, a function of arrays alone."""
    structure = structure_of(setting, task)

    def loss(params: Any, batch: Any) -> jax.Array:
        return task.loss(nnx.merge(structure, params), batch)

    return loss


def structure_of(setting: Setting, task: Task) -> nnx.GraphDef:
    """Returns what `nnx.merge` makes the model of, together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: task.make_model(setting, nnx.Rngs(0))))
