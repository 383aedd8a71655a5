"""Products of batches of matrices, of either shape, and how many at the same time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from scion_jax import _numerics as numerics


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


def in_chunks(
    function: Callable[[jax.Array], jax.Array], stack: jax.Array, chunk_bytes: int
) -> jax.Array:
    """Applies a function to a long stack piece by piece, which bounds its temporary memory.

    Args:
        function: Maps `(batch, rows, columns)` to `(batch, …)`, each matrix on its own.
        stack: Shape `(batch, rows, columns)`.
        chunk_bytes: Size of the matrices that go through at the same time, at least one matrix.

    Returns:
        The result for the whole stack.
    """
    batch, *matrix = stack.shape
    rounds = -(-batch // max(1, chunk_bytes // (stack.nbytes // batch)))
    if rounds == 1:
        return function(stack)
    size = -(-batch // rounds)
    rounds = -(-batch // size)
    chunks = jnp.pad(stack, ((0, rounds * size - batch), (0, 0), (0, 0)))
    result = jax.lax.map(function, chunks.reshape(rounds, size, *matrix))
    return result.reshape(rounds * size, *result.shape[2:])[:batch]
