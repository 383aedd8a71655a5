"""What a norm is: a ball to stay in, and the point of that ball furthest along a direction.

An optimizer of this library asks four things of a norm: its linear minimization oracle (`lmo`),
its size of a parameter (`gauge`), its size of a gradient (`dual_norm`), and a starting point
(`init`). A norm is a frozen dataclass: a value, with no state and no arrays, to be compared and
hashed, and written once at the top of a training script.

`Norm` does what all norms share: it reads the layout, computes in at least float32, scales by the
radius, and casts back. A subclass says what happens on the unit ball, in four `unit_…` hooks that
receive the array with its `Axes`. A new norm is about ten lines (here the ball of matrices whose
absolute entries sum to at most 1, so that only the largest entry moves):

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
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from scion_jax import numerics
from scion_jax.distributed import sharding
from scion_jax.norms import layout as layouts
from scion_jax.norms.layout import Axes


@dataclasses.dataclass(frozen=True)
class Norm(abc.ABC):
    """A norm ball `{x : ‖x‖ ≤ radius}` for one kind of parameter.

    Sign convention: the papers' `lmo(d)` minimizes `⟨d, ·⟩` over the ball; here `lmo` returns its
    negative, the maximizer, so that `⟨d, lmo(d)⟩ = dual_norm(d) ≥ 0` and Optax's learning-rate
    stage flips the sign.

    Attributes:
        radius: Radius of the ball, positive. May be traced (`jax.vmap` over radii).
        layout: One letter per array axis, `i` input, `o` output, `s` window, `b` batch; None for
            Flax's order by rank (`io`, `ssio`, …). See `scion_jax.norms.layout`.

    Raises:
        TypeError: If `layout` is neither None nor a string.
        ValueError: If `radius` is not positive and finite, or `layout` holds an unknown letter or
            no `o`.
    """

    radius: ArrayLike = 1.0
    _: dataclasses.KW_ONLY
    layout: str | None = None

    def __post_init__(self) -> None:
        # Only plain numbers are looked at: a traced radius has no value yet.
        if numerics.is_number(self.radius) and not 0 < self.radius < float("inf"):
            name = type(self).__name__
            raise ValueError(f"{name}: radius must be positive and finite; got {self.radius}")
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

    def unit_lmo_leaves(
        self, ds: Sequence[jax.Array], axes: Sequence[Axes], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Computes `unit_lmo` of several arrays; a norm may handle some of them together.

        Args:
            ds: Directions, float32 or float64.
            axes: The axes of each.
            shard_over: Names of the mesh axes over which work may be spread; see `spreading`.

        Returns:
            The maximizers, in the same order.
        """
        del shard_over
        return [self.unit_lmo(d, a) for d, a in zip(ds, axes, strict=True)]

    def unit_gauge_bounds(
        self, xs: Sequence[jax.Array], axes: Sequence[Axes], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Computes numbers as `unit_gauge` does, or cheaper ones that are at least as large.

        Args:
            xs: Parameters or directions, float32 or float64.
            axes: The axes of each.
            shard_over: Names of the mesh axes over which work may be spread; see `spreading`.

        Returns:
            The numbers of each array, in the same order, in any shape.
        """
        del shard_over
        return [self.unit_gauge(x, a) for x, a in zip(xs, axes, strict=True)]

    def axes(self, shape: tuple[int, ...], path: str = "") -> Axes:
        """Reads this norm's layout against a shape.

        Args:
            shape: Shape of the array.
            path: Where the array stands in its tree, for error messages.

        Returns:
            The array's axes by role.

        Raises:
            ValueError: If the layout does not fit, or is None and the rank has no default.
        """
        return layouts.parse_layout(self.layout, shape, path)

    def check(self, array: jax.Array | jax.ShapeDtypeStruct, path: str = "") -> None:
        """Checks that this norm can handle an array.

        Args:
            array: An array, or anything with its `shape` and `dtype`.
            path: Where it stands in its tree, for error messages.

        Raises:
            TypeError: If the array is not floating.
            ValueError: If the layout does not fit, or is None and the rank has no default.
        """
        if not jnp.issubdtype(array.dtype, jnp.floating):
            name = f"leaf '{path}'" if path else "an array"
            raise TypeError(
                f"{name} of shape {array.shape} has dtype {array.dtype}; {type(self).__name__} "
                "needs a floating dtype (leave other leaves out with optax.masked)"
            )
        self.axes(array.shape, path)

    def lmo(self, d: jax.Array) -> jax.Array:
        """Maximizes `⟨d, ·⟩` over the ball (the papers' LMO with the sign flipped).

            lmo(d) = radius · argmax_{‖x‖ ≤ 1} ⟨d, x⟩

        Args:
            d: Direction, usually an averaged gradient; any floating dtype.

        Returns:
            Array of the shape and dtype of `d`. It does not depend on the scale of `d`; zero gives
            zero; NaN and infinity give NaN, in their own matrix only.

        Raises:
            TypeError: If `d` is not floating.
            ValueError: If the layout does not fit, or is None and the rank has no default.
        """
        return self.lmo_leaves([d])[0]

    def lmo_leaves(
        self, ds: Sequence[jax.Array], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Computes `lmo` of several arrays, together where the norm can (`Spectral` stacks them).

        Args:
            ds: Directions, any floating dtypes.
            shard_over: Names of the mesh axes over which stacks are spread; see `spreading`.

        Returns:
            The maximizers, in the same order, shapes and dtypes.
        """
        for d in ds:
            self.check(d)
        wide = [numerics.at_least_float32(d) for d in ds]
        units = self.unit_lmo_leaves(wide, [self.axes(d.shape) for d in ds], shard_over)
        return [
            sharding.shard_like(self._scaled(unit).astype(d.dtype), d)
            for unit, d in zip(units, ds, strict=True)
        ]

    def gauge(self, x: jax.Array) -> jax.Array:
        """Computes `‖x‖ / radius`: at most 1 inside the ball.

        Args:
            x: Parameter; any floating dtype. With batch axes the maximum over the matrices.

        Returns:
            Scalar, float32 or float64. Exact: the spectral norm takes an SVD.
        """
        self.check(x)
        x = numerics.at_least_float32(x)
        return self._largest(self.unit_gauge(x, self.axes(x.shape)), x)

    def gauge_bounds(
        self, xs: Sequence[jax.Array], shard_over: tuple[str, ...] = ()
    ) -> list[jax.Array]:
        """Bounds the gauges of several arrays from above, without a decomposition.

        Args:
            xs: Parameters or directions, any floating dtypes.
            shard_over: Names of the mesh axes over which stacks are spread; see `spreading`.

        Returns:
            Scalars, in the same order: the gauge, for `Spectral` up to 3 % more at 2,048 rows
            (see `scion_jax.polar.spectral_bound`).
        """
        for x in xs:
            self.check(x)
        wide = [numerics.at_least_float32(x) for x in xs]
        bounds = self.unit_gauge_bounds(wide, [self.axes(x.shape) for x in xs], shard_over)
        return [self._largest(bound, x) for bound, x in zip(bounds, wide, strict=True)]

    def dual_norm(self, d: jax.Array) -> jax.Array:
        """Computes `radius · ‖d‖_*`, the maximum of `⟨d, ·⟩` over the ball.

        Args:
            d: Gradient; any floating dtype. With batch axes the sum over the matrices.

        Returns:
            Scalar, float32 or float64. Exact: the nuclear norm takes an SVD.
        """
        self.check(d)
        d = numerics.at_least_float32(d)
        return self._scaled(jnp.sum(self.unit_dual_norm(d, self.axes(d.shape))))

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
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        shape = tuple(shape)
        self.check(jax.ShapeDtypeStruct(shape, dtype))
        unit = self.unit_init(key, self.axes(shape))
        wide = unit.astype(numerics.widest(dtype, jnp.float32))
        return self._scaled(wide).astype(dtype)

    def _largest(self, sizes: jax.Array, x: jax.Array) -> jax.Array:
        if not x.size:
            return jnp.zeros([], x.dtype)
        return jnp.max(sizes) / jnp.asarray(self.radius, x.dtype)

    def _scaled(self, unit: jax.Array) -> jax.Array:
        return jnp.asarray(self.radius, unit.dtype) * unit
