"""ClippedScion: Scion whose steps shrink as there is less left to gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from scion_jax import _sharding as sharding
from scion_jax._leaves import Norms, read_leaves
from scion_jax._numerics import widest
from scion_jax.distributed import check_shard_over
from scion_jax.norms import Auto, gauge_bounds
from scion_jax.transforms import (
    average_gradients,
    chain,
    clip_by_pairing,
    decay_weights,
    descend,
    scale_by_lmo,
)


def unconstrained_clipped_scion(
    learning_rate: optax.ScalarOrSchedule,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    rho: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.1,
    momentum_dtype: DTypeLike | None = None,
    optimism: optax.ScalarOrSchedule = 0.0,
    per_leaf: bool = False,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Unconstrained ClippedScion: gradient clipping by the dual norm, for any norm (GGNC).

        d ← (1 − α) d + α g
        v = lmo(d)
        x ← x − γρ min(1, ⟨d, v⟩ / ρ) v        ⟨d, v⟩ = ‖d‖_*, over all parameters

    Above ρ it is `unconstrained_scion`, below it steepest descent with step size γ. Sign
    convention: `lmo` is the maximizer of `⟨d, ·⟩`, the negative of the paper's.

    Args:
        learning_rate: γρ, the largest step, so that a learning rate of `unconstrained_scion`
            carries over; γ alone is `learning_rate / rho`. May be a schedule.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels of the parameters, as in `scion`; with a mapping only.
        rho: ρ, at least 0: the dual norm below which steps shorten. May be a schedule. Choose it by
            the `pairing` that the state keeps.
        momentum: α, in (0, 1]: one minus the usual momentum. May be a schedule.
        momentum_dtype: Dtype of the stored average; None means the parameters'.
        optimism: ᾱ, in [0, 1]: `(1 − ᾱ) d + ᾱ g` takes the place of `d`, for the pairing
            as well; ᾱ = α is Nesterov's momentum, as Muon has it. May be a schedule.
        per_leaf: Keep the pairing of each leaf in the state, too; see `pairings`.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A transformation; `update` does not need `params`. The state holds a `ClipByPairingState`:
        `optax.tree.get(state, "pairing")`.

    Raises:
        TypeError: If `norms` is none of these, a dtype is not floating, or a hyperparameter no
            number.
        ValueError: If norms and labels do not belong together, a hyperparameter is out of its
            range, or a leaf does not fit its norm's layout.

    Example:
        >>> import jax.numpy as jnp, optax, scion_jax
        >>> optimizer = scion_jax.unconstrained_clipped_scion(
        ...     0.5, scion_jax.Euclidean(), rho=10.0, momentum=1.0)
        >>> gradient = jnp.array([3.0, 4.0])
        >>> updates, state = optimizer.update(gradient, optimizer.init(gradient))
        >>> updates.round(3), optax.tree.get(state, "pairing").round(3)
        (Array([-0.15, -0.2 ], dtype=float32), Array(5., dtype=float32))

    Source: [C] Pethick et al., arXiv:2506.01913, Alg. 1 (GGNC) and 3; optimism: arXiv:2605.11172.
    """
    return chain(
        average_gradients(momentum, momentum_dtype, optimism),
        clip_by_pairing(scale_by_lmo(norms, param_labels, shard_over), rho, per_leaf=per_leaf),
        descend(learning_rate),
    )


def clipped_scion(
    learning_rate: optax.ScalarOrSchedule,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    rho: optax.ScalarOrSchedule,
    short_step: bool = False,
    momentum: optax.ScalarOrSchedule = 0.1,
    momentum_dtype: DTypeLike | None = None,
    optimism: optax.ScalarOrSchedule = 0.0,
    per_leaf: bool = False,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ClippedScion: Scion with the Frank–Wolfe short step, clipped.

        d ← (1 − α) d + α g
        w = x + lmo(d)
        x ← x − γρ min(1, ⟨d, w⟩ / ρ) w                      (variant 2, the default)
        x ← x − γρ min(1, ⟨d, w⟩ / (ρ max_l ‖w_l‖_l² / r_l²)) w    (variant 1, `short_step`)

    `⟨d, w⟩` is the Frank–Wolfe gap, over all parameters: the step shrinks with it, so the iterates
    settle where `scion` with a constant learning rate would keep jumping. Variant 2 bounds `‖w‖` by
    the diameter of the ball; the paper's factor 4 is absorbed in ρ. Variant 1 asks for `‖w‖`
    itself, for `Spectral` by a bound from matrix products that is up to 3 % high at 2,048 rows and
    not low (see `polar/_bound.py`), so the step is a little shorter than the exact
    one.

    Parameters outside their balls: see `clip_by_pairing`; start with `init_params`. Sign
    convention: `lmo` is the maximizer of `⟨d, ·⟩`, the negative of the paper's.

    Args:
        learning_rate: γρ, the largest step, in [0, 1], so that a learning rate of `scion` carries
            over; γ alone is `learning_rate / rho`. May be a schedule.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels of the parameters, as in `scion`; with a mapping only.
        rho: ρ, at least 0: the gap below which steps shorten; published: 600 (nanoGPT 124M), 6000
            (1B), 1600 (airbench), 8000 (DeiT). May be a schedule. Choose it by the `pairing` that
            the state keeps.
        short_step: Use variant 1.
        momentum: α, in (0, 1]: one minus the usual momentum. May be a schedule.
        momentum_dtype: Dtype of the stored average; None means the parameters'.
        optimism: ᾱ, in [0, 1]: `(1 − ᾱ) d + ᾱ g` takes the place of `d`, for the pairing
            as well; ᾱ = α is Nesterov's momentum, as Muon has it. May be a schedule.
        per_leaf: Keep the pairing of each leaf in the state, too; see `pairings`.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A transformation; `update` needs `params`. The state holds a `ClipByPairingState`:
        `optax.tree.get(state, "pairing")`.

    Raises:
        TypeError: If `norms` is none of these, a dtype is not floating, or a hyperparameter no
            number.
        ValueError: If norms and labels do not belong together, a hyperparameter is out of its
            range, a leaf does not fit its norm's layout, or `params` is missing (at `update`).

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> optimizer = scion_jax.clipped_scion(0.5, scion_jax.Euclidean(), rho=10.0, momentum=1.0)
        >>> x, gradient = jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0])
        >>> optimizer.update(gradient, optimizer.init(x), x)[0].round(3)
        Array([-0.15, -0.2 ], dtype=float32)

    Source: [C] Pethick et al., arXiv:2506.01913, Alg. 2 and 4 (variants 2 and 1), App. C;
    optimism: arXiv:2605.11172.
    """
    directions = optax.chain(
        scale_by_lmo(norms, param_labels, shard_over), decay_weights(1.0, norms, param_labels)
    )
    squared_norm = _squared_norm(norms, param_labels, shard_over) if short_step else None
    return chain(
        average_gradients(momentum, momentum_dtype, optimism),
        clip_by_pairing(directions, rho, squared_norm, per_leaf),
        descend(learning_rate, constrained=True),
    )


def _squared_norm(
    norms: Norms, param_labels: Any, shard_over: str | Sequence[str] | None
) -> Callable[[Any], jax.Array]:
    """Makes the function `w ↦ max_l ‖w_l‖_l² / r_l²`, from above."""
    names = check_shard_over(shard_over)

    def squared_norm(directions: Any) -> jax.Array:
        leaves = read_leaves(directions, norms, param_labels)
        bounds = gauge_bounds(leaves, jax.tree.leaves(directions), names)
        dtype = widest(jnp.float32, *(bound.dtype for bound in bounds))
        largest = jnp.zeros([], dtype)
        for members in sharding.varying_alike(bounds):
            some = jnp.max(jnp.stack([bounds[index].astype(dtype) for index in members]))
            largest = jnp.maximum(largest, sharding.reduce_varying(jax.lax.pmax, some))
        return largest**2

    return squared_norm
