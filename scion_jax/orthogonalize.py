"""Orthogonalizers: the polar factor `U Vᵀ` of a matrix `U Σ Vᵀ`, iterated or exact.

`U Vᵀ` is the LMO of the spectral norm: it maximizes `⟨M, X⟩` over `‖X‖_{S∞} ≤ 1`, and the maximum
is the nuclear norm of `M`. Newton–Schulz approximates it with matrix products only, by applying an
odd polynomial to the singular values until all that matter are near 1 (see `coefficients`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from scion_jax import batching, numerics, sharding
from scion_jax.coefficients import Step, resolve


class Orthogonalizer(abc.ABC):
    """What `Spectral` needs: polar factors of a stack of matrices."""

    @abc.abstractmethod
    def polar(self, matrices: jax.Array) -> jax.Array:
        """Maps each matrix `U Σ Vᵀ` to (about) `U Vᵀ`.

        Args:
            matrices: Shape `(batch, rows, columns)` with `rows ≤ columns`; float32 or float64.

        Returns:
            The polar factors, of the same shape and dtype. Zero gives zero; a matrix with a NaN or
            an infinity gives NaN, the others are not touched by it.
        """


@dataclasses.dataclass(frozen=True)
class NewtonSchulz(Orthogonalizer):
    """Newton–Schulz iteration with odd quintic polynomials.

    The matrix is divided by its Frobenius norm; each step is, with `A = X Xᵀ`,

        X ← a X + (b A + c A²) X

    so a singular value σ becomes `aσ + bσ³ + cσ⁵`. The default set keeps every singular value of
    the result at most 1, and at least 0.998 for σ ≥ 0.005 of the normalized matrix.

    Attributes:
        coefficients: `"minimax"` (default), `"polar_express"` (the published set, divided by its
            supremum), `"quintic"` (Muon's and the published Scion's, raw: up to 1.202), or one
            `(a, b, c)` per step, used as given. A set that grows fast beyond σ = 1 needs a safety
            factor in low precision: `coefficients.with_safety`.
        steps: Number of steps; None means 5 for a name and the length of a given sequence. After
            construction it is the number.
        compute_dtype: Dtype of the matrix products' operands; they accumulate in at least float32.
            None means the input's, at least float32, multiplied as `jax.default_matmul_precision`
            says. `jnp.bfloat16` is faster on most accelerators; singular values then exceed 1 by
            up to 1e-2.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If the name is unknown or `steps` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> exact = NewtonSchulz(steps=8)
        >>> orthogonalize(jnp.array([[3.0, 0.0], [0.0, -2.0]]), exact).round(3)
        Array([[ 1.,  0.],
               [ 0., -1.]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (the iteration); the coefficients' sources
    stand in `coefficients`.
    """

    coefficients: str | Sequence[Step] = "minimax"
    steps: int | None = None
    compute_dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        rows = resolve(self.coefficients, self.steps)
        object.__setattr__(self, "steps", len(rows))
        if not isinstance(self.coefficients, str):
            object.__setattr__(self, "coefficients", rows)  # a list would not be hashable
        if self.compute_dtype is not None:
            dtype = jnp.dtype(self.compute_dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"compute_dtype must be a floating dtype; got {dtype}")
            object.__setattr__(self, "compute_dtype", dtype)

    def polar(self, matrices: jax.Array) -> jax.Array:
        """Runs the iteration; see `Orthogonalizer.polar`."""
        return _newton_schulz(
            matrices,
            resolve(self.coefficients, self.steps),
            matrices.dtype if self.compute_dtype is None else jnp.dtype(self.compute_dtype),
        )


# Compiled on its own, so that calls outside of jit do not compile the loop anew each time.
@functools.partial(jax.jit, static_argnames=("rows", "narrow"))
def _newton_schulz(matrices: jax.Array, rows: tuple[Step, ...], narrow: jnp.dtype) -> jax.Array:
    wide = numerics.widest(narrow, jnp.float32)

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, preferred_element_type=wide)

    def step(x: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = row
        gram = product(x, x.mT).astype(narrow)
        polynomial = b * gram.astype(wide) + c * product(gram, gram)
        x = a * x.astype(wide) + product(polynomial.astype(narrow), x)
        return x.astype(narrow), None

    x = numerics.normalize(matrices, (1, 2)).astype(narrow)
    x, _ = jax.lax.scan(step, x, jnp.asarray(np.array(rows), wide))
    return x.astype(matrices.dtype)


@dataclasses.dataclass(frozen=True)
class ExactPolar(Orthogonalizer):
    """The polar factor by singular value decomposition: for tests and small models.

    Directions whose singular value vanishes to rounding are left out, so `U Vᵀ` of a
    rank-deficient matrix is a partial isometry and zero gives zero.

    Example:
        >>> import jax.numpy as jnp
        >>> orthogonalize(jnp.array([[3.0, 0.0], [0.0, 0.0]]), ExactPolar())
        Array([[1., 0.],
               [0., 0.]], dtype=float32)
    """

    def polar(self, matrices: jax.Array) -> jax.Array:
        """Decomposes each matrix; see `Orthogonalizer.polar`."""
        u, sigma, vt = jnp.linalg.svd(numerics.normalize(matrices, (1, 2)), full_matrices=False)
        rounding = jnp.finfo(matrices.dtype).eps * matrices.shape[-1]
        negligible = sigma <= rounding * jnp.max(sigma, axis=-1, keepdims=True)
        u = u * jnp.where(negligible, 0, jnp.ones_like(sigma))[:, None, :]
        return jnp.matmul(u, vt, precision=jax.lax.Precision.HIGHEST)


def orthogonalize(matrix: jax.Array, orthogonalizer: Orthogonalizer | None = None) -> jax.Array:
    """Maps a matrix, or each matrix of a batch, to its polar factor.

        U Σ Vᵀ  →  U Vᵀ

    Args:
        matrix: Shape `(…, m, n)`, any floating dtype.
        orthogonalizer: How; `NewtonSchulz()` if None.

    Returns:
        Array of the shape, dtype and sharding of `matrix`.

    Raises:
        TypeError: If `matrix` is not floating.
        ValueError: If its rank is less than 2.

    Example:
        >>> import jax.numpy as jnp
        >>> orthogonalize(jnp.array([[0.0, 5.0], [-2.0, 0.0]]), ExactPolar())
        Array([[ 0.,  1.],
               [-1.,  0.]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Table 2 (the spectral LMO).
    """
    if matrix.ndim < 2:
        raise ValueError(f"orthogonalize needs matrices, (…, m, n); got shape {matrix.shape}")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"orthogonalize needs a floating dtype; got {matrix.dtype}")
    if not matrix.size:
        return jnp.asarray(matrix)
    whole = numerics.at_least_float32(sharding.replicate(matrix))
    stack = whole.reshape(-1, *matrix.shape[-2:])
    (polar,) = orthogonalize_stacks([stack], orthogonalizer or NewtonSchulz())
    return sharding.shard_like(polar.reshape(matrix.shape).astype(matrix.dtype), matrix)


def orthogonalize_stacks(
    batches: Sequence[jax.Array], orthogonalizer: Orthogonalizer
) -> list[jax.Array]:
    """Orthogonalizes batches of matrices, those of one shape together.

    Args:
        batches: Arrays `(batch, m, n)`, float32 or float64, not split over Explicit mesh axes.
        orthogonalizer: How.

    Returns:
        The polar factors, in the same order, shapes and dtypes.
    """
    return batching.map_stacks(
        lambda stack: orthogonalizer.polar(stack) if stack.size else stack, batches
    )
