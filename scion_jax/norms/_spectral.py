"""The spectral norm: for hidden layers, whose inputs and outputs are measured by their RMS."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from scion_jax import _numerics as numerics
from scion_jax import _sharding as sharding
from scion_jax.norms._axes import Axes
from scion_jax.norms._base import Norm
from scion_jax.norms._layout import Layout
from scion_jax.polar import NewtonSchulz, Orthogonalizer, check_orthogonalizer, orthogonalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectral(Norm):
    """The largest singular value, scaled so that a unit weight keeps the RMS of its input.

        ‖W‖ = ‖W‖_{S∞} / c,    lmo(d) = radius · c · U Vᵀ    for d = U Σ Vᵀ

    with `c = √(d_out/d_in) / k`, or `√d_out / k` if not normalized; with `max` the root is at
    least 1. A convolution counts as its flattened window, `d_out × k·d_in`.

    With `rms` it is `c = √max(d_out, k·d_in)`, by which the LMO's entries have RMS 1 whatever the
    shape: radius 0.2 is Moonlight's scale, which takes over AdamW's learning rate. A unit weight
    then keeps no RMS: what a step does to outputs grows with the width, so learning rates have to
    be found for each width anew.

    Attributes:
        radius: Radius of the ball; published: 50 for hidden layers of nanoGPT, 25 for DeiT, 8 for
            CNNs, 1 for MLPs.
        layout: One letter per array axis; see `Norm`.
        normalized: Divide the root by `√d_in`.
        max: Take `max(1, root)`: for the first layer on images, where d_out > d_in is rare.
        rms: Scale by the LMO's entries instead; with neither `max` nor `normalized=False`.
        orthogonalizer: How `U Vᵀ` is computed, `NewtonSchulz(…)` or `ExactPolar()`.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = Spectral(radius=2.0)
        >>> norm.gauge(jnp.diag(jnp.array([1.0, 3.0])))
        Array(1.5, dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Tables 2 to 4; `rms`: Liu et al.,
    arXiv:2502.16982, Sec. 2.2.
    """

    normalized: bool = True
    max: bool = False
    rms: bool = False
    orthogonalizer: Orthogonalizer = NewtonSchulz()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_orthogonalizer(type(self).__name__, self.orthogonalizer)
        if self.rms and (self.max or not self.normalized):
            raise ValueError(
                f"{type(self).__name__}: rms=True is a scale of its own, √max(d_out, k·d_in); "
                "leave out max and normalized"
            )

    def unit_radius(self, axes: Axes) -> float:
        """Computes `c`, the spectral norm that counts as 1."""
        if self.rms:
            return math.sqrt(max(axes.d_out, axes.fan_in, 1))
        root = math.sqrt(axes.d_out / (max(axes.d_in, 1) if self.normalized else 1))
        return (max(1.0, root) if self.max else root) / max(axes.window_size, 1)

    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `c · U Vᵀ`."""
        return self.from_polar(orthogonalize(axes.to_matrices(d), self.orthogonalizer), axes)

    def polar_method(self) -> Orthogonalizer:
        """Returns the orthogonalizer."""
        return self.orthogonalizer

    def from_polar(self, polar: jax.Array, axes: Axes) -> jax.Array:
        """Computes `c · U Vᵀ` from `U Vᵀ`."""
        return self.unit_radius(axes) * axes.from_matrices(numerics.at_least_float32(polar))

    def from_spectral_norm(self, spectral_norm: jax.Array, axes: Axes) -> jax.Array:
        """Divides by `c`."""
        return spectral_norm / self.unit_radius(axes)

    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes the singular values, divided by `c`."""
        return _singular_values(x, axes) / self.unit_radius(axes)

    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes the singular values, multiplied by `c`."""
        return _singular_values(d, axes) * self.unit_radius(axes)

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes `c / √(larger side)`."""
        return self.unit_radius(axes) / math.sqrt(max(axes.d_out, axes.fan_in, 1))

    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws semi-orthogonal matrices, uniformly, times `c`."""
        columns, rows = sorted((axes.d_out, axes.fan_in))
        if not axes.count * rows * columns:
            return jnp.zeros(axes.shape)
        # Tall ones, which are semi-orthogonal by their columns; from_matrices wants them as stored.
        shape = jax.eval_shape(
            axes.to_matrices, jax.ShapeDtypeStruct(axes.shape, jnp.float32)
        ).shape
        q, r = jnp.linalg.qr(jax.random.normal(key, (axes.count, rows, columns)))
        # The sign of R's diagonal is the library's choice; fixing it makes Q uniform.
        q = q * jnp.where(jnp.diagonal(r, axis1=1, axis2=2) < 0, -1, 1).astype(q.dtype)[:, None, :]
        q = q if shape[1] == rows else q.mT
        return self.unit_radius(axes) * axes.from_matrices(q)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralConv(Spectral):
    """`Spectral` for convolution kernels only: a leaf without a window is an error.

    The formula is that of `Spectral`, which counts the window `k` wherever a layout marks one; the
    name carries over from the PyTorch reference and states the intent. Without a layout, rank 3 is
    `sio`, rank 4 `ssio` and rank 5 `sssio`, as Flax stores kernels.

        lmo(d) = radius · √(d_out/d_in) / k · U Vᵀ    on the flattened window

    Attributes:
        radius: Radius of the ball; published: 8 for CNNs.
        layout: One letter per array axis, at least one of them `s`; see `Norm`.
        normalized: As in `Spectral`.
        max: As in `Spectral`.
        rms: As in `Spectral`.
        orthogonalizer: As in `Spectral`; published: 9 quintic steps.

    Example:
        >>> import jax
        >>> kernel = SpectralConv(8.0).init(jax.random.key(0), (3, 3, 16, 32))
        >>> SpectralConv(8.0).gauge(kernel).round(3)
        Array(1., dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, App. E.
    """

    default_layouts: ClassVar[Mapping[int, str]] = {3: "sio", 4: "ssio", 5: "sssio"}

    def read(self, shape: tuple[int, ...], name: str = "") -> Layout:
        """Reads the layout; raises `ValueError` if it marks no window."""
        known = self.layout is not None or len(shape) in self.default_layouts
        layout = super().read(shape, name) if known else None
        if layout is None or not any(axes.window for axes in layout.blocks):
            raise ValueError(
                f"SpectralConv: {name or 'an array'} of shape {tuple(shape)} has no window axis "
                "'s'; use Spectral, or give a layout such as 'sio' (Conv1d) or 'oiss' (PyTorch "
                "Conv2d)"
            )
        return layout


def _singular_values(array: jax.Array, axes: Axes) -> jax.Array:
    if not array.size:
        return jnp.zeros((0,), array.dtype)
    return jnp.linalg.svd(axes.to_matrices(sharding.replicate(array)), compute_uv=False)
