"""From directions to extreme points of balls, and the pull towards zero that keeps in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from scion_jax._checks import check_alike, check_number, warn
from scion_jax._leaves import (
    Norms,
    all_norms,
    check_norms,
    labelled_norms,
    read_leaves,
    unused,
)
from scion_jax._numerics import is_number, widest
from scion_jax.distributed import check_shard_over
from scion_jax.norms import Auto, lmos


def scale_by_lmo(
    norms: Norms = Auto(),
    param_labels: Any = None,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    """Replaces every leaf by the LMO of its norm ball, matrices of one shape together.

        v = lmo(d) = radius · argmax_{‖x‖ ≤ 1} ⟨d, x⟩

    Sign convention: this is the maximizer, the negative of the papers' `lmo`, so that Optax's
    learning-rate stage flips the sign. With several norms it computes what
    `optax.multi_transform({label: scale_by_lmo(norm), …}, param_labels)` does, with one iteration
    per shape of matrix, whatever its label.

    Args:
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels, as in `optax.multi_transform`; with a mapping only.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A stateless transformation. Its updates have the dtype of what comes in.

    Raises:
        TypeError: If `norms` is none of these; at `init` or `update`, if a leaf is not floating.
        ValueError: If norms and labels do not belong together; at `init` or `update`, if a leaf
            does not fit its norm's layout; the message names it. At `update`, if `shard_over` names
            an axis that is not there.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> lmo = scale_by_lmo(scion_jax.Sign(normalized=False))
        >>> params = {"w": jnp.zeros((1, 2))}
        >>> lmo.update({"w": jnp.array([[3.0, -0.1]])}, lmo.init(params), params)[0]
        {'w': Array([[ 1., -1.]], dtype=float32)}

    Source: [S] Pethick et al., arXiv:2502.07529, Eq. 2.
    """
    check_norms(norms, param_labels)
    names = check_shard_over(shard_over)

    def init(params: Any) -> optax.EmptyState:
        read_leaves(params, norms, param_labels)
        for sentence in unused(params, norms, param_labels):
            warn(sentence)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves = read_leaves(updates, norms, param_labels)
        ds, structure = jax.tree.flatten(updates)
        return structure.unflatten(lmos(leaves, ds, names)), state

    return optax.GradientTransformation(init, update)


def decay_weights(
    weight_decay: ArrayLike = 1.0, norms: Norms = Auto(), param_labels: Any = None
) -> optax.GradientTransformation:
    """Adds `μ x` to the updates of every leaf whose norm is constrained.

        w = v + μ x

    After `scale_by_lmo`, the ball of radius `radius/μ` becomes the constraint set; with μ = 1 the
    learning-rate stage then makes the step of `scion`, `x ← (1 − γ) x − γ v`.

    Args:
        weight_decay: μ, at least 0; may be traced.
        norms: As in `scale_by_lmo`; asked for `constrained` only.
        param_labels: As in `scale_by_lmo`.

    Returns:
        A stateless transformation. Its updates have the wider dtype of updates and parameters where
        weights decay.

    Raises:
        TypeError: If `weight_decay` is not a number (schedule it with `optax.inject_hyperparams`),
            or `norms` none of these.
        ValueError: If `weight_decay` is negative, or norms and labels do not belong together; at
            `update`, without parameters unless μ is a Python zero.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> decay = decay_weights(0.5, scion_jax.Euclidean())
        >>> decay.update(jnp.array([1.0, 0.0]), decay.init(None), jnp.array([2.0, 2.0]))[0]
        Array([2., 1.], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (weight decay).
    """
    check_number("weight_decay", weight_decay, "weight_decay")
    check_norms(norms, param_labels)
    some_are_free = not all(norm.constrained for norm in all_norms(norms))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if is_number(weight_decay) and weight_decay == 0:
            return updates, state
        if params is None:  # Optax says so in its own words
            return optax.add_decayed_weights(1.0).update(updates, state, params)
        check_alike(updates, params, "the updates", "the parameters")

        us, structure = jax.tree.flatten(updates)
        constrained = [True] * len(us)
        if some_are_free:
            chosen = labelled_norms(params, norms, param_labels)
            constrained = [norm.constrained for _, norm in chosen]

        def decayed(u: jax.Array, x: jax.Array) -> jax.Array:
            # Not in the dtype of a traced μ, to which Optax's own stage would promote.
            dtype = widest(u.dtype, x.dtype)
            return u.astype(dtype) + jnp.asarray(weight_decay, dtype) * x.astype(dtype)

        xs = jax.tree.leaves(params)
        ws = [decayed(u, x) if c else u for u, x, c in zip(us, xs, constrained, strict=True)]
        return structure.unflatten(ws), state

    return optax.GradientTransformation(optax.init_empty_state, update)
