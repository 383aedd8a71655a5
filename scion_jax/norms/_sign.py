"""The max norm: for output layers, and for embeddings that are tied to them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scion_jax.norms._axes import Axes
from scion_jax.norms._base import Norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Norm):
    """The largest absolute entry, scaled so that a unit weight keeps the RMS of its input bounded.

        ‖W‖ = k·d_in · max|W_ij|,    lmo(d) = radius · sign(d) / (k·d_in)

    without the factor `k·d_in` if not normalized.

    Attributes:
        radius: Radius of the ball; published: 3000 for the head of nanoGPT, 500 for DeiT's.
        layout: One letter per array axis; see `Norm`.
        normalized: Divide by the fan-in.
        zero_init: Start at zero instead of random signs.

    Example:
        >>> import jax.numpy as jnp
        >>> Sign(radius=4.0).lmo(jnp.array([[0.3, -2.0], [0.0, 1.0]]))
        Array([[ 2., -2.],
               [ 0.,  2.]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Tables 2 to 4.
    """

    normalized: bool = True
    zero_init: bool = False

    def unit_radius(self, axes: Axes) -> float:
        """Computes the largest entry that counts as 1."""
        return 1 / max(axes.fan_in, 1) if self.normalized else 1.0

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `sign(d) / (k·d_in)`."""
        # sign(±inf) would be a plausible ±1; an overflow is to stay visible.
        return self.unit_radius(axes) * (jnp.sign(d) + (d - d))

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes `k·d_in · |x|`."""
        return jnp.abs(x) / self.unit_radius(axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `|d| / (k·d_in)`."""
        return jnp.abs(d) * self.unit_radius(axes)

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes `1 / (k·d_in)`: all entries are of that size."""
        return self.unit_radius(axes)

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws random signs over `k·d_in`, or zeros."""
        if self.zero_init:
            return jnp.zeros(axes.shape)
        return self.unit_radius(axes) * jax.random.rademacher(key, axes.shape, float)
