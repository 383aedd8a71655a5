"""The Newton–Schulz iteration on a stack of matrices, in the form that needs fewer operations.

One step applies an odd quintic to all singular values. With the Gram matrix `R = X Xᵀ`,

    X ← Q X,    Q = a I + b R + c R²

**Groups of steps.** Several steps can be taken on the Gram matrix alone, since `Q` is a polynomial
in `R` and commutes with everything else, and their product be applied to `X` at the end:

    R ← Q R Q,    P ← Q P,    from R = X Xᵀ, P = I;    then X ← P X

So the long side of a wide matrix enters twice per group and not twice per step. The weakness: what
rounding adds to a Gram matrix, which holds *squared* singular values, is amplified by the squared
slope at 0 of the group's steps before its last. For all four of the default's steps that is 5,750:
nothing in float32, far too much in bfloat16, which takes the first two one by one (`groups`).

**Centring.** Steps press singular values that are close to each other far down, by differences of
large terms. So where factors are rounded to bfloat16 or float16, every small matrix is held as
`s I + M` (`centred`): rounding hits only `M`, which vanishes where all singular values are equal.

**Normalization** costs nothing: the first step needs `X Xᵀ` anyway, and its trace is the squared
Frobenius norm. Its own Frobenius norm is the Schatten-4 norm squared, and a better choice: it
bounds the largest singular value more tightly, so the others start further away from 0, for a
Gaussian 768 × 768 matrix by a factor of 4.4. That is worth more than a further step.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scion_jax import numerics
from scion_jax.polar.arithmetic import Arithmetic
from scion_jax.polar.centred import Centred
from scion_jax.polar.coefficients import Step
from scion_jax.polar.hardware import is_bfloat16_on_cpu
from scion_jax.polar.opaque import opaque
from scion_jax.polar.stack import Stack
from scion_jax.polar.symmetric import symmetric_flops

# Rounding times amplification, which a group must stay below: 0.0007 for the default's four steps
# in float32; in bfloat16 0.055 for its last two, 0.10 for the second and third.
_TOLERANCE = 0.06


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
    # Entries of at most 1: squares and their sums then stay in range whatever the scale was.
    x = stack.map(lambda part: part / numerics.nonzero(_largest_entry(part)))
    x = x.map(lambda part: part.astype(arithmetic.narrow))
    if is_bfloat16_on_cpu(arithmetic.narrow):
        # XLA folds a transpose that it finds in front of a product, and then, at run time, has no
        # kernel for it.
        x = opaque(x)

    def advance(x: Stack, group: tuple[jax.Array, jax.Array]) -> tuple[Stack, None]:
        steps, first = group
        gram = x.gram(arithmetic.symmetric)
        # The first group divides by the norm: the Gram matrix here, X itself with its next value.
        size = jax.lax.cond(
            first,
            lambda gram: numerics.nonzero(_squared_norm(gram, schatten)),
            lambda gram: jnp.ones_like(gram[:, :1, :1]),
            gram,
        )
        if arithmetic.rounds:
            centred = _centred_factor(gram / size, steps, arithmetic).divided(jnp.sqrt(size))
            x = centred.times(x, arithmetic)
        else:
            factor = _factor(gram / size, steps, arithmetic) / jnp.sqrt(size)
            x = x.multiply(factor, arithmetic.product)
        return x.map(lambda part: part.astype(arithmetic.narrow)), None

    # Groups of equal length share a loop, which the compiler sees once.
    start = 0
    for length, equal in itertools.groupby(
        groups(stack.small, stack.large, tuple(steps), arithmetic.narrow)
    ):
        stop = start + length * len(list(equal))
        rows = jnp.asarray(np.array(steps[start:stop]), arithmetic.wide).reshape(-1, length, 3)
        x, _ = jax.lax.scan(advance, x, (rows, start + jnp.arange(len(rows)) == 0))
        start = stop
    return x.map(lambda part: part.astype(stack.dtype))


def _largest_entry(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True, initial=0)


def _squared_norm(gram: jax.Array, schatten: int) -> jax.Array:
    """Computes the squared Schatten norm of `X` from `X Xᵀ`."""
    if schatten == 2:
        return jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    return jnp.sqrt(jnp.sum(gram * gram, axis=(1, 2), keepdims=True))


def _factor(gram: jax.Array, steps: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """Computes `P`, a polynomial in the Gram matrix, for a group of steps.

    Args:
        gram: `R`, of the divided matrices, `(batch, n, n)`.
        steps: The group's coefficients, `(length, 3)`.
        arithmetic: How to multiply.

    Returns:
        The factors.
    """
    identity = jnp.eye(gram.shape[1], dtype=gram.dtype)
    factor = None
    for index, (a, b, c) in enumerate(steps):
        polynomial = a * identity + b * gram + c * arithmetic.commuting(gram, gram)
        factor = polynomial if factor is None else arithmetic.commuting(polynomial, factor)
        if index < len(steps) - 1:
            gram = arithmetic.commuting(arithmetic.commuting(polynomial, gram), polynomial)
    assert factor is not None
    return factor


def _centred_factor(gram: jax.Array, steps: jax.Array, arithmetic: Arithmetic) -> Centred:
    """Computes the same with centred matrices, for factors that are rounded to few digits."""
    x = Centred.of(jnp.zeros_like(gram[:, :1, :1]), gram)
    factor = None
    for index, (a, b, c) in enumerate(steps):
        polynomial = x.polynomial(a, b, c, arithmetic)
        factor = polynomial if factor is None else polynomial.commuting_product(factor, arithmetic)
        if index < len(steps) - 1:
            half = polynomial.commuting_product(x, arithmetic)
            x = half.commuting_product(polynomial, arithmetic)
    assert factor is not None
    return factor


@functools.cache
def groups(rows: int, columns: int, steps: tuple[Step, ...], narrow: jnp.dtype) -> tuple[int, ...]:
    """Divides the steps into groups, such that the work is least and rounding stays harmless.

    Args:
        rows: The smaller side.
        columns: The larger side.
        steps: Coefficients `(a, b, c)`, first to last.
        narrow: Dtype of the factors.

    Returns:
        The number of steps in each group.
    """
    if not steps:
        return ()
    rounding = float(jnp.finfo(narrow).eps)
    best: tuple[int, ...] | None = None
    for length in range(1, len(steps) + 1):
        amplification = math.prod(a * a for a, _, _ in steps[: length - 1])
        if length > 1 and rounding * amplification > _TOLERANCE:
            break
        division = (length, *groups(rows, columns, steps[length:], narrow))
        if best is None or _work(rows, columns, division, narrow) < _work(
            rows, columns, best, narrow
        ):
            best = division
    assert best is not None
    return best


def flops(rows: int, columns: int, steps: Sequence[Step], narrow: jnp.dtype) -> int:
    """Counts the floating-point operations of the matrix products for one matrix.

    Args:
        rows: The smaller side.
        columns: The larger side.
        steps: Coefficients `(a, b, c)`, first to last.
        narrow: Dtype of the factors.

    Returns:
        Multiplications and additions.
    """
    return _work(rows, columns, groups(rows, columns, tuple(steps), narrow), narrow)


def _work(rows: int, columns: int, division: Sequence[int], narrow: jnp.dtype) -> int:
    gram, square = (symmetric_flops(rows, inner, narrow) for inner in (columns, rows))
    return sum(gram + (4 * length - 3) * square + 2 * rows * rows * columns for length in division)
