"""Clipping by the pairing `⟨d, w⟩`, over all parameters at once.

It is how much a step along `w` can gain, to first order and per unit of learning rate: in the
unconstrained case the dual norm of the gradient, in the constrained one the Frank–Wolfe gap. Near a
solution it vanishes, where a step of fixed length overshoots; clipping shortens the step by it.
With one Euclidean norm it is the length of the gradient, and this gradient clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scion_jax import _numerics as numerics
from scion_jax import _sharding as sharding
from scion_jax._checks import check_leaves, check_schedule, value_at


class ClipByPairingState(NamedTuple):
    """State of `clip_by_pairing`.

    Attributes:
        count: Number of updates made, int32.
        pairing: The last `⟨d, w⟩`, summed over all leaves, at least float32. To choose ρ, watch it.
        factor: What the last directions were multiplied by, in [0, 1].
        pairings: `⟨d_l, w_l⟩` of each leaf, `(leaves,)`, in the order of `jax.tree.leaves`; None
            unless asked for.
        inner_state: State of the wrapped transformation.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    pairing: jax.Array
    factor: jax.Array
    pairings: Any
    inner_state: Any


def clip_by_pairing(
    inner: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    squared_norm: Callable[[Any], jax.Array] | None = None,
    per_leaf: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shortens directions by how much they can gain, and keeps how much that is.

        w ← min(1, ⟨d, w⟩ / ρ) w                 w = inner(d)
        w ← min(1, ⟨d, w⟩ / (ρ ‖w‖²)) w          with squared_norm

    `⟨d, w⟩ = Σ_l ⟨d_l, w_l⟩` over all leaves, whatever their label. Sign convention: `w` points
    uphill, as `lmo` does here, so `⟨d, w⟩ ≥ 0`, and Optax's learning-rate stage flips the sign.
    With ρ = 0 nothing is changed, and the state tells which ρ to choose.

    Outside its ball a leaf can have `⟨d_l, w_l⟩ < 0`, where the pull towards the ball climbs more
    than the LMO gains. It counts for the factor by its absolute value, so that it is pulled inwards
    and holds up no other leaf. Parameters that start in their balls (`init_params`) never get
    there, but for the small error of an inexact LMO.

    Inside of `shard_map` a leaf that varies over mapped axes is a part of a larger one: pairings
    are summed over those axes (as types tell them: not with `check_vma=False`).

    A NaN or an infinity in one leaf makes the factor, and so all leaves, NaN.

    Args:
        inner: The stages that turn the average gradient `d` into the direction `w`.
        rho: ρ, at least 0: the pairing below which steps are shortened. May be a schedule, which
            receives the number of updates made.
        squared_norm: `‖w‖²`, a function of the tree of directions; None means 1.
        per_leaf: Whether the state keeps the pairing of each leaf as well.

    Returns:
        A transformation with state `ClipByPairingState`.

    Raises:
        TypeError: If `rho` is neither a number nor a schedule.
        ValueError: If `rho` is negative.

    Example:
        >>> import jax.numpy as jnp, optax, scion_jax
        >>> lmo = scion_jax.scale_by_lmo(scion_jax.Euclidean())
        >>> clip = clip_by_pairing(lmo, rho=10.0)
        >>> d = jnp.array([3.0, 4.0])
        >>> w, state = clip.update(d, clip.init(d))
        >>> w.round(3), state.pairing.round(3), state.factor.round(3)
        (Array([0.3, 0.4], dtype=float32), Array(5., dtype=float32), Array(0.5, dtype=float32))

    Source: [C] Pethick et al., arXiv:2506.01913, Alg. 1 to 4; Fig. 8 and 11 draw the pairing.
    """
    check_schedule("rho", rho, "rho")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ClipByPairingState:
        check_leaves(params, "the parameters")
        leaves = jax.tree.leaves(params)
        dtype = numerics.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
        # An array for each field: donation takes none twice.
        pairing, factor = jnp.zeros([], dtype), jnp.zeros([], dtype)
        pairings = jnp.zeros([len(leaves)], dtype) if per_leaf else None
        count = jnp.zeros([], jnp.int32)
        return ClipByPairingState(count, pairing, factor, pairings, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        dtype = state.pairing.dtype
        pairings = _pairings(updates, directions, dtype)
        if per_leaf and state.pairings.shape != pairings.shape:
            raise ValueError(
                f"the gradients have {pairings.size} leaves, but the state keeps the pairings of "
                f"{state.pairings.size}; give the parameters that the state was made for"
            )
        gain = jnp.sum(jnp.abs(pairings))
        threshold = jnp.asarray(value_at("rho", rho, state.count, "rho"), dtype)
        if squared_norm is not None:
            threshold = threshold * squared_norm(directions).astype(dtype)
        # Not a minimum of quotients: 0/0 is to be 1, as ρ → 0 is the optimizer without clipping.
        quotient = gain / numerics.nonzero(threshold)
        factor = jnp.where(gain >= threshold, jnp.ones_like(quotient), quotient)
        directions = jax.tree.map(lambda w: (factor * w.astype(dtype)).astype(w.dtype), directions)
        count = jnp.asarray(optax.safe_increment(state.count))
        kept = pairings if per_leaf else None
        return directions, ClipByPairingState(count, jnp.sum(pairings), factor, kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _pairings(updates: Any, directions: Any, dtype: jnp.dtype) -> jax.Array:
    """Computes `⟨d_l, w_l⟩` of all leaves, over all devices that hold parts of them."""
    ds, structure = jax.tree.flatten(updates)
    ws = structure.flatten_up_to(directions)
    own = [numerics.inner_product(d, w).astype(dtype) for d, w in zip(ds, ws, strict=True)]
    groups = sharding.varying_alike(own)
    summed = [
        sharding.reduce_varying(jax.lax.psum, jnp.stack([own[i] for i in group]))
        for group in groups
    ]
    order = np.argsort(np.concatenate([*groups, np.zeros(0, int)]))
    return jnp.concatenate([*summed, jnp.zeros(0, dtype)])[order]
