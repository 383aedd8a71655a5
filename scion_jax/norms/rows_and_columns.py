"""The column and row norms: every input's, or every output's, weights on their own sphere."""

from __future__ import annotations

import dataclasses
import math

import jax

from scion_jax import hyperparameters, numerics
from scion_jax.norms.axes import Axes
from scion_jax.norms.base import Norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColNorm(Norm):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        hyperparameters.check_flag("ColNorm: normalized", self.normalized)

    def unit_radius(self, axes: Axes) -> float:
        """Computes a column's length that counts as 1."""
        return math.sqrt(axes.d_out) / (max(axes.fan_in, 1) if self.normalized else 1)

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Normalizes every column."""
        return self.unit_radius(axes) * numerics.normalize(d, axes.output)

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes every column's norm, over `√d_out`."""
        return numerics.vector_norm(x, axes.output) / self.unit_radius(axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes every column's norm, times `√d_out`."""
        return numerics.vector_norm(d, axes.output) * self.unit_radius(axes)

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes a column's length over `√d_out`."""
        return self.unit_radius(axes) / math.sqrt(max(axes.d_out, 1))

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws Gaussian columns and normalizes them."""
        return self.unit_lmo(jax.random.normal(key, axes.shape), axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowNorm(Norm):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        hyperparameters.check_flag("RowNorm: normalized", self.normalized)

    def unit_radius(self, axes: Axes) -> float:
        """Computes a row's length that counts as 1."""
        return 1 / math.sqrt(max(axes.fan_in, 1)) if self.normalized else 1.0

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Normalizes every row."""
        return self.unit_radius(axes) * numerics.normalize(d, axes.columns)

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes every row's norm, times `√(k·d_in)`."""
        return numerics.vector_norm(x, axes.columns) / self.unit_radius(axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes every row's norm, over `√(k·d_in)`."""
        return numerics.vector_norm(d, axes.columns) * self.unit_radius(axes)

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes a row's length over `√(k·d_in)`."""
        return self.unit_radius(axes) / math.sqrt(max(axes.fan_in, 1))

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws Gaussian rows and normalizes them."""
        return self.unit_lmo(jax.random.normal(key, axes.shape), axes)
