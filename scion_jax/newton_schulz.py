"""The Newton–Schulz iteration on a stack of matrices, in the form that needs fewer operations.

One step applies an odd quintic to all singular values, with `A = X Xᵀ`:

    X ← a X + (b A + c A²) X

**Direct form**: these are two symmetric products and one plain one. **Gram form**: all steps of a
wide `n × m` matrix can be taken on its `n × n` Gram matrix alone. With `Q = a I + b R + c R²`, a
polynomial in `R` that commutes with everything else,

    R ← Q R Q,    P ← Q P,    from R = X Xᵀ, P = I;    at the end X ← P X

so the long side `m` enters twice and not twice a step, and all products but the last are symmetric.
Its weakness: a Gram matrix holds squared singular values, and what rounding adds to it is amplified
by the square of the polynomial's slope at 0. In float32 that is harmless (a slope of 150 turns 6e-8
into 1e-3). In bfloat16 and in the reduced-precision float32 of accelerators it is not: small
eigenvalues turn negative and grow. So it is used with full float32 products or wider only.

**Normalization** costs nothing: the first step needs `A = X Xᵀ` anyway, and its trace is the
squared Frobenius norm. Its own Frobenius norm is the Schatten-4 norm squared, and a better choice:
it bounds the largest singular value more tightly, so the others start further away from 0, for a
Gaussian 768 × 768 matrix by a factor of 4.4. That is worth more than a further step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scion_jax import numerics
from scion_jax.coefficients import Step
from scion_jax.stack import Stack
from scion_jax.symmetric import symmetric_flops, symmetric_product


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How matrices are multiplied.

    Attributes:
        narrow: Dtype of the factors.
        wide: Dtype of sums and products, at least float32.
    """

    narrow: jnp.dtype
    wide: jnp.dtype

    def product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y`."""
        # Accelerators would round float32 factors; who wants that asks for bfloat16.
        return jnp.matmul(
            x.astype(self.narrow),
            y.astype(self.narrow),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=self.wide,
        )

    def symmetric(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x yᵀ`, which must be symmetric."""
        return symmetric_product(x.astype(self.narrow), y.astype(self.narrow), self.product)


def newton_schulz(
    stack: Stack, steps: Sequence[Step], schatten: int, arithmetic: Arithmetic
) -> Stack:
    """Applies the steps to the singular values of every matrix, divided by its norm.

    Args:
        stack: The matrices, float32 or float64.
        steps: Coefficients `(a, b, c)`, first to last.
        schatten: Which Schatten norm to divide by: 2 (Frobenius) or 4.
        arithmetic: How to multiply.

    Returns:
        Matrices of the same shapes and dtype. Zero gives zero; NaN and infinity give NaN, in their
        own matrix only.
    """
    form = (
        _gram_form
        if uses_gram_form(stack.small, stack.large, len(steps), arithmetic.narrow)
        else _direct_form
    )
    # Entries of at most 1: squares and their sums then stay in range whatever the scale was.
    scaled = stack.map(lambda x: x / numerics.nonzero(_largest_entry(x)))
    return form(scaled, steps, schatten, arithmetic).map(lambda x: x.astype(stack.dtype))


def _largest_entry(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True, initial=0)


def _squared_size(gram: jax.Array, schatten: int) -> jax.Array:
    """Computes the squared Schatten norm of `X` from `X Xᵀ`, 1 for zero."""
    if schatten == 2:
        return numerics.nonzero(jnp.trace(gram, axis1=1, axis2=2)[:, None, None])
    return numerics.nonzero(jnp.sqrt(jnp.sum(gram * gram, axis=(1, 2), keepdims=True)))


def _direct_form(x: Stack, steps: Sequence[Step], schatten: int, arithmetic: Arithmetic) -> Stack:
    def narrowed(x: Stack) -> Stack:
        return x.map(lambda part: part.astype(arithmetic.narrow))

    def step(x: Stack, row: tuple[jax.Array, jax.Array]) -> tuple[Stack, None]:
        (a, b, c), first = row
        gram = x.gram(arithmetic.symmetric)
        # The first step divides by the norm: the Gram matrix here, X itself with its next value.
        size = jnp.where(first, _squared_size(gram, schatten), 1)
        gram = gram / size
        polynomial = b * gram + c * arithmetic.symmetric(gram, gram)
        added = x.multiply(polynomial, arithmetic.product)
        total = x.map(lambda old, new: a * old.astype(arithmetic.wide) + new, added)
        return narrowed(total.map(jnp.divide, x.split(jnp.sqrt(size)))), None

    rows = jnp.asarray(np.array(steps), arithmetic.wide)
    x, _ = jax.lax.scan(step, narrowed(x), (rows, jnp.arange(len(steps)) == 0))
    return x


def _gram_form(x: Stack, steps: Sequence[Step], schatten: int, arithmetic: Arithmetic) -> Stack:
    symmetric = arithmetic.symmetric
    gram = x.gram(symmetric)
    size = _squared_size(gram, schatten)
    gram = gram / size
    identity = jnp.eye(x.small, dtype=gram.dtype)
    factor = None
    for index, (a, b, c) in enumerate(steps):
        polynomial = a * identity + b * gram + c * symmetric(gram, gram)
        factor = polynomial if factor is None else symmetric(polynomial, factor)
        if index < len(steps) - 1:
            gram = symmetric(symmetric(polynomial, gram), polynomial)
    assert factor is not None
    return x.multiply(factor / jnp.sqrt(size), arithmetic.product)


def uses_gram_form(rows: int, columns: int, steps: int, narrow: jnp.dtype) -> bool:
    """Tells which form is used: the Gram form where it is exact enough and needs less work.

    Args:
        rows: The smaller side.
        columns: The larger side.
        steps: Number of steps.
        narrow: Dtype of the factors.

    Returns:
        Whether it is the Gram form.
    """
    precise = jnp.finfo(narrow).eps <= jnp.finfo(jnp.float32).eps
    return bool(precise) and _gram_flops(rows, columns, steps) < _direct_flops(rows, columns, steps)


def flops(rows: int, columns: int, steps: int, narrow: jnp.dtype) -> int:
    """Counts the floating-point operations of the matrix products for one matrix.

    Args:
        rows: The smaller side.
        columns: The larger side.
        steps: Number of steps.
        narrow: Dtype of the factors.

    Returns:
        Multiplications and additions.
    """
    if uses_gram_form(rows, columns, steps, narrow):
        return _gram_flops(rows, columns, steps)
    return _direct_flops(rows, columns, steps)


def _direct_flops(rows: int, columns: int, steps: int) -> int:
    gram, square = symmetric_flops(rows, columns), symmetric_flops(rows, rows)
    return steps * (gram + square + 2 * rows * rows * columns)


def _gram_flops(rows: int, columns: int, steps: int) -> int:
    gram, square = symmetric_flops(rows, columns), symmetric_flops(rows, rows)
    return gram + (4 * steps - 3) * square + 2 * rows * rows * columns
