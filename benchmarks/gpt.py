"""The GPT of examples/nanogpt.py as `gpu.py` trains it: bfloat16 products, microbatches.

A compiled step is kept, and serves for timing as for training: the length of the run, which its
learning rate depends on, is an argument.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.experiments.fair.entrants import CARRIED, ENTRANTS, STARTS, Knobs, start
from benchmarks.experiments.fair.trials import fall
from examples.nanogpt import GPT, read_tokens

Build = Callable[[optax.Schedule], optax.GradientTransformation]


def built(name: str) -> Build:
    """Returns what makes an entrant of the fair comparison at the settings carried over."""
    knobs = CARRIED[name]
    return lambda part: ENTRANTS[name].build(
        lambda count: knobs["learning rate"] * part(count), knobs
    )


SGD = "optax.sgd"
TRAINED = ("unconstrained_scion", "muon")
BUILDS: dict[str, Build] = {
    SGD: lambda part: optax.sgd(lambda count: 1e-3 * part(count)),
    "optax.adamw": lambda part: optax.adamw(lambda count: 1e-3 * part(count)),
    **{name: built(name) for name in TRAINED},
}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        trees: Layers and width of the block trees whose update is timed.
        vocabulary: Of the GPT.
        width: Of it.
        layers: Of it.
        heads: Of it.
        sequence: Tokens in a sequence.
        microbatches: Of a step.
        batch: Sequences in a microbatch.
        steps: Of a training run.
        rounds: How often each time is measured.
        seconds: That all of it may take.
    """

    trees: tuple[tuple[int, int], ...] = ((12, 768), (24, 1024), (16, 2048))
    vocabulary: int = 50304
    width: int = 768
    layers: int = 12
    heads: int = 6
    sequence: int = 1024
    microbatches: int = 4
    batch: int = 16
    steps: int = 300
    rounds: int = 7
    seconds: float = 480.0

    @property
    def tokens(self) -> int:
        """How many tokens a step sees."""
        return self.microbatches * self.batch * self.sequence


SMALL = Size(((1, 32),), 4096, 64, 1, 1, 16, 2, 2, 6, 3, 60.0)


def model_of(size: Size, key: jax.Array) -> GPT:
    """Makes the GPT."""
    sizes = size.vocabulary, size.width, size.layers, size.heads
    return GPT(*sizes, tied=False, rngs=nnx.Rngs(key))


def loss_of(size: Size) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the loss of parameters on windows; products are of bfloat16."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: model_of(size, jax.random.key(0))))

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        model = nnx.merge(structure, optax.tree.cast(params, jnp.bfloat16))
        logits = model(windows[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    return loss


@functools.cache
def step_of(size: Size, name: str) -> Callable[..., Any]:
    """Returns a training step.

    Args:
        size: Of the model.
        name: The optimizer.

    Returns:
        A function of the state (parameters, optimizer's state), windows by microbatch and the
        number of steps of the run; it returns the new state.
    """
    gradient_of = jax.grad(loss_of(size))

    def step(state: tuple[Any, Any], windows: jax.Array, steps: Any) -> tuple[Any, Any]:
        params, memory = state

        def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
            return optax.tree.add(total, gradient_of(params, rows)), None

        total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), windows)
        gradient = optax.tree.scale(1 / size.microbatches, total)
        update = BUILDS[name](lambda count: fall(count, steps)).update
        updates, memory = update(gradient, memory, params)
        return optax.apply_updates(params, updates), memory

    return jax.jit(step, donate_argnums=0)


def begin(size: Size, name: str) -> tuple[Any, Any]:
    """Draws the state that a run starts from."""
    knobs = CARRIED[name if name in CARRIED else TRAINED[0]]
    traced = {knob: jnp.float32(knobs[knob]) for knob in STARTS}
    params = _draw(size)(jax.random.key(0), traced)
    return params, jax.jit(BUILDS[name](lambda count: jnp.float32(1)).init)(params)


@functools.cache
def _draw(size: Size) -> Callable[..., Any]:
    def draw(key: jax.Array, knobs: Knobs) -> Any:
        return start(key, nnx.state(model_of(size, key), nnx.Param), knobs)

    return jax.jit(draw)


def tokens_of(size: Size) -> np.ndarray:
    """Reads the text, two bytes a token, most of which do not occur."""
    (text,), _ = read_tokens([])
    pairs = text[: len(text) // 2 * 2].view("<u2")
    tokens = np.unique(pairs, return_inverse=True)[1].astype(np.int32)
    return np.minimum(tokens, size.vocabulary - 1)
