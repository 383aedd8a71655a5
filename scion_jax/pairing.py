"""The pairing `⟨d, w⟩` of the average gradient with the direction of a step.

It is how much a step can gain, to first order and per unit of learning rate: in the unconstrained
case the dual norm of the gradient, in the constrained one the Frank–Wolfe gap. Near a solution it
vanishes. Clipped optimizers shorten their steps by it, the others may show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scion_jax import hyperparameters, numerics
from scion_jax.distributed import sharding
from scion_jax.trees import check_leaves


class MeasurePairingState(NamedTuple):
    """State of `measure_pairing`.

    Attributes:
        pairing: The last `⟨d, w⟩`, summed over all leaves, at least float32.
        pairings: `⟨d_l, w_l⟩` of each leaf, `(leaves,)`, in the order of `jax.tree.leaves`.
        inner_state: State of the wrapped transformation.
    """

    pairing: jax.Array
    pairings: jax.Array
    inner_state: Any


def measure_pairing(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps in the state how much a step can gain, and changes nothing.

        ⟨d, w⟩ = Σ_l ⟨d_l, w_l⟩        w = inner(d)

    Sign convention: `w` points uphill, as `lmo` does here, so `⟨d, w⟩ ≥ 0`, but for parameters
    outside their balls. `scion(…, show_pairing=True)` has this stage; its `pairing` is where to
    choose the ρ of `clipped_scion`, and `pairings` tells the share of each layer.

    Args:
        inner: The stages that turn the average gradient `d` into the direction `w`.

    Returns:
        A transformation with state `MeasurePairingState`.

    Raises:
        TypeError: If `inner` is no transformation.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> measured = measure_pairing(scion_jax.scale_by_lmo(scion_jax.Euclidean()))
        >>> d = jnp.array([3.0, 4.0])
        >>> w, state = measured.update(d, measured.init(d))
        >>> state.pairing.round(3)
        Array(5., dtype=float32)

    Source: [C] Pethick et al., arXiv:2506.01913, Fig. 8 and 11, which draw it.
    """
    hyperparameters.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> MeasurePairingState:
        check_leaves(params, "the parameters")
        leaves = jax.tree.leaves(params)
        dtype = numerics.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
        pairings = jnp.zeros([len(leaves)], dtype)
        return MeasurePairingState(jnp.zeros([], dtype), pairings, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        ds, structure = jax.tree.flatten(updates)
        ws = structure.flatten_up_to(directions)
        if len(ds) != state.pairings.size:
            raise ValueError(
                f"the gradients have {len(ds)} leaves, but the state keeps the pairings of "
                f"{state.pairings.size}; give the parameters that the state was made for"
            )
        dtype = state.pairing.dtype
        groups = sharding.varying_alike(ds, ws)
        measured = [pair([ds[i] for i in some], [ws[i] for i in some], dtype) for some in groups]
        order = np.argsort(np.concatenate([*groups, np.zeros(0, int)]))
        pairings = jnp.concatenate([*measured, jnp.zeros(0, dtype)])[order]
        return directions, MeasurePairingState(jnp.sum(pairings), pairings, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def pair(ds: Sequence[jax.Array], ws: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Computes `⟨d, w⟩` of leaves, over all devices that hold parts of them.

    Args:
        ds: The leaves, which vary over the same mapped axes (`sharding.varying_alike`).
        ws: Their directions.
        dtype: Of the result.

    Returns:
        Array `(len(ds),)`.
    """
    own = [numerics.inner_product(d, w).astype(dtype) for d, w in zip(ds, ws, strict=True)]
    return sharding.reduce_varying(jax.lax.psum, jnp.stack(own))
