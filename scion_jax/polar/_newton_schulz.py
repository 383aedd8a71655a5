"""The Newton–Schulz iteration on a stack of matrices, as accelerators want it: unrolled.

Written for wide matrices, n ≤ m; tall ones are iterated from their other side, `X ← X Q` with
`R = Xᵀ X`, and never transposed.

One step applies an odd quintic to all singular values. With the Gram matrix `R = X Xᵀ`,

    X ← Q X,    Q = a I + b R + c R²

**Groups of steps.** Several steps can be taken on the Gram matrix alone, since `Q` is a polynomial
in `R` and commutes with everything else, and their product be applied to `X` at the end:

    R ← Q R Q,    P ← Q P,    from R = X Xᵀ, P = I;    then X ← P X

So the long side of a wide matrix enters twice per group and not twice per step. The weakness is
rounding in the Gram matrix, which holds *squared* singular values. In float32 a group may have four
steps. In bfloat16 only the first two steps form a group: what rounding does to them, the steps
after them repair. A group at the end would lift singular values to 1.02.

**Shifts.** Symmetric matrices are held as `s I + M`, and only the factors of products `M N` are
rounded. Steps press singular values far down by differences of large terms; where the eigenvalues
are near `s`, the terms of `M` are small and so is what rounding does. `s` is known beforehand: 1,
where steps drive the singular values, for every Gram matrix but the first. Without the shift,
bfloat16 lifts singular values to 1.009, with it to 1.003. In float32 it is 0 and its terms are left
out: on a CPU they take a third of the time of a wide matrix.

**Normalization** costs nothing: the first step needs `X Xᵀ` anyway, and its trace is the squared
Frobenius norm. Its own Frobenius norm is the Schatten-4 norm squared, and a better choice: it
bounds the largest singular value more tightly, so the others start further away from 0, for a
Gaussian 768 × 768 matrix by a factor of 4.4. That is worth more than a further step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scion_jax import _numerics as numerics
from scion_jax.polar._coefficients import Step
from scion_jax.polar._pieces import along_longer_side, as_grid, one_by_one


@dataclasses.dataclass(frozen=True)
class Products:
    """How matrices are multiplied.

    Matrices `X` are `(pieces, batch, rows, columns)`, the longer side in pieces (see `_pieces`).
    What is made of a Gram matrix stands on the shorter side, so that tall ones are not transposed.

    Attributes:
        dtype: Dtype of the factors. Products and sums have at least float32.
        tall: Whether the longer side are the rows.
    """

    dtype: jnp.dtype
    tall: bool = False

    def times(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y`, for `(…, n, m)`."""
        return self._product(jnp.matmul, x, y)

    def gram(self, x: jax.Array) -> jax.Array:
        """Computes `X Xᵀ`, or `Xᵀ X` of tall matrices: `(batch, n, n)`."""
        return self._einsum("pbmi,pbmj->bij" if self.tall else "pbim,pbjm->bij", x, x)

    def beside(self, factor: jax.Array, x: jax.Array) -> jax.Array:
        """Computes `factor X`, or `X factor` of tall matrices."""
        if self.tall:
            return self._einsum("pbmi,bij->pbmj", x, factor)
        return self._einsum("bij,pbjm->pbim", factor, x)

    def commuting(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y` for symmetric matrices that commute, so that the product is symmetric."""
        return self.times(x, y)

    def magnitude(self, grid: jax.Array) -> jax.Array:
        """Measures entries: the sum of their magnitudes, divided by `√(rows · columns)`.

        By a product with ones: a reduction over all entries takes TPUs almost three times as long.

        Args:
            grid: Shape `(down, across, batch, rows, columns)`, any floating dtype.

        Returns:
            Shape `(batch, 1, 1)`. The largest entry is at most `√(rows · columns)` times that, and
            no less than that over as much, which float16 products of them bear, too.
        """
        ones = jnp.ones((8, grid.shape[3]), grid.dtype)  # as many rows as a TPU's tile has
        dtype = numerics.widest(grid.dtype, jnp.float32)
        sums = jnp.einsum("or,dabrc->daboc", ones, jnp.abs(grid), preferred_element_type=dtype)
        entries = grid.size / grid.shape[2]
        # Divided first, for what is near the largest number.
        return jnp.sum(sums / (8 * math.sqrt(entries)), axis=(0, 1, 3, 4))[:, None, None]

    def _einsum(self, indices: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return self._product(functools.partial(jnp.einsum, indices), x, y)

    def _product(self, multiply: Callable[..., jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        # Accelerators would round float32 factors; who wants that asks for bfloat16.
        return multiply(
            x.astype(self.dtype),
            y.astype(self.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=numerics.widest(self.dtype, jnp.float32),
        )


# Rows between which pairs of steps in bfloat16 pay. Fewer do not average its rounding out, which
# lifts singular values to 1.2; of more, Gram matrices in float32 do not stay in a TPU's memory.
_FEWEST, _MOST = 32, 4095

# Bytes of a matrix from which a stack is slower than one after the other, and takes more memory.
_LARGE = 2**26


class _Shifted(NamedTuple):
    """Symmetric matrices `shift · I + rest`, rest `(batch, n, n)`."""

    shift: float | jax.Array
    rest: jax.Array

    def times(self, other: _Shifted, products: Products) -> _Shifted:
        """Multiplies matrices that commute."""
        s, m = self
        t, n = other
        return _Shifted(s * t, _plus(s, n, _plus(t, m, products.commuting(m, n))))

    def polynomial(self, step: Step, products: Products, large: bool = False) -> _Shifted:
        """Computes `a I + b X + c X²`."""
        a, b, c = step
        s, m = self
        factor = _rounded(m, products.dtype, at_once=large)
        square = products.commuting(factor, factor)
        return _Shifted(a + s * (b + c * s), (b + 2 * c * s) * m + c * square)

    def moved(self, shift: float) -> _Shifted:
        """Writes the same with another shift."""
        if numerics.is_number(self.shift) and self.shift == shift:
            return self
        identity = jnp.eye(self.rest.shape[1], dtype=self.rest.dtype)[None]
        return _Shifted(shift, self.rest + (self.shift - shift) * identity)


def newton_schulz(
    grid: jax.Array, steps: Sequence[Step], schatten: int, products: Products
) -> jax.Array:
    """Applies the steps to the singular values of every matrix, divided by its norm.

    Args:
        grid: Shape `(down, across, batch, rows, columns)`, not empty, any floating dtype.
        steps: Coefficients `(a, b, c)`, first to last.
        schatten: Which Schatten norm to divide by: 2 (Frobenius) or 4.
        products: How to multiply.

    Returns:
        Matrices of the same shape and dtype. Zero gives zero; NaN and infinity give NaN, in their
        own matrix only.
    """
    large = grid.nbytes // grid.shape[2] >= _LARGE
    if large and grid.shape[2] > 1:
        return one_by_one(lambda x: newton_schulz(x, steps, schatten, products), grid)
    # Squares of entries and their sums then stay in range whatever the scale was. By a power of
    # two, which rounds nothing.
    size = jax.lax.stop_gradient(products.magnitude(grid))
    info = jnp.finfo(size.dtype)
    power = jax.lax.reduce_precision(jnp.minimum(size, 2.0 ** (info.maxexp - 2)), info.nexp, 0)
    scale = jnp.where(power == 0, 0, 1 / numerics.nonzero(power))  # zero stays zero, for `grad` too
    x = along_longer_side(grid * scale.astype(grid.dtype)[None, None])
    x = _rounded(x, products.dtype, at_once=large and not products.tall)
    pieces, _, *sides = x.shape
    n, m = sides[::-1] if products.tall else sides
    first, *rest = groups(n, pieces * m, len(steps), products.dtype)
    gram = products.gram(x)
    size = numerics.nonzero(_squared_norm(gram, schatten))
    factor = _factor(_Shifted(0.0, gram / size), steps[:first], products, large)
    x = _applied(factor, x, products) / jnp.sqrt(size)[None]
    x = _rounded(x, products.dtype, at_once=not large)

    def advance(x: jax.Array, group: Sequence[Any]) -> jax.Array:
        gram = _Shifted(0.0, products.gram(x)).moved(_expected(products.dtype))
        factor = _factor(gram, group, products)
        return _rounded(_applied(factor, x, products), products.dtype, at_once=not large)

    if len(rest) > 1 and set(rest) == {1} and not _rounds(products.dtype):
        # float32 products take TPUs' compiler long, and a loop around them costs nothing.
        rows = jnp.asarray(np.array(steps[first:]), products.dtype)
        x, _ = jax.lax.scan(lambda x, step: (advance(x, [step]), None), x, rows)
        return as_grid(x, grid.shape).astype(grid.dtype)
    for length in rest:
        x = advance(x, steps[first : first + length])
        first += length
    return as_grid(x, grid.shape).astype(grid.dtype)


def _rounded(x: jax.Array, dtype: jnp.dtype, at_once: bool) -> jax.Array:
    """Rounds to the dtype of factors, at once or wherever the compiler likes.

    It likes to keep float32 and to round within every product. That saves a pass over memory, or
    takes more memory and, where a product needs an entry more than once, more time. Which of them
    was measured (`benchmarks/compiled.py`), for matrices below and above `_LARGE`.
    """
    rounded = x.astype(dtype)
    return jax.lax.optimization_barrier(rounded) if at_once and _rounds(dtype) else rounded


def _applied(factor: _Shifted, x: jax.Array, products: Products) -> jax.Array:
    new = products.beside(factor.rest, x)
    return _plus(factor.shift, x.astype(new.dtype), new)


def _plus(factor: float | jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `factor · x + y`, without a pass over `x` if that is 0."""
    return y if numerics.is_number(factor) and factor == 0 else factor * x + y


def _expected(dtype: jnp.dtype) -> float:
    """Returns the shift of Gram matrices after the first step."""
    return 1.0 if _rounds(dtype) else 0.0


def _rounds(dtype: jnp.dtype) -> bool:
    """Tells whether a dtype has fewer digits than float32."""
    return bool(jnp.finfo(dtype).eps > jnp.finfo(jnp.float32).eps)


def _squared_norm(gram: jax.Array, schatten: int) -> jax.Array:
    """Computes the squared Schatten norm of `X` from `X Xᵀ`."""
    if schatten == 2:
        return jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    return numerics.power(jnp.sum(gram * gram, axis=(1, 2), keepdims=True), 0.5)


def _factor(
    gram: _Shifted, steps: Sequence[Step], products: Products, large: bool = False
) -> _Shifted:
    """Computes `P`, a polynomial in the Gram matrix, for a group of steps.

    Args:
        gram: `R`, of the divided matrices.
        steps: The group's coefficients.
        products: How to multiply.
        large: Whether `R` is to be rounded before it is used.

    Returns:
        The factors.
    """
    factor, expected = None, _expected(products.dtype)
    for index, step in enumerate(steps):
        if index:
            gram = gram.moved(expected)
        polynomial = gram.polynomial(step, products, large and index == 0)
        if not expected:
            polynomial = polynomial.moved(0.0)
        factor = polynomial if factor is None else polynomial.times(factor, products)
        if index < len(steps) - 1:
            gram = polynomial.times(gram, products).times(polynomial, products)
    assert factor is not None
    return factor


def groups(rows: int, columns: int, steps: int, dtype: jnp.dtype) -> list[int]:
    """Divides the steps into groups, such that the work is least and rounding stays harmless.

    A group of k steps takes `2m + (4k − 3)n` units of work instead of `k (2m + n)`, so it pays if
    `2m > 3n`, the more the longer it is.

    Args:
        rows: The smaller side `n`.
        columns: The larger side `m`.
        steps: The number of steps.
        dtype: Dtype of the factors.

    Returns:
        The number of steps in each group.
    """
    if 2 * columns <= 3 * rows:
        return [1] * steps
    if _rounds(dtype):
        pays = steps > 1 and _FEWEST <= rows <= _MOST
        return [2, *[1] * (steps - 2)] if pays else [1] * steps
    return [min(4, steps - start) for start in range(0, steps, 4)]
