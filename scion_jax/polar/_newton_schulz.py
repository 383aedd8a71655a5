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
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scion_jax import _numerics as numerics
from scion_jax.polar._coefficients import Step


@dataclasses.dataclass(frozen=True)
class Products:
    """How batches of matrices are multiplied.

    The Gram matrix of a batch is that of its shorter side, `X Xᵀ` if it is wide and `Xᵀ X` if it is
    tall; what is made of it then stands on that side of `X`, which need not be transposed.

    Attributes:
        dtype: Dtype of the factors. Products and sums have at least float32.
    """

    dtype: jnp.dtype
    chunk_bytes: ClassVar[int] = 2**28  # of matrices that go through at the same time

    def times(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y`."""
        # Accelerators would round float32 factors; who wants that asks for bfloat16.
        return jnp.matmul(
            x.astype(self.dtype),
            y.astype(self.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=numerics.widest(self.dtype, jnp.float32),
        )

    def gram(self, x: jax.Array) -> jax.Array:
        """Computes `x xᵀ`, or `xᵀ x` of a tall `x`."""
        return self.times(x.mT, x) if is_tall(x) else self.times(x, x.mT)

    def beside(self, factor: jax.Array, x: jax.Array) -> jax.Array:
        """Computes `factor x`, or `x factor` for a tall `x`."""
        return self.times(x, factor) if is_tall(x) else self.times(factor, x)

    def commuting(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y` for symmetric matrices that commute, so that the product is symmetric."""
        return self.times(x, y)


def is_tall(x: jax.Array) -> bool:
    """Tells whether matrices have more rows than columns."""
    return x.shape[-2] > x.shape[-1]


class _Shifted(NamedTuple):
    """Symmetric matrices `shift · I + rest`, rest `(batch, n, n)`."""

    shift: float | jax.Array
    rest: jax.Array

    def times(self, other: _Shifted, products: Products) -> _Shifted:
        """Multiplies matrices that commute."""
        s, m = self
        t, n = other
        return _Shifted(s * t, _plus(s, n, _plus(t, m, products.commuting(m, n))))

    def polynomial(self, step: Step, products: Products) -> _Shifted:
        """Computes `a I + b X + c X²`."""
        a, b, c = step
        s, m = self
        square = products.commuting(m, m)
        return _Shifted(a + s * (b + c * s), (b + 2 * c * s) * m + c * square)

    def moved(self, shift: float) -> _Shifted:
        """Writes the same with another shift."""
        if numerics.is_number(self.shift) and self.shift == shift:
            return self
        identity = jnp.eye(self.rest.shape[1], dtype=self.rest.dtype)[None]
        return _Shifted(shift, self.rest + (self.shift - shift) * identity)


def newton_schulz(
    x: jax.Array, steps: Sequence[Step], schatten: int, products: Products
) -> jax.Array:
    """Applies the steps to the singular values of every matrix, divided by its norm.

    Args:
        x: Shape `(batch, rows, columns)`, not empty, any floating dtype.
        steps: Coefficients `(a, b, c)`, first to last.
        schatten: Which Schatten norm to divide by: 2 (Frobenius) or 4.
        products: How to multiply.

    Returns:
        Matrices of the same shape and dtype. Zero gives zero; NaN and infinity give NaN, in their
        own matrix only.
    """
    dtype, (n, m) = x.dtype, sorted(x.shape[1:])
    # Entries of at most 4: squares and their sums then stay in range whatever the scale was. By a
    # product, which costs less than dividing every entry; 1/largest could be too small a number.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True))
    largest = numerics.at_least_float32(largest)
    scale = jnp.minimum(4 / numerics.nonzero(largest), jnp.finfo(largest.dtype).max)
    scale = jnp.where(largest == 0, 0, scale)  # zero stays zero, for `grad` too
    x = (numerics.at_least_float32(x) * scale).astype(products.dtype)
    first, *rest = groups(n, m, len(steps), products.dtype)
    gram = products.gram(x)
    size = numerics.nonzero(_squared_norm(gram, schatten))
    factor = _factor(_Shifted(0.0, gram / size), steps[:first], products)
    x = (_applied(factor, x, products) / jnp.sqrt(size)).astype(products.dtype)

    def advance(x: jax.Array, group: Sequence[Any]) -> jax.Array:
        gram = _Shifted(0.0, products.gram(x)).moved(_expected(products.dtype))
        factor = _factor(gram, group, products)
        return _applied(factor, x, products).astype(products.dtype)

    if len(rest) > 1 and set(rest) == {1} and not _rounds(products.dtype):
        # float32 products take TPUs' compiler long, and a loop around them costs nothing.
        rows = jnp.asarray(np.array(steps[first:]), products.dtype)
        x, _ = jax.lax.scan(lambda x, step: (advance(x, [step]), None), x, rows)
        return x.astype(dtype)
    for length in rest:
        x = advance(x, steps[first : first + length])
        first += length
    return x.astype(dtype)


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


def _factor(gram: _Shifted, steps: Sequence[Step], products: Products) -> _Shifted:
    """Computes `P`, a polynomial in the Gram matrix, for a group of steps.

    Args:
        gram: `R`, of the divided matrices.
        steps: The group's coefficients.
        products: How to multiply.

    Returns:
        The factors.
    """
    factor, expected = None, _expected(products.dtype)
    for index, step in enumerate(steps):
        if index:
            gram = gram.moved(expected)
        polynomial = gram.polynomial(step, products)
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
        return [2, *[1] * (steps - 2)] if steps > 1 else [1]
    return [min(4, steps - start) for start in range(0, steps, 4)]
