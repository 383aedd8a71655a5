"""The work of orthogonalizing a matrix: the operations of its matrix products.

The compiler's own count is of no use here: it counts the body of a loop once.
"""

import jax.numpy as jnp

from scion_jax import NewtonSchulz
from scion_jax.polar._coefficients import steps_of
from scion_jax.polar._newton_schulz import groups


def flops(method: NewtonSchulz, rows: int, columns: int) -> int:
    """Counts the floating-point operations of the matrix products for one float32 matrix.

    A group of k steps takes `2m + (4k − 3)n` products of `n²` numbers each for a matrix of n rows
    and m ≥ n columns.

    Args:
        method: The iteration; without a compute dtype it has that of CPUs, float32.
        rows: Number of rows.
        columns: Number of columns.

    Returns:
        Multiplications and additions; CPUs may save some.
    """
    n, m = sorted((rows, columns))
    dtype = jnp.dtype(method.compute_dtype or jnp.float32)
    steps = len(steps_of(method.coefficients, method.steps))
    return sum(2 * n * n * (2 * m + (4 * k - 3) * n) for k in groups(n, m, steps, dtype))
