"""The exponential average of gradients, how much of it is remembered, and the look ahead of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from scion_jax._checks import check_alike, check_leaves, check_momentum, check_schedule, value_at
from scion_jax._numerics import is_number, widest
from scion_jax._sharding import zeros_like
from scion_jax.transforms._rounding import buffer_dtypes, store


class AverageGradientsState(NamedTuple):
    """State of `average_gradients`.

    Attributes:
        count: Number of updates made, int32.
        average: The average `d`, like the parameters.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Any


def remember(buffer: jax.Array, momentum: ArrayLike) -> jax.Array:
    """Computes `(1 − α) · buffer`; nothing at all of it, not even a NaN, at α = 1.

    Args:
        buffer: An average or a sum of gradients.
        momentum: α; may be traced.

    Returns:
        Array of the buffer's shape and dtype.
    """
    alpha = jnp.asarray(momentum, buffer.dtype)
    kept = (1 - alpha) * buffer
    if is_number(momentum) and momentum != 1:
        return kept  # spares every leaf a comparison, in a graph that grows with them
    return jnp.where(alpha == 1, 0, kept)


def blend(old: jax.Array, new: jax.Array, weight: ArrayLike) -> jax.Array:
    """Computes `(1 − weight) · old + weight · new` in at least float32.

    Args:
        old: An average or a sum of gradients.
        new: A gradient, of the same shape.
        weight: α or ᾱ, in [0, 1]; may be traced. Nothing is left of `old` at 1.

    Returns:
        Array of the same shape; its dtype is the widest of both and float32.
    """
    dtype = widest(new.dtype, old.dtype, jnp.float32)
    taken = jnp.asarray(weight, dtype) * new.astype(dtype)
    return remember(old.astype(dtype), weight) + taken


def average_gradients(
    momentum: optax.ScalarOrSchedule,
    dtype: DTypeLike | None = None,
    optimism: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by their exponential average, or by what it is about to become.

        d_k = (1 − α) d_{k−1} + α g_k,    d_0 = 0
        d̄_k = (1 − ᾱ) d_k + ᾱ g_k

    The average is kept, `d̄` goes on to the next stage. With ᾱ = 0 it is the average itself; with
    ᾱ = α Nesterov's momentum, as Muon has it, up to scale.

    Args:
        momentum: α, in (0, 1]: one minus the usual momentum, so 0.1 here is 0.9 elsewhere. A
            schedule receives the number of updates made, 0 at the first call.
        dtype: Dtype of the stored average; None means the parameters'. One of 16 bits is rounded to
            stochastically: see `transforms/_rounding.py`.
        optimism: ᾱ, in [0, 1]: how far to look ahead, along the newest gradient. May be a schedule.

    Returns:
        A transformation; its updates are of at least float32, in which the average is taken: the
        smallest float16 gradients vanish when they are stored.

    Raises:
        TypeError: If `momentum` or `optimism` is neither a number nor a schedule, or `dtype` is not
            floating; at `update`, if the state holds another dtype that would lose something in
            this one.
        ValueError: If `momentum` is not in (0, 1] or `optimism` not in [0, 1]; at `update`, if a
            gradient has another shape than its average.

    Example:
        >>> import jax.numpy as jnp
        >>> average = average_gradients(0.5)
        >>> state = average.init(jnp.zeros(2))
        >>> average.update(jnp.array([4.0, -2.0]), state)[0]
        Array([ 2., -1.], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Alg. 1 and 2; optimism: Pethick et al.,
    *Optimistic Dual Averaging Unifies Modern Optimizers*, arXiv:2605.11172.
    """
    check_momentum(momentum, dtype)
    check_schedule("optimism", optimism, "optimism")

    def init(params: Any) -> AverageGradientsState:
        check_leaves(params, "the parameters")
        average = jax.tree.map(lambda p: zeros_like(p, dtype), params)
        return AverageGradientsState(jnp.zeros([], jnp.int32), average)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AverageGradientsState]:
        del extra_args
        check_alike(updates, state.average, "the gradients", "the average in the state")
        dtypes = buffer_dtypes(state.average, dtype, params)
        alpha = value_at("momentum", momentum, state.count, "momentum")
        ahead = value_at("optimism", optimism, state.count, "optimism")
        average = jax.tree.map(lambda g, d: blend(d, g, alpha), updates, state.average)
        stored = jax.tree.map(lambda d, kept: store(d, kept, state.count), average, dtypes)
        state = AverageGradientsState(jnp.asarray(optax.safe_increment(state.count)), stored)
        if is_number(ahead) and ahead == 0:  # spares a pass over memory
            return average, state
        return jax.tree.map(lambda g, d: blend(d, g, ahead), updates, average), state

    return optax.GradientTransformationExtraArgs(init, update)
