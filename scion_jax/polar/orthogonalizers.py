"""Orthogonalizers: the polar factor `U Vᵀ` of a matrix `U Σ Vᵀ`, iterated or exact.

`U Vᵀ` is the LMO of the spectral norm: it maximizes `⟨M, X⟩` over `‖X‖_{S∞} ≤ 1`, and the maximum
is the nuclear norm of `M`. Newton–Schulz approximates it with matrix products only, by applying an
odd polynomial to the singular values until all that matter are near 1 (see `coefficients` and
`newton_schulz`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax import hyperparameters, numerics
from scion_jax.distributed import sharding
from scion_jax.distributed.bucketing import in_chunks, map_buckets
from scion_jax.polar import cpu
from scion_jax.polar.coefficients import Step, resolve
from scion_jax.polar.newton_schulz import Products, flops, newton_schulz

_CHUNK_BYTES = 2**28


class Orthogonalizer(abc.ABC):
    """What `Spectral` needs: polar factors of a stack of matrices."""

    def communication_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Chooses what matrices are cast to when they are stacked, to travel between devices.

        Args:
            dtype: Dtype of the matrices.

        Returns:
            A dtype of at least the same range: `dtype`, or float32 if that is wider, unless a
            subclass says otherwise.
        """
        return numerics.widest(dtype, jnp.float32)

    @abc.abstractmethod
    def polar(self, matrices: jax.Array) -> jax.Array:
        """Maps each matrix `U Σ Vᵀ` to (about) `U Vᵀ`.

        Args:
            matrices: Shape `(batch, n, m)` with n ≤ m, not empty, in the communication dtype.

        Returns:
            The polar factors, of the same shape and dtype. Zero gives zero; a matrix with a NaN or
            an infinity gives NaN, the others are not touched by it.
        """


@dataclasses.dataclass(frozen=True)
class NewtonSchulz(Orthogonalizer):
    """Newton–Schulz iteration with odd quintic polynomials.

    The matrix is divided by a Schatten norm; each step is, with `A = X Xᵀ`,

        X ← a X + (b A + c A²) X

    so a singular value σ becomes `aσ + bσ³ + cσ⁵`. The default set keeps every singular value of
    the result at most 1, and at least 0.969 for σ ≥ 0.01 of the normalized matrix. How the products
    are organized (`newton_schulz`) follows from the matrix' shape and the dtype.

    Attributes:
        coefficients: `"minimax"` (default), `"polar_express"` (the published set, divided by its
            supremum), `"quintic"` (Muon's and the published Scion's, raw: up to 1.202), or one
            `(a, b, c)` per step, used as given. A set that grows fast beyond σ = 1 needs a safety
            factor in low precision: `coefficients.with_safety`.
        steps: Number of steps; None means 4 for `"minimax"`, 5 for the other names, and the length
            of a given sequence.
        compute_dtype: Dtype of the matrix products' factors; sums are taken in at least float32.
            None means float64 for float64 matrices, bfloat16 for all others (singular values then
            exceed 1 by up to 0.005), except that CPUs without AVX-512 BF16 take float32: processes
            of one program on different kinds of CPUs have to state it.
        schatten: Which Schatten norm is divided by: 2, the Frobenius norm, as published, or 4,
            which is closer to the largest singular value and leaves the others further from 0.
            None means 2 for `"quintic"` and given sequences, else 4.
        chunk_bytes: Size of the matrices that are iterated at the same time, at least one matrix;
            temporary memory is a few times that. None means 2 MiB on CPUs and 256 MiB elsewhere.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If the name is unknown, `steps` or `chunk_bytes` is less than 1, or `schatten`
            is neither 2 nor 4.

    Example:
        >>> import jax.numpy as jnp
        >>> exact = NewtonSchulz(steps=8, compute_dtype=jnp.float32)
        >>> orthogonalize(jnp.array([[3.0, 0.0], [0.0, -2.0]]), exact).round(3)
        Array([[ 1.,  0.],
               [ 0., -1.]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (the iteration); the coefficients' sources
    stand in `coefficients`.
    """

    coefficients: str | Sequence[Step] = "minimax"
    steps: int | None = None
    compute_dtype: DTypeLike | None = None
    schatten: int | None = None
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        resolve(self.coefficients, self.steps)
        if not isinstance(self.coefficients, str):  # a list would not be hashable
            object.__setattr__(self, "coefficients", resolve(self.coefficients, None))
        hyperparameters.check_dtype("compute_dtype", self.compute_dtype)
        if self.compute_dtype is not None:  # equal dtypes are to be equal norms
            object.__setattr__(self, "compute_dtype", jnp.dtype(self.compute_dtype))
        if not isinstance(self.schatten, int | None) or self.schatten not in (2, 4, None):
            raise ValueError(f"schatten is 2 (Frobenius), 4, or None; got {self.schatten!r}")
        hyperparameters.check_whole("chunk_bytes", self.chunk_bytes)

    def _factor_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Chooses the compute dtype for matrices of a dtype."""
        if self.compute_dtype is not None:
            return jnp.dtype(self.compute_dtype)
        return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.bfloat16)

    def communication_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Chooses bfloat16 if it is the compute dtype; float64 reaches further, so it stays."""
        wide = super().communication_dtype(dtype)
        narrow = self._factor_dtype(dtype)
        return narrow if narrow == jnp.bfloat16 and wide == jnp.float32 else wide

    def flops(self, rows: int, columns: int, dtype: DTypeLike = jnp.float32) -> int:
        """Counts the floating-point operations of the matrix products for one matrix.

        Args:
            rows: Number of rows.
            columns: Number of columns.
            dtype: Dtype of the matrix.

        Returns:
            Multiplications and additions; CPUs may save some.

        Example:
            >>> NewtonSchulz("quintic", 5).flops(128, 128) == 5 * 3 * 2 * 128**3
            True
        """
        n, m = sorted((rows, columns))
        return flops(n, m, len(resolve(self.coefficients, self.steps)), self._factor_dtype(dtype))

    def polar(self, matrices: jax.Array) -> jax.Array:
        """Runs the iteration; see `Orthogonalizer.polar`."""
        return _newton_schulz(matrices, self)

    def _in_chunks(
        self, matrices: jax.Array, products: Products, default_chunk_bytes: int
    ) -> jax.Array:
        steps = resolve(self.coefficients, self.steps)
        published = self.coefficients not in ("minimax", "polar_express")
        schatten = self.schatten or (2 if published else 4)
        return in_chunks(
            lambda x: newton_schulz(x, steps, schatten, products),
            matrices,
            self.chunk_bytes or default_chunk_bytes,
        )


# Compiled on its own, so that calls outside of jit do not compile the iteration anew each time.
@functools.partial(jax.jit, static_argnums=1)
def _newton_schulz(matrices: jax.Array, method: NewtonSchulz) -> jax.Array:
    dtype = method._factor_dtype(matrices.dtype)

    def on_cpu(matrices: jax.Array) -> jax.Array:
        chosen = dtype if method.compute_dtype else cpu.default_dtype(dtype)
        products = cpu.CpuProducts(chosen)
        return method._in_chunks(products.prepare(matrices), products, cpu.CHUNK_BYTES)

    def elsewhere(matrices: jax.Array) -> jax.Array:
        return method._in_chunks(matrices, Products(dtype), _CHUNK_BYTES)

    return jax.lax.platform_dependent(matrices, cpu=on_cpu, default=elsewhere)


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
        rounding = jnp.finfo(matrices.dtype).eps * max(matrices.shape[1:])
        negligible = sigma <= rounding * jnp.max(sigma, axis=-1, keepdims=True)
        u = u * jnp.where(negligible, 0, jnp.ones_like(sigma))[:, None, :]
        return jnp.matmul(u, vt, precision=jax.lax.Precision.HIGHEST)


def check_orthogonalizer(name: str, orthogonalizer: object) -> None:
    """Raises `TypeError` unless it is an orthogonalizer."""
    if not isinstance(orthogonalizer, Orthogonalizer):
        raise TypeError(
            f"{name}: orthogonalizer is NewtonSchulz(…) or ExactPolar(); got {orthogonalizer!r}"
        )


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
    numerics.check_floating(matrix, "matrix")
    if matrix.ndim < 2:
        raise ValueError(
            f"matrix has shape {matrix.shape}; orthogonalize needs matrices, (…, m, n)"
        )
    orthogonalizer = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    check_orthogonalizer("orthogonalize", orthogonalizer)
    if not matrix.size:
        return jnp.asarray(matrix)
    whole = sharding.replicate(matrix).astype(orthogonalizer.communication_dtype(matrix.dtype))
    (polar,) = map_buckets(orthogonalizer.polar, [whole.reshape(-1, *matrix.shape[-2:])])
    return sharding.shard_like(polar.reshape(matrix.shape).astype(matrix.dtype), matrix)
