"""The stages that optimizers are made of, each an Optax gradient transformation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from scion_jax import hyperparameters, resolution
from scion_jax.distributed.sharding import zeros_like
from scion_jax.distributed.spreading import check_names
from scion_jax.norms import Norm
from scion_jax.norms.leaves import Leaf, lmos
from scion_jax.numerics import is_number, widest
from scion_jax.resolution import Norms
from scion_jax.rounding import store
from scion_jax.trees import check_alike, check_leaves, only_where


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


def average_gradients(
    momentum: optax.ScalarOrSchedule, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by their exponential average.

        d_k = (1 − α) d_{k−1} + α g_k,    d_0 = 0

    Args:
        momentum: α, in (0, 1]: one minus the usual momentum, so 0.1 here is 0.9 elsewhere. A
            schedule receives the number of updates made, 0 at the first call.
        dtype: Dtype of the stored average; None means the parameters'. One of 16 bits is rounded to
            stochastically: see `scion_jax.rounding`.

    Returns:
        A transformation; its updates are of at least float32, in which the average is taken: the
        smallest float16 gradients vanish when they are stored.

    Raises:
        TypeError: If `momentum` is neither a number nor a schedule, or `dtype` is not floating.
        ValueError: If `momentum` is not in (0, 1]; at `update`, if a gradient has another shape
            than its average.

    Example:
        >>> import jax.numpy as jnp
        >>> average = average_gradients(0.5)
        >>> state = average.init(jnp.zeros(2))
        >>> average.update(jnp.array([4.0, -2.0]), state)[0]
        Array([ 2., -1.], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Alg. 1 and 2.
    """
    hyperparameters.check_momentum(momentum, dtype)

    def init(params: Any) -> AverageGradientsState:
        check_leaves(params, "the parameters")
        average = jax.tree.map(lambda p: zeros_like(p, dtype), params)
        return AverageGradientsState(jnp.zeros([], jnp.int32), average)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AverageGradientsState]:
        del params, extra_args
        check_alike(updates, state.average, "the gradients", "the average in the state")
        alpha = hyperparameters.value_at("momentum", momentum, state.count)

        def blend(g: jax.Array, d: jax.Array) -> jax.Array:
            compute = widest(g.dtype, d.dtype, jnp.float32)
            return remember(d.astype(compute), alpha) + jnp.asarray(alpha, compute) * g.astype(
                compute
            )

        average = jax.tree.map(blend, updates, state.average)

        def keep(new: jax.Array, d: jax.Array) -> jax.Array:
            return store(new, d.dtype, state.count)

        stored = jax.tree.map(keep, average, state.average)
        count = jnp.asarray(optax.safe_increment(state.count))
        return average, AverageGradientsState(count, stored)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_lmo(
    norm: Norm, shard_over: str | Sequence[str] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces every leaf by the LMO of a norm ball.

        v = lmo(d) = radius · argmax_{‖x‖ ≤ 1} ⟨d, x⟩

    Sign convention: this is the maximizer, the negative of the papers' `lmo`, so that Optax's
    learning-rate stage flips the sign.

    Args:
        norm: The norm, one for all leaves; route several with `optax.multi_transform`.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed.spreading`.

    Returns:
        A stateless transformation. Its updates have the parameters' dtype if parameters are given,
        else the dtype of what comes in.

    Raises:
        TypeError: If `norm` is not a norm; at `init` or `update`, if a leaf is not floating.
        ValueError: At `init` or `update`, if a leaf does not fit the layout; the message names it.
            At `update`, if `shard_over` names an axis that is not there.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> lmo = scale_by_lmo(scion_jax.Sign(normalized=False))
        >>> params = {"w": jnp.zeros((1, 2))}
        >>> lmo.update({"w": jnp.array([[3.0, -0.1]])}, lmo.init(params), params)[0]
        {'w': Array([[ 1., -1.]], dtype=float32)}

    Source: [S] Pethick et al., arXiv:2502.07529, Eq. 2.
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"scale_by_lmo needs a Norm such as Spectral(50.0); got {norm}")
    return checked(norm, None, scale_by_lmos(norm, None, shard_over))


def scale_by_lmos(
    norms: Norms, param_labels: Any, shard_over: str | Sequence[str] | None
) -> optax.GradientTransformation:
    """Replaces every leaf by the LMO of its own norm, matrices of one shape together.

    What `optax.multi_transform({label: scale_by_lmo(norm), …}, param_labels)` computes, with one
    iteration per shape of matrix, whatever its label.

    Args:
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels, as in `optax.multi_transform`; with a mapping only.
        shard_over: As in `scale_by_lmo`.

    Returns:
        A stateless transformation, to stand in `checked`.
    """
    resolution.check_norms(norms, param_labels)
    names = check_names(shard_over)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves = resolution.resolve(updates, norms, param_labels)
        ds, structure = jax.tree.flatten(updates)
        return structure.unflatten(lmos(leaves, ds, names)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def decay_weights(
    weight_decay: ArrayLike, norms: Norms, param_labels: Any
) -> optax.GradientTransformation:
    """Adds `μ x` to the updates of every leaf whose norm is constrained.

    Args:
        weight_decay: μ, at least 0; may be traced. With 1 the next stage makes the constrained
            step.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels; with a mapping only.

    Returns:
        A stateless transformation, to stand in `checked`.

    Raises:
        TypeError: If `weight_decay` is not a number.
        ValueError: If `weight_decay` is negative; at `update`, without parameters unless μ is a
            Python zero.
    """
    if callable(weight_decay):
        raise TypeError("weight_decay is a number; schedule it with optax.inject_hyperparams")
    hyperparameters.check_number("weight_decay", weight_decay, at_least=0, below=math.inf)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if is_number(weight_decay) and weight_decay == 0:
            return updates, state
        if params is None:  # Optax says so in its own words
            return optax.add_decayed_weights(1.0).update(updates, state, params)
        leaves = resolution.resolve(params, norms, param_labels)

        def decayed(leaf: Leaf, u: jax.Array, x: jax.Array) -> jax.Array:
            if not leaf.norm.constrained:
                return u
            # Not in the dtype of a traced μ, to which Optax's own stage would promote.
            dtype = widest(u.dtype, x.dtype)
            return u.astype(dtype) + jnp.asarray(weight_decay, dtype) * x.astype(dtype)

        us, structure = jax.tree.flatten(updates)
        xs = structure.flatten_up_to(params)
        return structure.unflatten(map(decayed, leaves, us, xs)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def descend(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies updates by `−γ`.

    Optax's `scale_by_learning_rate`, always by way of a schedule: that path casts γ to the dtype
    of each leaf, where the constant path would promote the leaf to the dtype of a traced γ.

    Args:
        learning_rate: γ; a schedule receives the number of updates made, 0 at the first call.

    Returns:
        A transformation whose state counts the updates.
    """
    return optax.scale_by_learning_rate(
        lambda count: hyperparameters.value_at("learning_rate", learning_rate, count)
    )


def checked(
    norms: Norms, param_labels: Any, *stages: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Chains stages behind a check that every leaf can be read, before any buffer is made.

    Args:
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels; with a mapping only.
        *stages: The stages, first to last.

    Returns:
        `optax.chain(*stages)`, that names the leaf where parameters, gradients, norms and labels do
        not fit each other, warns of norms and rules that no leaf uses, and overlooks what `params`
        holds where there is no gradient (an Equinox model's functions). Its updates have the
        parameters' dtype, or without parameters the gradients'.
    """
    chain = optax.with_extra_args_support(stages[0] if len(stages) == 1 else optax.chain(*stages))

    def init(params: Any) -> Any:
        resolution.resolve(params, norms, param_labels)
        resolution.warn_of_unused(params, norms, param_labels)
        return chain.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is not None:
            params = only_where(updates, params)
            check_alike(updates, params, "the gradients", "the parameters")
        else:
            check_leaves(updates, "the gradients")
        # NumPy's float64 is float32 here, unless JAX is told otherwise.
        updates, params = jax.tree.map(jnp.asarray, (updates, params))
        steps, state = chain.update(updates, state, params, **extra_args)
        like = updates if params is None else params
        return jax.tree.map(lambda step, x: step.astype(x.dtype), steps, like), state

    return optax.GradientTransformationExtraArgs(init, update)
