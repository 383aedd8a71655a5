"""The norm that follows from the rank: a sensible start, and the default of every optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from scion_jax.norms.base import Norm
from scion_jax.norms.euclidean import BiasRMS
from scion_jax.norms.layout import Axes
from scion_jax.norms.spectral import Spectral
from scion_jax.polar.orthogonalizers import NewtonSchulz, Orthogonalizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Norm):
    """`BiasRMS` for scalars and vectors, `Spectral` for matrices and convolutions.

    Batch axes do not count: a stack of biases, layout `bo`, is a vector. The published settings
    treat the first and last layers differently (see the README); `Auto` knows only ranks.

    Attributes:
        radius: Radius of the ball, for either norm.
        layout: One letter per array axis, for arrays of rank 2 and more; see `Norm`. So
            `Auto(layout="oi")` serves a PyTorch or Equinox network of linear layers with biases.
        orthogonalizer: As in `Spectral`.

    Example:
        >>> import jax.numpy as jnp
        >>> Auto(radius=2.0).gauge(jnp.array([4.0, -4.0])), Auto(radius=2.0).gauge(jnp.eye(3))
        (Array(2., dtype=float32), Array(0.5, dtype=float32))

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3.
    """

    orthogonalizer: Orthogonalizer = NewtonSchulz()

    def axes(self, shape: tuple[int, ...], path: str = "") -> Axes:
        """Reads the layout; scalars and vectors have only one."""
        return super().axes(shape, path) if len(shape) > 1 else BiasRMS().axes(shape, path)

    def _choice(self, axes: Axes) -> Norm:
        if len(axes.matrix) <= 1:
            return BiasRMS()
        return Spectral(orthogonalizer=self.orthogonalizer)

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self._choice(axes).unit_lmo(d, axes)

    def _each(
        self,
        arrays: Sequence[jax.Array],
        axes: Sequence[Axes],
        compute: Callable[[Norm, Sequence[jax.Array], Sequence[Axes]], list[jax.Array]],
    ) -> list[jax.Array]:
        """Asks each norm once, with all of its arrays."""
        choices = [self._choice(a) for a in axes]
        results = list(arrays)
        for norm in dict.fromkeys(choices):
            members = [index for index, choice in enumerate(choices) if choice == norm]
            theirs = compute(norm, [arrays[i] for i in members], [axes[i] for i in members])
            for index, result in zip(members, theirs, strict=True):
                results[index] = result
        return results

    def unit_lmo_leaves(
        self, ds: Sequence[jax.Array], axes: Sequence[Axes], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Asks the norm of each rank."""
        return self._each(ds, axes, lambda norm, d, a: norm.unit_lmo_leaves(d, a, shard_over))

    def unit_gauge_bounds(
        self, xs: Sequence[jax.Array], axes: Sequence[Axes], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Asks the norm of each rank."""
        return self._each(xs, axes, lambda norm, x, a: norm.unit_gauge_bounds(x, a, shard_over))

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self._choice(axes).unit_gauge(x, axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self._choice(axes).unit_dual_norm(d, axes)

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self._choice(axes).unit_init(key, axes)
