"""What to look at while training: where parameters stand in their balls, and how far from done.

`gauges`, `dual_norm` and `frank_wolfe_gap` are exact and take an SVD of every matrix.
`gauge_bounds` and `pairings` are cheap enough for every step, and flat, as loggers like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from scion_jax import _numerics as numerics
from scion_jax import norms as norm_balls
from scion_jax._checks import check_alike
from scion_jax._leaves import Norms, read_leaves
from scion_jax._paths import leaf_paths
from scion_jax.distributed import check_shard_over
from scion_jax.norms import Auto, Leaf


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
    leaves = read_leaves(params, norms, param_labels)
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
    leaves = read_leaves(grads, norms, param_labels)
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


def gauge_bounds(
    params: Any,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    shard_over: str | Sequence[str] | None = None,
) -> dict[str, jax.Array]:
    """Bounds the gauge of every parameter from above, by matrix products instead of an SVD.

        ‖x_l‖_l / radius_l ≤ bound ≤ n_l^(1/256) ‖x_l‖_l / radius_l

    `n_l` is the smaller side of a `Spectral` leaf's matrices: up to 3 % too high at 2,048 rows. All
    other norms are exact.

    Args:
        params: Parameters.
        norms: As given to the optimizer.
        param_labels: As given to the optimizer.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        Scalars by path, float32 or float64.

    Raises:
        ValueError: If norms and labels do not fit the parameters; the message names the leaf.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> gauge_bounds({"head": {"kernel": jnp.ones((4, 2))}}, scion_jax.Sign(radius=8.0))
        {'head/kernel': Array(0.5, dtype=float32)}
    """
    leaves = read_leaves(params, norms, param_labels)
    names = check_shard_over(shard_over)
    bounds = norm_balls.gauge_bounds(leaves, jax.tree.leaves(params), names)
    return _by_path([leaf.path for leaf in leaves], bounds)


def pairings(state: Any, params: Any) -> dict[str, jax.Array]:
    """Takes the pairing of every leaf out of an optimizer's state.

        ⟨d_l, w_l⟩ = radius_l ‖d_l‖_{l,*}            unconstrained
        ⟨d_l, w_l⟩ = ⟨d_l, x_l⟩ + radius_l ‖d_l‖_{l,*}   constrained

    It is what the leaf's step gains to first order, per unit of learning rate. Their sum is the
    `pairing` of the state, which clipped optimizers compare with ρ.

    Args:
        state: State of a clipped optimizer that was built with `per_leaf=True`; with `rho=0.0` it
            is the optimizer without clipping.
        params: The parameters, or their shapes: all that the optimizer has.

    Returns:
        Scalars by path, float32 or float64, from the last step.

    Raises:
        ValueError: If the state keeps no pairing or several, or belongs to other parameters.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones([])}
        >>> optimizer = scion_jax.unconstrained_clipped_scion(
        ...     0.1, scion_jax.Euclidean(), rho=0.0, momentum=1.0, per_leaf=True)
        >>> _, state = optimizer.update(params, optimizer.init(params), params)
        >>> pairings(state, params)
        {'b': Array(1., dtype=float32), 'w': Array(5., dtype=float32)}
    """
    found = optax.tree.get_all_with_path(state, "pairings")
    found = [(path, numbers) for path, numbers in found if numbers is not None]
    if len(found) != 1:
        raise ValueError(
            f"the state has {len(found)} fields `pairings`; it must be that of one optimizer that "
            "was built with per_leaf=True"
        )
    numbers = jnp.asarray(found[0][1])
    paths = leaf_paths(params)
    if numbers.shape != (len(paths),):
        raise ValueError(
            f"the state keeps the pairings of {numbers.size} leaves, but these parameters have "
            f"{len(paths)}"
        )
    return _by_path(paths, list(numbers))


def _by_path(paths: Sequence[str], numbers: Sequence[jax.Array]) -> dict[str, jax.Array]:
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves have the path '{twice}'; rename a key that holds a slash")
    return dict(zip(paths, numbers, strict=True))


def _for_each(
    leaves: Sequence[Leaf], tree: Any, function: Callable[[Leaf, jax.Array], jax.Array]
) -> Any:
    arrays, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(function, leaves, arrays))


def _total(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    dtype = numerics.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
    return sum((leaf.astype(dtype) for leaf in leaves), jnp.zeros([], dtype))
