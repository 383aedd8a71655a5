"""Norms whose LMO normalizes: columns, rows, or all entries, to a length of their own."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from scion_jax import _numerics as numerics
from scion_jax.norms._axes import Axes
from scion_jax.norms._base import Norm


class Normalized(Norm):
    """The largest Euclidean length over some axes, in units of `length`.

    ‖x‖ = max_j ‖x_j‖₂ / length,    lmo(d)_j = radius · length · d_j / ‖d_j‖₂
    """

    @abc.abstractmethod
    def over(self, axes: Axes) -> tuple[int, ...]:
        """Returns the axes over which lengths are taken."""

    @abc.abstractmethod
    def length(self, axes: Axes) -> float:
        """Returns the length that counts as 1."""

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Normalizes to `length`."""
        return self.length(axes) * numerics.normalize(d, self.over(axes))

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes every length, in units of `length`."""
        return numerics.vector_norm(x, self.over(axes)) / self.length(axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes every length, times `length`."""
        return numerics.vector_norm(d, self.over(axes)) * self.length(axes)

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes `length` over the root of how many entries share it."""
        entries = math.prod(axes.shape[axis] for axis in self.over(axes))
        return self.length(axes) / math.sqrt(max(entries, 1))

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws Gaussian numbers and normalizes them."""
        return self.unit_lmo(jax.random.normal(key, axes.shape), axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColNorm(Normalized):
    """The largest RMS of a column, that is of the weights of one input: for one-hot inputs.

        ‖W‖ = max_j ‖col_j‖₂ / √d_out,    lmo(d)_j = radius · √d_out · col_j / ‖col_j‖₂

    with `√d_out / (k·d_in)` in place of `√d_out` if normalized.

    Attributes:
        radius: Radius of the ball.
        layout: One letter per array axis; see `Norm`. Flax's `Embed` is `io`, its vocabulary the
            input, so a column is one token's embedding.
        normalized: Divide by the fan-in: for layers other than the first.

    Example:
        >>> import jax.numpy as jnp
        >>> ColNorm().lmo(jnp.array([[3.0, 3.0], [0.0, 0.1]])).round(2)
        Array([[1.  , 1.  ],
               [0.  , 1.41]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Tables 2 to 4.
    """

    normalized: bool = False

    def over(self, axes: Axes) -> tuple[int, ...]:
        """Returns the axes of a column."""
        return axes.output

    def length(self, axes: Axes) -> float:
        """Computes `√d_out`, or `√d_out / (k·d_in)`."""
        return math.sqrt(max(axes.d_out, 1)) / (max(axes.fan_in, 1) if self.normalized else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowNorm(Normalized):
    """The largest norm of a row, that is of the weights of one output.

        ‖W‖ = max_i √(k·d_in) ‖row_i‖₂,    lmo(d)_i = radius · row_i / (√(k·d_in) ‖row_i‖₂)

    without the root if not normalized.

    Attributes:
        radius: Radius of the ball.
        layout: One letter per array axis; see `Norm`.
        normalized: Divide by the root of the fan-in: for layers other than the first.

    Example:
        >>> import jax.numpy as jnp
        >>> RowNorm(normalized=False).lmo(jnp.array([[3.0, 0.0], [4.0, 7.0]])).round(2)
        Array([[0.6, 0. ],
               [0.8, 1. ]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Tables 2 to 4.
    """

    normalized: bool = True

    def over(self, axes: Axes) -> tuple[int, ...]:
        """Returns the axes of a row."""
        return axes.columns

    def length(self, axes: Axes) -> float:
        """Computes `1 / √(k·d_in)`, or 1."""
        return 1 / math.sqrt(max(axes.fan_in, 1)) if self.normalized else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euclidean(Normalized):
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

    def over(self, axes: Axes) -> tuple[int, ...]:
        """Returns all axes of a matrix."""
        return axes.matrix

    def length(self, axes: Axes) -> float:
        """Returns 1."""
        del axes
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasRMS(Normalized):
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

    def over(self, axes: Axes) -> tuple[int, ...]:
        """Returns all axes of a vector."""
        return axes.matrix

    def length(self, axes: Axes) -> float:
        """Computes the root of the number of entries."""
        return math.sqrt(max(math.prod(axes.shape[axis] for axis in axes.matrix), 1))

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Returns zeros."""
        del key
        return jnp.zeros(axes.shape)
