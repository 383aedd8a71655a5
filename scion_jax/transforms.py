"""The stages that optimizers are made of, each an Optax gradient transformation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from scion_jax.distributed.sharding import zeros_like
from scion_jax.distributed.spreading import check_names
from scion_jax.labels import Norms, check_norms, labels_of, norms_of
from scion_jax.norms import Norm
from scion_jax.numerics import is_number, widest


class AverageGradientsState(NamedTuple):
    """State of `average_gradients`.

    Attributes:
        count: Number of updates made, int32.
        average: The average `d`, like the parameters.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Any


def check_momentum(momentum: optax.ScalarOrSchedule, dtype: DTypeLike | None) -> None:
    """Checks, when an optimizer is built, what can be known about its momentum.

    Args:
        momentum: α, a number or a schedule; traced values are not looked at.
        dtype: Dtype of its buffer, or None.

    Raises:
        TypeError: If `dtype` is not floating.
        ValueError: If a constant `momentum` is not in (0, 1].
    """
    if is_number(momentum) and not 0 < momentum <= 1:
        raise ValueError(
            f"momentum must be in (0, 1]: it is 1 minus the usual momentum; got {momentum}"
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"the average needs a floating dtype; got {jnp.dtype(dtype)}")


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
        dtype: Dtype of the stored average; None means the parameters'.

    Returns:
        A transformation; its updates have the wider one of the gradients' dtype and `dtype`. The
        average is taken in at least float32.

    Raises:
        TypeError: If `dtype` is not floating.
        ValueError: If a constant `momentum` is not in (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> average = average_gradients(0.5)
        >>> state = average.init(jnp.zeros(2))
        >>> average.update(jnp.array([4.0, -2.0]), state)[0]
        Array([ 2., -1.], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Alg. 1 and 2.
    """
    check_momentum(momentum, dtype)

    def init(params: Any) -> AverageGradientsState:
        average = jax.tree.map(lambda p: zeros_like(p, dtype), params)
        return AverageGradientsState(jnp.zeros([], jnp.int32), average)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AverageGradientsState]:
        del params, extra_args
        alpha = momentum(state.count) if callable(momentum) else momentum

        def blend(g: jax.Array, d: jax.Array) -> jax.Array:
            compute = widest(g.dtype, d.dtype, jnp.float32)
            return remember(d.astype(compute), alpha) + jnp.asarray(alpha, compute) * g.astype(
                compute
            )

        average = jax.tree.map(blend, updates, state.average)
        stored = jax.tree.map(lambda new, d: new.astype(d.dtype), average, state.average)
        emitted = jax.tree.map(
            lambda new, g, d: new.astype(widest(g.dtype, d.dtype)),
            average,
            updates,
            state.average,
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return emitted, AverageGradientsState(count, stored)

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
        shard_over: Names of the mesh axes over which stacks of matrices are spread, so that every
            device orthogonalizes whole matrices of its own; see `scion_jax.distributed.spreading`. Not needed
            on an Explicit mesh.

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

    names = check_names(shard_over)

    def init(params: Any) -> optax.EmptyState:
        norms_of(params, norm, None)  # names a leaf that does not fit
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        norms_of(updates, norm, None)
        leaves, structure = jax.tree.flatten(updates)
        directions = jax.tree.unflatten(structure, norm.lmo_leaves(leaves, names))
        if params is not None:
            directions = jax.tree.map(lambda v, p: v.astype(p.dtype), directions, params)
        return directions, state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_lmos(
    norms: Norms, param_labels: Any = None, shard_over: str | Sequence[str] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces every leaf by the LMO of its own norm: `scale_by_lmo`, routed by labels.

    Args:
        norms: One norm, or a mapping from labels to norms.
        param_labels: A tree or prefix of labels, or a function from the tree to one, as in
            `optax.multi_transform`; None with a single norm.
        shard_over: As in `scale_by_lmo`.

    Returns:
        A stateless transformation.

    Raises:
        TypeError: If `norms` is neither a norm nor a mapping to norms.
        ValueError: If norms and labels do not belong together; at `init` or `update`, if a label
            has no norm.
    """
    check_norms(norms, param_labels)
    if isinstance(norms, Norm):
        return scale_by_lmo(norms, shard_over)
    table: Mapping[Hashable, Norm] = dict(norms)
    return optax.multi_transform(
        {label: scale_by_lmo(norm, shard_over) for label, norm in table.items()},
        lambda tree: labels_of(tree, table, param_labels),
    )


def decay_weights(weight_decay: ArrayLike) -> optax.GradientTransformation:
    """Adds `μ x` to the updates.

    Optax's `add_decayed_weights`, with μ cast to each parameter's dtype (Optax would promote the
    updates to the dtype of a traced μ), and without a need for parameters if μ is plainly 0.

    Args:
        weight_decay: μ, at least 0; may be traced.

    Returns:
        A stateless transformation.

    Raises:
        TypeError: If `weight_decay` is a schedule.
        ValueError: If a constant `weight_decay` is negative; at `update`, without parameters unless
            μ is a Python zero.
    """
    if callable(weight_decay):
        raise TypeError("weight_decay is a number; schedule it with optax.inject_hyperparams")
    if is_number(weight_decay) and not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0; got {weight_decay}")
    add_weights = optax.add_decayed_weights(1.0)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if is_number(weight_decay) and weight_decay == 0:
            return updates, state
        if params is not None:
            params = jax.tree.map(lambda p: jnp.asarray(weight_decay, p.dtype) * p, params)
        return add_weights.update(updates, state, params)

    return optax.GradientTransformation(add_weights.init, update)


def descend(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies updates by `−γ`, in the parameters' dtype if parameters are given.

    Optax's `scale_by_learning_rate`, always by way of a schedule: that path casts γ to the dtype
    of each leaf, where the constant path would promote the leaf to the dtype of a traced γ.

    Args:
        learning_rate: γ; a schedule receives the number of updates made, 0 at the first call.

    Returns:
        A transformation whose state counts the updates.
    """
    schedule = learning_rate if callable(learning_rate) else lambda count: learning_rate
    scale = optax.scale_by_learning_rate(schedule)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is not None:
            updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        return scale.update(updates, state, params)

    return optax.GradientTransformation(scale.init, update)
