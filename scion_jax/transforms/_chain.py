"""How stages become an optimizer: what comes before the first, and after the last."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scion_jax._checks import check_alike, check_leaves, check_schedule, only_where, value_at


def chain(*stages: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chains stages, and sees to it that parameters and gradients fit each other.

    Args:
        *stages: The stages, first to last.

    Returns:
        `optax.chain(*stages)`, that names the leaf where parameters and gradients do not fit each
        other, and overlooks what `params` holds where there is no gradient (an Equinox model's
        functions). Its updates have the parameters' dtype, or without parameters the gradients'.
    """
    chained = optax.with_extra_args_support(stages[0] if len(stages) == 1 else optax.chain(*stages))

    def init(params: Any) -> Any:
        check_leaves(params, "the parameters")  # before JAX finds what is no array
        with warnings.catch_warnings(action="ignore"):  # they come below
            jax.eval_shape(chained.init, params)  # refuses what does not fit, before making buffers
        return chained.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None:
            check_leaves(updates, "the gradients")
        else:
            params = only_where(updates, params)
            check_alike(updates, params, "the gradients", "the parameters")
        # NumPy's float64 is float32 here, unless JAX is told otherwise.
        updates, params = jax.tree.map(jnp.asarray, (updates, params))
        steps, state = chained.update(updates, state, params, **extra_args)
        like = updates if params is None else params
        return jax.tree.map(lambda step, x: step.astype(x.dtype), steps, like), state

    return optax.GradientTransformationExtraArgs(init, update)


def descend(
    learning_rate: optax.ScalarOrSchedule, constrained: bool = False
) -> optax.GradientTransformation:
    """Multiplies updates by `−γ`.

    Optax's `scale_by_learning_rate`, always by way of a schedule: that path casts γ to the dtype
    of each leaf, where the constant path would promote the leaf to the dtype of a traced γ.

    Args:
        learning_rate: γ; a schedule receives the number of updates made, 0 at the first call.
        constrained: Whether a schedule is clipped at 1, which goes all the way.

    Returns:
        A transformation whose state counts the updates.
    """
    kind = "step" if constrained else "learning_rate"
    check_schedule(kind, learning_rate, "learning_rate")
    return optax.scale_by_learning_rate(
        lambda count: value_at(kind, learning_rate, count, "learning_rate")
    )
