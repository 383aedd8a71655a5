"""The compiled functions of a run: training step, validation loss and sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gpt_data import Tokens
from gpt_model import GPT
from gpt_optimizers import prepare
from gpt_settings import Settings


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        params: The model's matrices.
        optimizer: The optimizer's state.
    """

    params: Any
    optimizer: optax.OptState


@dataclass(frozen=True)
class Trainer:
    """A model and an optimizer as pure functions, each compiled once.

    Attributes:
        initial: The state before the first step.
        steps: Maps a state and the tokens of some steps, ``(steps, batch, sequence + 1)``, to the
            state after them and their losses; the memory of the old state is given to the new one.
            Several steps in one call save the allocation of their temporaries, on a CPU a third of
            the time.
        loss: Maps parameters and tokens ``(batch, sequence + 1)`` to the loss in nats per token.
        sample: Maps parameters, a context ``(sequence,)`` and a random key to new tokens.
    """

    initial: TrainState
    steps: Callable[[TrainState, Tokens], tuple[TrainState, jax.Array]]
    loss: Callable[[Any, Tokens], jax.Array]
    sample: Callable[[Any, Tokens, jax.Array], jax.Array]


def make_trainer(settings: Settings, vocabulary: int) -> Trainer:
    """Builds the model, its optimizer and the functions that use them.

    Args:
        settings: The run's settings.
        vocabulary: The number of different tokens.

    Returns:
        The functions and the state to begin with.
    """
    model = GPT(
        vocabulary,
        settings.width,
        settings.layers,
        settings.heads,
        settings.tied,
        nnx.Rngs(settings.seed),
    )
    structure, variables = nnx.split(model)
    optimizer, params = prepare(settings, nnx.to_pure_dict(variables))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(structure, params)(tokens)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, tokens[:, :-1]), tokens[:, 1:]
        )
        return losses.mean()

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.params, tokens)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), memory), value

    def steps(state: TrainState, batches: jax.Array) -> tuple[TrainState, jax.Array]:
        return jax.lax.scan(step, state, batches)

    def sample(params: Any, context: jax.Array, key: jax.Array) -> jax.Array:
        def extend(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = logits(params, window[None])[0, -1] / settings.temperature
            token = jax.random.categorical(key, scores).astype(window.dtype)
            return jnp.append(window[1:], token), token

        return jax.lax.scan(extend, context, jax.random.split(key, settings.sample_length))[1]

    return Trainer(
        initial=TrainState(params, optimizer.init(params)),
        steps=jax.jit(steps, donate_argnums=0),
        loss=jax.jit(loss),
        sample=jax.jit(sample),
    )
