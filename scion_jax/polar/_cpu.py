"""What only XLA's backend for CPUs wants; `jax.lax.platform_dependent` chooses it when lowering.

- Chunks of 2 MiB, which stay in a core's cache.
- float32, unless bfloat16 was asked for: many processors have no instructions for it, and a program
  must not depend on the one that it was traced on.
- Symmetric products with fewer multiplications, in float32. Of `C = A Bᵀ = Cᵀ` only the blocks on
  and above the diagonal are computed. XLA has no kernel for that, so blocks are multiplied:

      C = [ C₁₁   C₁₂ ]      C₁₂ one plain product, half as large each way
          [ C₁₂ᵀ  C₂₂ ]      C₁₁ and C₂₂ symmetric again, computed as a batch of two

  In bfloat16 products are so fast that putting blocks together takes as long as the saved ones.
- Wide matrices: tall ones are transposed before and after.
- No transpose that XLA could fold into a bfloat16 product: it has no kernel for that, and computes
  in float32, which takes twice as long, or fails when run.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from scion_jax._numerics import at_least_float32, hidden
from scion_jax.polar._newton_schulz import Products
from scion_jax.polar._pieces import cut, is_tall, joined

_SMALLEST_BLOCK = 192  # rows; smaller blocks keep a core less busy


def by_platform(
    function: Callable[[jax.Array, Products], jax.Array],
    grid: jax.Array,
    dtype: jnp.dtype,
    cpu_dtype: jnp.dtype,
) -> jax.Array:
    """Applies a function with the products that the platform is best at.

    Args:
        function: Maps matrices `(down, across, batch, rows, columns)` to as many, or to numbers
            `(1, 1, batch, 1, 1)`, each on its own; it treats `Xᵀ` as it does `X`.
        grid: The matrices.
        dtype: Dtype of the factors of products.
        cpu_dtype: That on CPUs.

    Returns:
        The results.
    """
    tall = is_tall(grid.shape)

    def on_cpu(grid: jax.Array) -> jax.Array:
        products, matrices = CpuProducts(cpu_dtype), joined(grid)
        wide = products.prepare(matrices.mT if tall else matrices)
        result = in_chunks(lambda x: function(x[None, None], products)[0, 0], wide)
        if result.shape != wide.shape:
            return result[None, None]
        return cut(result.mT if tall else result, grid.shape)

    return jax.lax.platform_dependent(
        grid, cpu=on_cpu, default=lambda grid: function(grid, Products(dtype, tall))
    )


class CpuProducts(Products):
    """Products of wide matrices as XLA's backend for CPUs computes them best."""

    def prepare(self, x: jax.Array) -> jax.Array:
        """Hides from the compiler that a matrix may be a transpose, which it would fold."""
        return hidden(x) if self.dtype == jnp.bfloat16 else x

    def gram(self, x: jax.Array) -> jax.Array:
        """Computes `X Xᵀ` of one piece."""
        return self._symmetric(x[0], x[0])

    def beside(self, factor: jax.Array, x: jax.Array) -> jax.Array:
        """Computes `factor X` of one piece."""
        return self.times(factor, x[0])[None]

    def magnitude(self, grid: jax.Array) -> jax.Array:
        """Finds the largest entry of every matrix, which is as good."""
        return at_least_float32(jnp.max(jnp.abs(grid), axis=(0, 1, 3, 4)))[:, None, None]

    def commuting(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y` for symmetric matrices that commute."""
        if self._splits(x.shape[1]):
            return self._symmetric(x, y)
        return self.times(x, y)  # no transpose: twice as fast for a batch

    def _splits(self, rows: int) -> bool:
        return self.dtype != jnp.bfloat16 and rows % 2 == 0 and rows // 2 >= _SMALLEST_BLOCK

    def _symmetric(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x yᵀ`, which must be symmetric."""
        batch, rows, inner = x.shape
        if self.dtype == jnp.bfloat16:
            # XLA does not look for a transpose to fold behind a second batch axis.
            return self.times(x[:, None], y[:, None].mT)[:, 0]
        if not self._splits(rows):
            return self.times(x, y.mT)
        half = rows // 2
        upper = self.times(x[:, :half], y[:, half:].mT)
        halves = (2 * batch, half, inner)
        diagonal = self._symmetric(x.reshape(halves), y.reshape(halves))
        diagonal = diagonal.reshape(batch, 2, half, half)
        first = jnp.concatenate([diagonal[:, 0], upper], axis=2)
        second = jnp.concatenate([upper.mT, diagonal[:, 1]], axis=2)
        return jnp.concatenate([first, second], axis=1)


def in_chunks(
    function: Callable[[jax.Array], jax.Array], stack: jax.Array, chunk_bytes: int = 2**21
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
