"""The norm that follows from the rank: a sensible start, and the default of every optimizer."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.typing import ArrayLike

from scion_jax import hyperparameters
from scion_jax.norms.axes import Axes
from scion_jax.norms.base import Norm
from scion_jax.norms.euclidean import BiasRMS
from scion_jax.norms.spectral import Spectral
from scion_jax.polar.orthogonalizers import NewtonSchulz, Orthogonalizer, check_orthogonalizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Norm):
    """`BiasRMS` for scalars and vectors, `Spectral` for matrices.

    A layout without inputs, such as `bo`, is a vector's. It knows nothing else, so every array of
    rank 3 and more needs a norm with a layout; `infer_norms` reads those off a program. The
    published settings treat the first and the last layer differently too (see the
    documentation's page on choosing norms).

    Attributes:
        radius: Radius of the ball of matrices.
        layout: One letter per array axis, for arrays of rank 2 and more; see `Norm`. So
            `Auto(layout="oi")` serves a PyTorch or Equinox network of linear layers with biases.
        constrained: As in `Norm`, for matrices and vectors.
        vector_radius: Radius of the ball of scalars and vectors, for biases and gains: they do not
            grow with the width, so the radius of matrices would make their steps too long.
        orthogonalizer: As in `Spectral`.

    Example:
        >>> import jax.numpy as jnp
        >>> Auto(radius=2.0).gauge(jnp.array([4.0, -4.0])), Auto(radius=2.0).gauge(jnp.eye(3))
        (Array(4., dtype=float32), Array(0.5, dtype=float32))

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3.
    """

    vector_radius: ArrayLike = 1.0
    orthogonalizer: Orthogonalizer = NewtonSchulz()

    def __post_init__(self) -> None:
        super().__post_init__()
        hyperparameters.check_number(
            "Auto: vector_radius", self.vector_radius, above=0, below=math.inf
        )
        check_orthogonalizer("Auto", self.orthogonalizer)

    def resolve(self, rank: int) -> Norm:
        """Chooses: `BiasRMS` for rank 0 and 1 or without an input axis, `Spectral` for the rest."""
        if rank < 2:
            return BiasRMS(self.vector_radius, constrained=self.constrained)
        if self.layout is not None and set(self.layout).isdisjoint("is"):
            return BiasRMS(self.vector_radius, layout=self.layout, constrained=self.constrained)
        return Spectral(
            self.radius,
            layout=self.layout,
            constrained=self.constrained,
            orthogonalizer=self.orthogonalizer,
        )

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self.resolve(d.ndim).unit_lmo(d, axes)

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self.resolve(x.ndim).unit_gauge(x, axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self.resolve(d.ndim).unit_dual_norm(d, axes)

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Asks the norm of the rank."""
        return self.resolve(len(axes.shape)).unit_init(key, axes)
