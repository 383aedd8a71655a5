"""The spectral norm: for hidden layers, whose inputs and outputs are measured by their RMS."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from scion_jax.distributed import sharding
from scion_jax.distributed.spreading import polar_factors, spectral_norm_bounds
from scion_jax.norms.base import Norm
from scion_jax.norms.layout import Axes
from scion_jax.polar.orthogonalizers import NewtonSchulz, Orthogonalizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectral(Norm):
    """The largest singular value, scaled so that a unit weight keeps the RMS of its input.

        ‖W‖ = ‖W‖_{S∞} / c,    lmo(d) = radius · c · U Vᵀ    for d = U Σ Vᵀ

    with `c = √(d_out/d_in) / k`, or `√d_out / k` if not normalized; with `max` the root is at
    least 1. A convolution counts as its flattened window, `d_out × k·d_in`.

    Attributes:
        radius: Radius of the ball; published: 50 for hidden layers of nanoGPT, 25 for DeiT, 8 for
            CNNs, 1 for MLPs.
        layout: One letter per array axis; see `Norm`.
        normalized: Divide the root by `√d_in`.
        max: Take `max(1, root)`: for the first layer on images, where d_out > d_in is rare.
        orthogonalizer: How `U Vᵀ` is computed, `NewtonSchulz(…)` or `ExactPolar()`.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = Spectral(radius=2.0)
        >>> norm.gauge(jnp.diag(jnp.array([1.0, 3.0])))
        Array(1.5, dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Tables 2 to 4.
    """

    normalized: bool = True
    max: bool = False
    orthogonalizer: Orthogonalizer = NewtonSchulz()

    def _unit_radius(self, axes: Axes) -> float:
        root = math.sqrt(axes.d_out / (max(axes.d_in, 1) if self.normalized else 1))
        return (max(1.0, root) if self.max else root) / max(axes.window_size, 1)

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `c · U Vᵀ`."""
        return self.unit_lmo_leaves([d], [axes])[0]

    def unit_lmo_leaves(
        self, ds: Sequence[jax.Array], axes: Sequence[Axes], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Computes `c · U Vᵀ`, one iteration for all matrices of one shape."""
        matrices = [_matrices(d, a) for d, a in zip(ds, axes, strict=True)]
        return [
            self._unit_radius(a) * a.stored.from_matrices(polar)
            for polar, a in zip(
                polar_factors(matrices, self.orthogonalizer, shard_over), axes, strict=True
            )
        ]

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes the singular values, divided by `c`."""
        return _singular_values(x, axes) / self._unit_radius(axes)

    def unit_gauge_bounds(
        self, xs: Sequence[jax.Array], axes: Sequence[Axes], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Bounds the largest singular values, those of one shape together, and divides by `c`."""
        matrices = [_matrices(x, a) for x, a in zip(xs, axes, strict=True)]
        return [
            bound / self._unit_radius(a)
            for bound, a in zip(spectral_norm_bounds(matrices, shard_over), axes, strict=True)
        ]

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes the singular values, multiplied by `c`."""
        return _singular_values(d, axes) * self._unit_radius(axes)

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws semi-orthogonal matrices, uniformly, times `c`."""
        batch = math.prod(axes.shape[axis] for axis in axes.batch)
        columns, rows = sorted((axes.d_out, axes.fan_in))
        if not batch * rows * columns:
            return jnp.zeros(axes.shape)
        q, r = jnp.linalg.qr(jax.random.normal(key, (batch, rows, columns)))
        # The sign of R's diagonal is the library's choice; fixing it makes Q uniform.
        q = q * jnp.where(jnp.diagonal(r, axis1=1, axis2=2) < 0, -1, 1).astype(q.dtype)[:, None, :]
        q = q if axes.d_out == rows else q.mT
        return self._unit_radius(axes) * axes.from_matrices(q)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralConv(Spectral):
    """`Spectral` for convolution kernels only: a leaf without a window is an error.

    The formula is that of `Spectral`, which counts the window `k` wherever a layout marks one; the
    name carries over from the PyTorch reference and states the intent.

        lmo(d) = radius · √(d_out/d_in) / k · U Vᵀ    on the flattened window

    Attributes:
        radius: Radius of the ball; published: 8 for CNNs.
        layout: One letter per array axis, at least one of them `s`; see `Norm`.
        normalized: As in `Spectral`.
        max: As in `Spectral`.
        orthogonalizer: As in `Spectral`; published: 9 quintic steps.

    Example:
        >>> import jax
        >>> kernel = SpectralConv(8.0).init(jax.random.key(0), (3, 3, 16, 32))
        >>> SpectralConv(8.0).gauge(kernel).round(3)
        Array(1., dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, App. E.
    """

    def axes(self, shape: tuple[int, ...], path: str = "") -> Axes:
        """Reads the layout; raises `ValueError` if it marks no window."""
        axes = super().axes(shape, path)
        if not axes.window:
            name = f"leaf '{path}' of shape {shape}" if path else f"an array of shape {shape}"
            raise ValueError(
                f"SpectralConv: {name} has no window axis 's'; use Spectral, or give a layout "
                "such as 'sio' (Conv1d) or 'oiss' (PyTorch Conv2d)"
            )
        return axes


def _matrices(array: jax.Array, axes: Axes) -> jax.Array:
    if len(axes.matrix) > 2:
        array = sharding.replicate(array)  # split axes cannot be merged
    return axes.stored.to_matrices(array)


def _singular_values(array: jax.Array, axes: Axes) -> jax.Array:
    if not array.size:
        return jnp.zeros((0,), array.dtype)
    return jnp.linalg.svd(axes.to_matrices(sharding.replicate(array)), compute_uv=False)
