"""The compiled functions of a run: training step, validation loss and sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gpt_data import Tokens
from gpt_mesh import placement, split_batch, use_mesh
from gpt_model import GPT
from gpt_optimizers import prepare
from gpt_settings import Settings

SHOWN = ("pairing", "factor")  # kept in its state by an optimizer that clips by the pairing


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        params: The model's matrices.
        optimizer: The optimizer's state.
    """

    params: Any
    optimizer: optax.OptState


class Progress(NamedTuple):
    """What is logged of a step.

    Attributes:
        loss: The training loss in nats per token.
        shown: Those of `SHOWN` that the optimizer keeps in its state.
    """

    loss: jax.Array
    shown: dict[str, jax.Array]


Forward = Callable[[Any, Tokens], jax.Array]  # from parameters and tokens
Steps = Callable[[TrainState, Tokens], tuple[TrainState, Progress]]


@dataclass(frozen=True)
class Trainer:
    """A model and an optimizer as pure functions, each compiled once.

    Attributes:
        initial: The state before the first step.
        steps: Maps a state and the tokens of some steps, ``(steps, batch, sequence + 1)``, to the
            state after them and their progress; the memory of the old state is given to the new
            one. Several steps in one call save the allocation of their temporaries, on a CPU a
            third of the time.
        loss: Maps parameters and tokens ``(batch, sequence + 1)`` to the loss in nats per token.
        sample: Maps parameters, a context ``(sequence,)`` and a random key to new tokens.
    """

    initial: TrainState
    steps: Steps
    loss: Forward
    sample: Callable[[Any, Tokens, jax.Array], jax.Array]


def make_model(settings: Settings, vocabulary: int) -> tuple[Forward, Any]:
    """Builds the model.

    Args:
        settings: The run's settings.
        vocabulary: The number of different tokens.

    Returns:
        A function from parameters and tokens to logits, and the parameters as Flax starts them.
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

    def logits(params: Any, tokens: Tokens) -> jax.Array:
        return nnx.merge(structure, params)(tokens)

    return logits, nnx.to_pure_dict(variables)


def make_loss(logits: Forward) -> Forward:
    """Writes `Trainer.loss`, not yet compiled, for the logits of a model."""

    def loss(params: Any, tokens: Tokens) -> jax.Array:
        tokens = split_batch(tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, tokens[:, :-1]), tokens[:, 1:]
        )
        return losses.mean()

    return loss


def make_steps(loss: Forward, optimizer: optax.GradientTransformation, microbatches: int) -> Steps:
    """Writes `Trainer.steps`, not yet compiled.

    Args:
        loss: `Trainer.loss`.
        optimizer: Makes a step at every ``microbatches``-th call, and otherwise zero updates.
        microbatches: The number of equal parts a batch is split into.

    Returns:
        The function.
    """

    def call(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Progress]:
        value, gradient = jax.value_and_grad(loss)(state.params, tokens)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        kept = {name: optax.tree.get(memory, name) for name in SHOWN}
        shown = {name: number for name, number in kept.items() if number is not None}
        state = TrainState(optax.apply_updates(state.params, updates), memory)
        return state, Progress(value, shown)

    def steps(state: TrainState, batches: Tokens) -> tuple[TrainState, Progress]:
        count, batch, length = batches.shape
        parts = batches.reshape(count * microbatches, batch // microbatches, length)
        state, (losses, shown) = jax.lax.scan(call, state, parts)
        shown = {name: numbers[microbatches - 1 :: microbatches] for name, numbers in shown.items()}
        return state, Progress(losses.reshape(count, microbatches).mean(axis=1), shown)

    return steps


def make_initial(optimizer: optax.GradientTransformation, params: optax.Params) -> TrainState:
    """Returns the state before the first step, spread over the current mesh if there is one."""
    params = jax.device_put(params, placement(params))
    # Zeros have nothing from which XLA could tell where to put them.
    shardings = placement(jax.eval_shape(optimizer.init, params))
    return TrainState(params, jax.jit(optimizer.init, out_shardings=shardings)(params))


def make_trainer(settings: Settings, vocabulary: int, mesh: Mesh | None = None) -> Trainer:
    """Builds the model, its optimizer and the functions that use them.

    Args:
        settings: The run's settings.
        vocabulary: The number of different tokens.
        mesh: Where the state lies; within `use_mesh` of it the functions have to be called.

    Returns:
        The functions and the state to begin with.
    """
    logits, flax_params = make_model(settings, vocabulary)
    optimizer, params = prepare(settings, flax_params)
    with use_mesh(mesh):  # only now: parameters begin the same on every mesh
        initial = make_initial(optimizer, params)
        shardings = placement(initial)
    loss = make_loss(logits)
    steps = make_steps(loss, optimizer, settings.accumulate)

    def sample(params: Any, context: jax.Array, key: jax.Array) -> jax.Array:
        def extend(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = logits(params, window[None])[0, -1] / settings.temperature
            token = jax.random.categorical(key, scores).astype(window.dtype)
            return jnp.append(window[1:], token), token

        return jax.lax.scan(extend, context, jax.random.split(key, settings.sample_length))[1]

    return Trainer(
        initial=initial,
        # Said, since XLA might choose to return the state otherwise than it came.
        steps=jax.jit(steps, donate_argnums=0, out_shardings=(shardings, None)),
        loss=jax.jit(loss),
        sample=jax.jit(sample),
    )
