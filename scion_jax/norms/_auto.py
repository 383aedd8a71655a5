"""The norm that follows from the rank: a sensible start, and the default of every optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from scion_jax._checks import check_number
from scion_jax.norms._base import Norm
from scion_jax.norms._layout import Layout
from scion_jax.norms._normalized import BiasRMS
from scion_jax.norms._spectral import Spectral
from scion_jax.polar import NewtonSchulz, Orthogonalizer


@dataclasses.dataclass(frozen=True)
class Auto:
    """The rule `BiasRMS` for scalars and vectors, `Spectral` for matrices.

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

    radius: ArrayLike = 1.0
    _: dataclasses.KW_ONLY
    layout: str | None = None
    constrained: bool = True
    vector_radius: ArrayLike = 1.0
    orthogonalizer: Orthogonalizer = NewtonSchulz()

    def __post_init__(self) -> None:
        check_number("radius", self.vector_radius, "Auto: vector_radius")
        # Which checks the rest.
        Spectral(self.radius, layout=self.layout, orthogonalizer=self.orthogonalizer)

    def norm_for(self, rank: int) -> Norm:
        """Chooses: `BiasRMS` for rank 0 and 1 or without an input axis, `Spectral` for the rest."""
        layout = self.layout if rank > 1 else None
        if rank < 2 or (layout and set(layout).isdisjoint("is")):
            return BiasRMS(self.vector_radius, layout=layout, constrained=self.constrained)
        return Spectral(
            self.radius,
            layout=layout,
            constrained=self.constrained,
            orthogonalizer=self.orthogonalizer,
        )

    def read(self, shape: tuple[int, ...], name: str = "") -> Layout:
        """Reads the layout against a shape; see `Norm.read`."""
        return self.norm_for(len(shape)).read(shape, name)

    def lmo(self, d: jax.Array) -> jax.Array:
        """Maximizes `⟨d, ·⟩`; see `Norm.lmo`."""
        return self.norm_for(_rank(d)).lmo(d)

    def gauge(self, x: jax.Array) -> jax.Array:
        """Computes `‖x‖ / radius`; see `Norm.gauge`."""
        return self.norm_for(_rank(x)).gauge(x)

    def dual_norm(self, d: jax.Array) -> jax.Array:
        """Computes `radius · ‖d‖_*`; see `Norm.dual_norm`."""
        return self.norm_for(_rank(d)).dual_norm(d)

    def init(
        self, key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Draws a point of the ball; see `Norm.init`."""
        return self.norm_for(len(shape)).init(key, shape, dtype)


def _rank(array: Any) -> int:
    return len(getattr(array, "shape", ()))  # what is no array, its norm refuses


def at_rank(norm: Norm | Auto, rank: int) -> Norm:
    """Returns the norm that a rule chooses for a rank; a norm as it is."""
    return norm.norm_for(rank) if isinstance(norm, Auto) else norm


Norm.register(Auto)  # it offers all that is asked of a norm
