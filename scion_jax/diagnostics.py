"""What to look at while training: where parameters stand in their balls, and how far from done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scion_jax import numerics
from scion_jax.norms import Auto
from scion_jax.norms.leaves import Leaf
from scion_jax.resolution import Norms, resolve
from scion_jax.trees import check_alike


class DualNorm(NamedTuple):
    """Dual norms of a tree of gradients.

    Attributes:
        leaves: `radius_l · ‖d_l‖_{l,*}`, a tree of scalars.
        total: Their sum, the dual of the product norm.
    """

    leaves: Any
    total: jax.Array


def gauges(params: Any, norms: Norms = Auto(), param_labels: Any = None) -> Any:
    """Computes the gauge of every parameter: at most 1 inside its ball.

        ‖x_l‖_l / radius_l

    Args:
        params: Parameters.
        norms: As given to the optimizer.
        param_labels: As given to the optimizer.

    Returns:
        A tree like `params` of scalars, float32 or float64. Exact: spectral norms take an SVD.

    Raises:
        ValueError: If norms and labels do not fit the parameters; the message names the leaf.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> gauges({"w": 3 * jnp.eye(2)}, scion_jax.Spectral(radius=2.0))
        {'w': Array(1.5, dtype=float32)}
    """
    leaves = resolve(params, norms, param_labels)
    return _for_each(leaves, params, lambda leaf, x: leaf.norm.gauge(x))


def dual_norm(grads: Any, norms: Norms = Auto(), param_labels: Any = None) -> DualNorm:
    """Computes the dual norm of gradients, per leaf and in total.

        ‖d‖_* = Σ_l radius_l ‖d_l‖_{l,*}

    This is what `unconstrained_clipped_scion` compares with ρ.

    Args:
        grads: Gradients, or their average.
        norms: As given to the optimizer.
        param_labels: As given to the optimizer.

    Returns:
        The dual norm of each leaf, and the sum.

    Raises:
        ValueError: If norms and labels do not fit the gradients; the message names the leaf.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> dual_norm({"b": jnp.array([3.0, 4.0])}, scion_jax.Euclidean(radius=2.0)).total
        Array(10., dtype=float32)
    """
    leaves = resolve(grads, norms, param_labels)
    dual_norms = _for_each(leaves, grads, lambda leaf, d: leaf.norm.dual_norm(d))
    return DualNorm(dual_norms, _total(dual_norms))


def frank_wolfe_gap(
    params: Any, grads: Any, norms: Norms = Auto(), param_labels: Any = None
) -> jax.Array:
    """Computes the Frank–Wolfe gap: zero at a stationary point of the constrained problem.

        max_{‖u‖ ≤ 1} ⟨d, x − u⟩ = ⟨d, x⟩ + ‖d‖_*

    At least 0 inside the balls; for a convex objective at least `f(x) − min f` over the balls.

    Args:
        params: Parameters `x`.
        grads: Gradients `d` at `x`.
        norms: As given to the optimizer.
        param_labels: As given to the optimizer.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If norms and labels do not fit.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> x, d = jnp.array([-0.6, -0.8]), jnp.array([3.0, 4.0])
        >>> frank_wolfe_gap(x, d, scion_jax.Euclidean()).round(3)
        Array(0., dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 5; [C] arXiv:2506.01913, Sec. 4.
    """
    check_alike(params, grads, "the parameters", "the gradients")
    products = jax.tree.map(numerics.inner_product, params, grads)
    return _total(products) + dual_norm(grads, norms, param_labels).total


def _for_each(
    leaves: Sequence[Leaf], tree: Any, function: Callable[[Leaf, jax.Array], jax.Array]
) -> Any:
    arrays, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(function, leaves, arrays))


def _total(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    dtype = numerics.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
    return sum((leaf.astype(dtype) for leaf in leaves), jnp.zeros([], dtype))
