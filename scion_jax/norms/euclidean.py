"""The Euclidean norms: of all entries, by their root mean square or by their length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from scion_jax import numerics
from scion_jax.norms.axes import Axes
from scion_jax.norms.base import Norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasRMS(Norm):
    """The root mean square over all but the batch axes: for biases and norm gains.

        ‖x‖ = RMS(x),    lmo(d) = radius · d / RMS(d)

    Attributes:
        radius: Radius of the ball.
        layout: One letter per array axis; see `Norm`. A stack of biases is `bo`, one bias of two
            axes `oo`, the fused bias of four gates `o[4]`. Rank 2 and more need one: a stack would
            silently be one vector.
        constrained: Whether `scion` pulls the parameter towards zero; see `Norm`. False lets gains
            stay near the 1 that they start at.

    Example:
        >>> import jax.numpy as jnp
        >>> BiasRMS().lmo(jnp.array([3.0, 3.0, -3.0, 3.0]))
        Array([ 1.,  1., -1.,  1.], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Table 2.
    """

    default_layouts: ClassVar[Mapping[int, str]] = {0: "o", 1: "o"}

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `d / RMS(d)`."""
        return _root_size(axes) * numerics.normalize(d, axes.matrix)

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes the root mean square."""
        return numerics.vector_norm(x, axes.matrix) / _root_size(axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes the length, times the root of the number of entries."""
        return numerics.vector_norm(d, axes.matrix) * _root_size(axes)

    def unit_step_rms(self, axes: Axes) -> float:
        """Returns 1, by definition."""
        del axes
        return 1.0

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Returns zeros."""
        del key
        return jnp.zeros(axes.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euclidean(Norm):
    """The Euclidean (Frobenius) norm over all but the batch axes.

        ‖x‖ = ‖x‖_F,    lmo(d) = radius · d / ‖d‖_F

    Attributes:
        radius: Radius of the ball.
        layout: One letter per array axis; see `Norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> Euclidean(radius=5.0).lmo(jnp.array([[0.3, 0.0], [0.0, 0.4]]))
        Array([[3., 0.],
               [0., 4.]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Table 1 (normalized SGD).
    """

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `d / ‖d‖_F`."""
        return numerics.normalize(d, axes.matrix)

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes the length."""
        return numerics.vector_norm(x, axes.matrix)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes the length: this norm is its own dual."""
        return numerics.vector_norm(d, axes.matrix)

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes one over the root of the number of entries."""
        return 1 / _root_size(axes)

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws a direction, uniformly."""
        return self.unit_lmo(jax.random.normal(key, axes.shape), axes)


def _root_size(axes: Axes) -> float:
    return math.sqrt(max(math.prod(axes.shape[axis] for axis in axes.matrix), 1))
