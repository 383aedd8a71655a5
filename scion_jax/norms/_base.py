"""What a norm is: a ball to stay in, and the point of that ball furthest along a direction.

An optimizer of this library asks four things of a norm: its linear minimization oracle (`lmo`),
its size of a parameter (`gauge`), its size of a gradient (`dual_norm`), and a starting point
(`init`). A norm is a frozen dataclass: a value, with no state and no arrays, to be compared and
hashed, and written once at the top of a training script.

`Norm` does what all norms share: it reads the layout, computes in at least float32, scales by the
radius, and casts back. A subclass says what happens on the unit ball, in four `unit_…` hooks that
receive a block of the array with its `Axes`. A new norm is about ten lines (here the ball of
matrices whose absolute entries sum to at most 1, so that only the largest entry moves):

    >>> @dataclasses.dataclass(frozen=True)
    ... class EntrySum(Norm):
    ...     def unit_lmo(self, d, axes):
    ...         largest = jnp.abs(d) == jnp.max(jnp.abs(d), axes.matrix, keepdims=True)
    ...         vertices = jnp.where(largest, jnp.sign(d), 0)
    ...         return vertices / jnp.sum(largest, axes.matrix, keepdims=True, dtype=d.dtype)
    ...     def unit_gauge(self, x, axes):
    ...         return jnp.sum(jnp.abs(x), axes.matrix)
    ...     def unit_dual_norm(self, d, axes):
    ...         return jnp.max(jnp.abs(d), axes.matrix)
    ...     def unit_init(self, key, axes):
    ...         return jnp.zeros(axes.shape)
    >>> EntrySum(radius=3.0).lmo(jnp.array([[1.0, -4.0], [2.0, 0.5]]))
    Array([[ 0., -3.],
           [ 0.,  0.]], dtype=float32)
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from scion_jax import _numerics as numerics
from scion_jax import _sharding as sharding
from scion_jax._checks import check_array, check_dtype, check_number
from scion_jax.norms import _layout as layouts
from scion_jax.norms._axes import Axes
from scion_jax.norms._layout import Layout
from scion_jax.polar import Orthogonalizer


@dataclasses.dataclass(frozen=True)
class Norm(abc.ABC):
    """A norm ball `{x : ‖x‖ ≤ radius}` for one kind of parameter.

    Sign convention: the papers' `lmo(d)` minimizes `⟨d, ·⟩` over the ball; here `lmo` returns its
    negative, the maximizer, so that `⟨d, lmo(d)⟩ = dual_norm(d) ≥ 0` and Optax's learning-rate
    stage flips the sign.

    Attributes:
        radius: Radius of the ball, positive. May be traced (`jax.vmap` over radii).
        layout: One letter per array axis, `i` input, `o` output, `s` window, `b` batch; None for
            `o` (rank 0 and 1) and `io` (rank 2). See `norms/_layout.py`.
        constrained: Whether the constrained optimizers keep the parameter in the ball. If not,
            they and weight decay leave out the pull towards zero, and it moves by the LMO alone.

    Raises:
        TypeError: If `radius` is not a number, or `layout` neither None nor a string.
        ValueError: If `radius` is not positive and finite, or `layout` is malformed.
    """

    radius: ArrayLike = 1.0
    _: dataclasses.KW_ONLY
    layout: str | None = None
    constrained: bool = True

    default_layouts: ClassVar[Mapping[int, str]] = layouts.DEFAULTS

    def __post_init__(self) -> None:
        check_number("radius", self.radius, f"{type(self).__name__}: radius")
        layouts.check_layout(self.layout)

    @abc.abstractmethod
    def unit_lmo(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes `argmax_{‖x‖ ≤ 1} ⟨d, x⟩`, for each matrix of the batch.

        Args:
            d: Direction, float32 or float64.
            axes: The roles of its axes.

        Returns:
            Array of the shape and dtype of `d`; zero where `d` is zero.
        """

    @abc.abstractmethod
    def unit_gauge(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Computes numbers whose *maximum* is the norm of `x`, in any shape.

        Args:
            x: Parameter, float32 or float64.
            axes: The roles of its axes.

        Returns:
            For a batch the norm of each matrix, say, or of each of its columns.
        """

    @abc.abstractmethod
    def unit_dual_norm(self, d: jax.Array, axes: Axes) -> jax.Array:
        """Computes numbers whose *sum* is the dual norm of `d`, in any shape.

        Args:
            d: Gradient, float32 or float64.
            axes: The roles of its axes.

        Returns:
            For a batch the dual norm of each matrix, say, or of each of its columns.
        """

    @abc.abstractmethod
    def unit_init(self, key: jax.Array, axes: Axes) -> jax.Array:
        """Draws a point of the unit ball.

        Args:
            key: PRNG key.
            axes: The shape, and the roles of its axes.

        Returns:
            Array of shape `axes.shape`, floating.
        """

    def unit_step_rms(self, axes: Axes) -> float:
        """Computes the root mean square of the entries of `unit_lmo`, for `describe`.

        Args:
            axes: The shape, and the roles of its axes.

        Returns:
            The number for a direction without zeros; NaN where it depends on the direction.
        """
        del axes
        return math.nan

    def polar_method(self) -> Orthogonalizer | None:
        """Returns what makes polar factors of its matrices, together with all other leaves'.

        None for a norm with a closed form. For any other, `from_polar` and `from_spectral_norm` say
        what follows from polar factors and from bounds of singular values.
        """
        return None

    def from_polar(self, polar: jax.Array, axes: Axes) -> jax.Array:
        """Makes `unit_lmo` of a block from what its `polar_method` made of its matrices.

        Args:
            polar: Shape `(batch, rows, columns)`, as `axes.to_matrices` gives it.
            axes: The roles of the block's axes.

        Returns:
            Array of shape `axes.shape`, at least float32.
        """
        raise TypeError(
            f"{type(self).__name__} has a polar_method, so it needs from_polar(polar, axes), too"
        )

    def from_spectral_norm(self, spectral_norm: jax.Array, axes: Axes) -> jax.Array:
        """Makes `unit_gauge` of a block, or bounds of it, from those of spectral norms.

        Args:
            spectral_norm: The largest singular value of every matrix, `(batch, 1, 1)`.
            axes: The roles of the block's axes.

        Returns:
            For each matrix the norm, in any shape.
        """
        raise TypeError(
            f"{type(self).__name__} has a polar_method, so its gauge needs "
            "from_spectral_norm(spectral_norm, axes), too"
        )

    def read(self, shape: tuple[int, ...], name: str = "") -> Layout:
        """Reads this norm's layout against a shape.

        Args:
            shape: Shape of the array.
            name: What to call the array in error messages, such as `"leaf 'head/kernel'"`.

        Returns:
            The array's blocks and their axes.

        Raises:
            ValueError: If the layout does not fit, or is None and the rank has no default.
        """
        return layouts.parse_layout(self.layout, tuple(shape), name, self.default_layouts)

    def lmo(self, d: jax.Array) -> jax.Array:
        """Maximizes `⟨d, ·⟩` over the ball (the papers' LMO with the sign flipped).

            lmo(d) = radius · argmax_{‖x‖ ≤ 1} ⟨d, x⟩

        Args:
            d: Direction, usually an averaged gradient; any floating dtype.

        Returns:
            Array of the shape, dtype and sharding of `d`. It does not depend on the scale of `d`;
            zero gives zero; NaN and infinity give NaN, in their own matrix only.

        Raises:
            TypeError: If `d` is not floating.
            ValueError: If the layout does not fit, or is None and the rank has no default.
        """
        layout, blocks = self._blocks(d)
        units = [self.unit_lmo(b, axes) for b, axes in zip(blocks, layout.blocks, strict=True)]
        return sharding.shard_like(self.scaled(layout.from_blocks(units)).astype(d.dtype), d)

    def gauge(self, x: jax.Array) -> jax.Array:
        """Computes `‖x‖ / radius`: at most 1 inside the ball.

        Args:
            x: Parameter; any floating dtype. With several matrices the maximum over them.

        Returns:
            Scalar, float32 or float64. Exact: the spectral norm takes an SVD.
        """
        layout, blocks = self._blocks(x)
        return self.largest(
            [self.unit_gauge(b, a) for b, a in zip(blocks, layout.blocks, strict=True)]
        )

    def dual_norm(self, d: jax.Array) -> jax.Array:
        """Computes `radius · ‖d‖_*`, the maximum of `⟨d, ·⟩` over the ball.

        Args:
            d: Gradient; any floating dtype. With several matrices the sum over them.

        Returns:
            Scalar, float32 or float64. Exact: the nuclear norm takes an SVD.
        """
        layout, blocks = self._blocks(d)
        sizes = [self.unit_dual_norm(b, a) for b, a in zip(blocks, layout.blocks, strict=True)]
        return self.scaled(jnp.sum(jnp.stack([jnp.sum(size) for size in sizes])))

    def init(
        self, key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Draws a point of the ball; a Flax initializer (`kernel_init=Spectral(50.0).init`).

        Args:
            key: PRNG key.
            shape: Shape of the parameter.
            dtype: Its dtype.

        Returns:
            Array of that shape and dtype, drawn in at least float32 and on the boundary of the
            ball where the norm says so.

        Raises:
            TypeError: If `dtype` is not floating.
            ValueError: If the layout does not fit, or is None and the rank has no default.
        """
        check_dtype("dtype", dtype)
        dtype, layout = jax.dtypes.canonicalize_dtype(dtype), self.read(tuple(shape))
        keys = [key] if len(layout.blocks) == 1 else jax.random.split(key, len(layout.blocks))
        blocks = [self.unit_init(k, axes) for k, axes in zip(keys, layout.blocks, strict=True)]
        unit = layout.from_blocks(blocks).astype(numerics.widest(dtype, jnp.float32))
        return self.scaled(unit).astype(dtype)

    def _blocks(self, array: jax.Array) -> tuple[Layout, list[jax.Array]]:
        check_array(array, "an array")
        layout = self.read(array.shape)
        return layout, layout.to_blocks(numerics.at_least_float32(array))

    def scaled(self, unit: jax.Array) -> jax.Array:
        """Multiplies what holds for the unit ball by the radius."""
        return jnp.asarray(self.radius, unit.dtype) * unit

    def largest(self, sizes: Sequence[jax.Array]) -> jax.Array:
        """Computes the gauge from the numbers of `unit_gauge`, one array for each block."""
        numbers = [numerics.largest_or_nan(size) for size in sizes if size.size]
        largest = jnp.max(jnp.stack(numbers or [jnp.zeros([], sizes[0].dtype)]))
        return largest / jnp.asarray(self.radius, largest.dtype)
