"""Products that are known to be symmetric, with fewer multiplications.

Of `C = A Bᵀ = Cᵀ` only the blocks on and above the diagonal have to be computed. XLA has no kernel
for that, so the product is split into blocks, again and again:

    C = [ C₁₁   C₁₂ ]      C₁₂ one plain product, half as large each way
        [ C₁₂ᵀ  C₂₂ ]      C₁₁ and C₂₂ symmetric again, computed as a batch of two

`L` splits need `1/2 + 1/2^(L+1)` of the multiplications. Small blocks keep a processor less busy,
so splitting ends at a smallest block: 192 rows on a CPU, 1,024 on accelerators. In bfloat16 a CPU
multiplies so fast that putting blocks together takes as long as the saved products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax.polar.hardware import is_bfloat16_on_cpu
from scion_jax.polar.stack import Product

_SMALLEST_BLOCK_CPU = 192
_SMALLEST_BLOCK = 1024


def splits(rows: int, dtype: DTypeLike) -> int:
    """Counts how often a product of `rows × rows` entries is split.

    Args:
        rows: Number of rows of the product.
        dtype: Of the factors.

    Returns:
        A number of halvings, 0 for small or odd sizes.
    """
    if is_bfloat16_on_cpu(dtype):
        return 0
    smallest = _SMALLEST_BLOCK_CPU if jax.default_backend() == "cpu" else _SMALLEST_BLOCK
    count = 0
    while rows % 2 == 0 and rows // 2 >= smallest:
        rows //= 2
        count += 1
    return count


def symmetric_product(x: jax.Array, y: jax.Array, product: Product) -> jax.Array:
    """Computes `x yᵀ`, which must be symmetric.

    Args:
        x: Shape `(batch, n, k)`.
        y: Shape `(batch, n, k)`.
        product: Computes `A B`.

    Returns:
        Shape `(batch, n, n)`.
    """
    batch, rows, inner = x.shape
    if is_bfloat16_on_cpu(x.dtype):
        # XLA folds the transpose into the product, and then has to compute it in float32, which
        # takes twice as long. It does not look for it behind a second batch axis.
        return product(x[:, None], y[:, None].mT)[:, 0]
    if not splits(rows, x.dtype):
        return product(x, y.mT)
    half = rows // 2
    upper = product(x[:, :half], y[:, half:].mT)
    halves = (2 * batch, half, inner)
    diagonal = symmetric_product(x.reshape(halves), y.reshape(halves), product)
    diagonal = diagonal.reshape(batch, 2, half, half)
    first = jnp.concatenate([diagonal[:, 0], upper], axis=2)
    second = jnp.concatenate([upper.mT, diagonal[:, 1]], axis=2)
    return jnp.concatenate([first, second], axis=1)


def symmetric_flops(rows: int, inner: int, dtype: DTypeLike) -> int:
    """Counts the floating-point operations of `symmetric_product` for one matrix.

    Args:
        rows: Number of rows `n` of the product.
        inner: Length `k` of the sums.
        dtype: Of the factors.

    Returns:
        Multiplications and additions.
    """
    if not splits(rows, dtype):
        return 2 * rows * rows * inner
    half = rows // 2
    return 2 * half * half * inner + 2 * symmetric_flops(half, inner, dtype)
