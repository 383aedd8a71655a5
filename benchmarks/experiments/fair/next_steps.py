"""The field's next steps, each as a short stage, to be judged before the library has it.

All of them vary `unconstrained_scion` at its own settings, and their rival is its tuned weight
decay. They belong in `optax.chain`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from benchmarks.experiments.fair.entrants import (
    ENTRANTS,
    STARTS,
    Entrant,
    Knobs,
    averaging,
    balls,
)
from benchmarks.experiments.optimizers import LABELS
from scion_jax import average_gradients, scale_by_lmo

NAMES = ("weight decay", "cautious decay", "anchor", "fixed norm")


class Start(NamedTuple):
    """State of `anchor`: updates made, and the parameters at the start."""

    made: jax.Array
    params: Any


def anchor(strength: ArrayLike = 1.0) -> optax.GradientTransformation:
    """Pulls parameters to where they started, less and less, after the learning rate.

        x ← x + u + strength · (x₀ − x) / (k + 2)

    Without steps that vanish, x − x₀ is then an average of all steps in place of their sum: the
    dual averaging of Pethick et al., arXiv:2605.11172.
    """

    def init(params: Any) -> Start:
        return Start(jnp.zeros([], jnp.int32), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        pull = strength / (state.made.astype(jnp.float32) + 2)
        updates = jax.tree.map(lambda u, x0, x: u + pull * (x0 - x), updates, state.params, params)
        return updates, Start(state.made + 1, state.params)

    return optax.GradientTransformation(init, update)


def cautious_decay(decay: ArrayLike) -> optax.GradientTransformation:
    """Decays the entries only that the step makes smaller anyway, before the learning rate.

    v + decay · x where v x > 0, else v
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        decayed = jax.tree.map(lambda v, x: v + decay * jnp.where(v * x > 0, x, 0), updates, params)
        return decayed, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def relative_step(step: ArrayLike) -> optax.GradientTransformation:
    """Makes steps as long as parameters, times a number: before the learning rate.

    v ← step · ‖x‖ v / ‖v‖
    """

    def measure(v: jax.Array, x: jax.Array) -> jax.Array:
        length = jnp.linalg.norm(v)
        return step * jnp.linalg.norm(x) * v / jnp.where(length > 0, length, 1)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(measure, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def keep_norm() -> optax.GradientTransformation:
    """Keeps each matrix at the Euclidean norm that it has; the last stage.

        x ← ‖x‖ (x + u) / ‖x + u‖

    After `relative_step` and the learning rate it is Hyperball, Wen et al., arXiv:2606.16899
    (MuonH with Muon's direction).
    """

    def turn(u: jax.Array, x: jax.Array) -> jax.Array:
        there = x + u
        return jnp.linalg.norm(x) * there / jnp.linalg.norm(there) - x

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(turn, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _chain(rate: optax.Schedule, knobs: Knobs, *before: Any, after: Any = None) -> Any:
    return optax.chain(
        average_gradients(**averaging(knobs)),
        scale_by_lmo(balls(knobs), LABELS),
        *before,
        optax.scale_by_learning_rate(rate),
        *([after] if after else []),
    )


def _cautious(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    return _chain(rate, knobs, cautious_decay(knobs["decay"]))


def _anchored(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    return _chain(rate, knobs, after=anchor(knobs["strength"]))


def _hidden_only(stage: optax.GradientTransformation) -> optax.GradientTransformation:
    stages = {label: optax.identity() for label in ("embedding", "head")}
    return optax.multi_transform({**stages, "hidden": stage}, LABELS)


def _fixed_norm(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    """Hidden matrices keep their norm; embedding and head are as ever."""
    step = _hidden_only(relative_step(knobs["step"]))
    return _chain(rate, knobs, step, after=_hidden_only(keep_norm()))


_DECAYS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0)
OURS = ENTRANTS["unconstrained_scion"]


def entrants() -> dict[str, Entrant]:
    """Returns what is judged, each with the knob of its own."""
    return {
        "weight decay": Entrant(OURS.build, {"decay": 0.25}, {"decay": _DECAYS}),
        "cautious decay": Entrant(_cautious, {"decay": 0.25}, {"decay": _DECAYS}),
        "anchor": Entrant(_anchored, {"strength": 1.0}, {"strength": (0.5, 1.0)}),
        "fixed norm": Entrant(
            _fixed_norm,
            {"step": 0.5},
            {"step": (0.125, 0.25, 0.5, 1.0, 2.0), "hidden start": STARTS["hidden start"]},
        ),
    }
