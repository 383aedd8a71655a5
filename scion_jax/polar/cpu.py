"""What only XLA's backend for CPUs wants; `jax.lax.platform_dependent` chooses it when lowering.

- Chunks of 2 MiB, which stay in a core's cache.
- float32 where the processor has no instructions for bfloat16, unless bfloat16 was asked for.
- Symmetric products with fewer multiplications, in float32. Of `C = A Bᵀ = Cᵀ` only the blocks on
  and above the diagonal are computed. XLA has no kernel for that, so blocks are multiplied:

      C = [ C₁₁   C₁₂ ]      C₁₂ one plain product, half as large each way
          [ C₁₂ᵀ  C₂₂ ]      C₁₁ and C₂₂ symmetric again, computed as a batch of two

  In bfloat16 products are so fast that putting blocks together takes as long as the saved ones.
- No transpose that XLA could fold into a bfloat16 product: it has no kernel for that, and computes
  in float32, which takes twice as long, or fails when run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp

from scion_jax.polar.newton_schulz import Products

Tree = TypeVar("Tree")

CHUNK_BYTES = 2**21
_SMALLEST_BLOCK = 192  # rows; smaller blocks keep a core less busy
_DESCRIPTION = Path("/proc/cpuinfo")


def multiplies_bfloat16() -> bool:
    """Tells whether products of bfloat16 matrices are faster than those of float32 ones.

    JAX does not say which instructions a CPU has; Linux does, and on other systems the answer is
    no.
    """
    return "avx512_bf16" in _flags(_DESCRIPTION)


@functools.cache
def _flags(description: Path) -> frozenset[str]:
    try:
        lines = description.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(flags, "").split())


def default_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Replaces bfloat16 where it is slow: the compute dtype if none was asked for."""
    slow = dtype == jnp.bfloat16 and not multiplies_bfloat16()
    return jnp.dtype(jnp.float32) if slow else dtype


class CpuProducts(Products):
    """Products as XLA's backend for CPUs computes them best."""

    def prepare(self, x: jax.Array) -> jax.Array:
        """Hides from the compiler that a matrix may be a transpose, which it would fold."""
        return opaque(x) if self.dtype == jnp.bfloat16 else x

    def gram(self, x: jax.Array) -> jax.Array:
        """Computes `x xᵀ`."""
        return self._symmetric(x, x)

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


def slices(stack: jax.Array, places: Sequence[tuple[int, int]]) -> list[jax.Array]:
    """Cuts a stack into pieces, from some starts and of some sizes.

    XLA compiles one kernel for all pieces of one size if it does not know where they lie, and one
    for each (8 ms) if it does. Unsigned, so that no index is checked for sign.
    """
    starts = opaque([jnp.uint32(start) for start, _ in places])
    return [
        jax.lax.dynamic_slice_in_dim(stack, start, size)
        for start, (_, size) in zip(starts, places, strict=True)
    ]


def opaque(tree: Tree) -> Tree:
    """Returns the same arrays, about which the compiler knows nothing but shape and dtype.

    An optimization barrier says so, but XLA for CPUs drops it before it is done simplifying (in
    JAX 0.10). A loop of two rounds that returns the value is beyond all versions of it.
    """
    return jax.lax.fori_loop(0, 2, lambda _, __: tree, jax.tree.map(jnp.zeros_like, tree))
