"""Clipping by the pairing `⟨d, w⟩`, over all parameters at once.

Near a solution a step of fixed length overshoots. Clipping shortens it by what it can gain (see
`scion_jax.pairing`). With one Euclidean norm that is the length of the gradient, and this gradient
clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from scion_jax import hyperparameters, numerics
from scion_jax.distributed import sharding
from scion_jax.pairing import pair
from scion_jax.trees import check_leaves


class ClipByPairingState(NamedTuple):
    """State of `clip_by_pairing`.

    Attributes:
        count: Number of updates made, int32.
        pairing: The last `⟨d, w⟩`, summed over all leaves, at least float32. To choose ρ, watch it.
        factor: What the last directions were multiplied by, in [0, 1].
        inner_state: State of the wrapped transformation.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    pairing: jax.Array
    factor: jax.Array
    inner_state: Any


def clip_by_pairing(
    inner: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    squared_norm: Callable[[Any], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens directions by how much they can gain.

        w ← min(1, ⟨d, w⟩ / ρ) w                 w = inner(d)
        w ← min(1, ⟨d, w⟩ / (ρ ‖w‖²)) w          with squared_norm

    `⟨d, w⟩ = Σ_l ⟨d_l, w_l⟩` over all leaves, whatever their label. Sign convention: `w` points
    uphill, as `lmo` does here, so `⟨d, w⟩ ≥ 0`, and Optax's learning-rate stage flips the sign.

    A leaf outside its ball can have `⟨d_l, w_l⟩ < 0`: the pull towards the ball would climb more
    than the LMO gains. The step must not climb, and a factor of 0 would stall all leaves, so what
    climbs is taken out of that leaf,

        w_l ← w_l − ⟨d_l, w_l⟩ d_l / ‖d_l‖²      (now ⟨d_l, w_l⟩ = 0)

    and counts for the factor by `min(|⟨d_l, w_l⟩|, ‖d_l‖ ‖w_l‖)`. The leaf moves inwards as far as
    that is level, and rests where nothing level is left (a scalar has no such direction: it could
    only climb, or leave further), holding up no other leaf. Parameters that start in their balls
    (`init_params`) never get there, but for the small error of an inexact LMO.

    Inside of `shard_map` a leaf that varies over mapped axes is a part of a larger one: pairings
    are summed over those axes (as types tell them: not with `check_vma=False`).

    A NaN or an infinity in one leaf makes the factor, and so all leaves, NaN.

    Args:
        inner: The stages that turn the average gradient `d` into the direction `w`.
        rho: ρ, positive: the pairing below which steps are shortened. May be a schedule, which
            receives the number of updates made.
        squared_norm: `‖w‖²`, a function of the tree of directions; None means 1.

    Returns:
        A transformation with state `ClipByPairingState`.

    Raises:
        TypeError: If `inner` is no transformation, `rho` neither a number nor a schedule, or
            `squared_norm` no function.
        ValueError: If `rho` is not positive.

    Example:
        >>> import jax.numpy as jnp, optax, scion_jax
        >>> lmo = scion_jax.scale_by_lmo(scion_jax.Euclidean())
        >>> clip = clip_by_pairing(lmo, rho=10.0)
        >>> d = jnp.array([3.0, 4.0])
        >>> w, state = clip.update(d, clip.init(d))
        >>> w.round(3), state.pairing.round(3), state.factor.round(3)
        (Array([0.3, 0.4], dtype=float32), Array(5., dtype=float32), Array(0.5, dtype=float32))

    Source: [C] Pethick et al., arXiv:2506.01913, Alg. 1 to 4.
    """
    hyperparameters.check_transformation("inner", inner)
    hyperparameters.check_schedule("rho", rho, above=0, below=math.inf)
    if squared_norm is not None and not callable(squared_norm):
        raise TypeError(f"squared_norm is a function of the directions; got {squared_norm!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ClipByPairingState:
        check_leaves(params, "the parameters")
        dtype = numerics.widest(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))
        # An array for each field: donation takes none twice.
        pairing, factor = jnp.zeros([], dtype), jnp.zeros([], dtype)
        return ClipByPairingState(jnp.zeros([], jnp.int32), pairing, factor, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        dtype = state.pairing.dtype
        ds, structure = jax.tree.flatten(updates)
        ws = structure.flatten_up_to(directions)
        pairing = gain = jnp.zeros([], dtype)
        for members in sharding.varying_alike(ds, ws):
            some_ds, some_ws = [ds[i] for i in members], [ws[i] for i in members]
            pairings = pair(some_ds, some_ws, dtype)
            d_lengths, w_lengths = jnp.split(_lengths([*some_ds, *some_ws], dtype), 2)
            pairing += jnp.sum(pairings)
            gain += jnp.sum(_gains(pairings, d_lengths, w_lengths))
            climbs = jnp.where(pairings < 0, pairings / numerics.nonzero(d_lengths), 0)
            shares = climbs / numerics.nonzero(d_lengths)
            for i, share in zip(members, shares, strict=True):
                # Without what climbs: w − ⟨d, w⟩ d / ‖d‖² if ⟨d, w⟩ < 0.
                ws[i] = (ws[i].astype(dtype) - share * ds[i].astype(dtype)).astype(ws[i].dtype)
        directions = jax.tree.unflatten(structure, ws)
        threshold = jnp.asarray(hyperparameters.value_at("rho", rho, state.count), dtype)
        if squared_norm is not None:
            threshold = threshold * squared_norm(directions).astype(dtype)
        # Not a minimum of quotients: 0/0 is to be 1, as ρ → 0 is the optimizer without clipping.
        quotient = gain / numerics.nonzero(threshold)
        factor = jnp.where(gain >= threshold, jnp.ones_like(quotient), quotient)
        directions = jax.tree.map(lambda w: (factor * w.astype(dtype)).astype(w.dtype), directions)
        count = jnp.asarray(optax.safe_increment(state.count))
        return directions, ClipByPairingState(count, pairing, factor, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _lengths(arrays: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Computes Euclidean norms `(len(arrays),)` over all devices that hold parts of an array."""
    lengths = numerics.vector_norms([array.astype(dtype) for array in arrays])
    largest = sharding.reduce_varying(jax.lax.pmax, lengths)
    squares = (lengths / numerics.nonzero(largest)) ** 2
    return largest * jnp.sqrt(sharding.reduce_varying(jax.lax.psum, squares))


def _gains(pairings: jax.Array, d_lengths: jax.Array, w_lengths: jax.Array) -> jax.Array:
    """Computes what leaves count for the factor, from their directions without the climb.

    The length of such a direction is `‖w‖ √(1 − cos²)`: no second pass, no second sum over devices.
    """
    sizes = d_lengths * w_lengths
    cosines = pairings / numerics.nonzero(sizes)
    level = sizes * jnp.sqrt(jnp.maximum(1 - cosines * cosines, 0))
    return jnp.where(pairings < 0, jnp.minimum(-pairings, level), pairings)
