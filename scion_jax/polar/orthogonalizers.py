"""Orthogonalizers: the polar factor `U Vᵀ` of a matrix `U Σ Vᵀ`, iterated or exact.

`U Vᵀ` is the LMO of the spectral norm: it maximizes `⟨M, X⟩` over `‖X‖_{S∞} ≤ 1`, and the maximum
is the nuclear norm of `M`. Newton–Schulz approximates it with matrix products only, by applying an
odd polynomial to the singular values until all that matter are near 1 (see `coefficients` and
`newton_schulz`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax import numerics
from scion_jax.distributed import sharding
from scion_jax.distributed.bucketing import map_stacks
from scion_jax.polar import hardware, newton_schulz
from scion_jax.polar.arithmetic import Arithmetic
from scion_jax.polar.coefficients import Step, resolve
from scion_jax.polar.stack import Stack

_CHUNK_BYTES_CPU = 2**21
_CHUNK_BYTES = 2**28


class Orthogonalizer(abc.ABC):
    """What `Spectral` needs: polar factors of a stack of matrices."""

    @property
    def largest_chunk(self) -> int:
        """Bytes of the matrices that are worked on at the same time (at least one matrix).

        Longer stacks go through in chunks, so that temporary memory is bounded.
        """
        return _CHUNK_BYTES_CPU if jax.default_backend() == "cpu" else _CHUNK_BYTES

    def travel_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Chooses what matrices may be rounded to when they travel between devices.

        Args:
            dtype: Dtype of the matrices, float32 or float64.

        Returns:
            A dtype of the same range; `dtype` itself unless a subclass says otherwise.
        """
        return dtype

    @abc.abstractmethod
    def polar(self, stack: Stack) -> Stack:
        """Maps each matrix `U Σ Vᵀ` to (about) `U Vᵀ`.

        Args:
            stack: Matrices of one shape, lying or standing; float32 or float64. An implementation
                that treats both alike is `stack.map(…)` of a function of `(batch, p, q)`.

        Returns:
            The polar factors, of the same shapes and dtype. Zero gives zero; a matrix with a NaN or
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
            of a given sequence. After construction it is the number.
        compute_dtype: Dtype of the matrix products' factors; sums are taken in at least float32.
            None means bfloat16 for float32 matrices where that is faster, on accelerators and on
            x86 CPUs with AVX-512 BF16 (singular values then exceed 1 by up to 1e-2), and the
            matrices' own dtype elsewhere and for float64. Processes of one program on different
            kinds of CPUs have to state it.
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
    schatten: int | None = None
    chunk_bytes: int | None = None

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
        if self.schatten is None:
            named = self.coefficients in ("minimax", "polar_express")
            object.__setattr__(self, "schatten", 4 if named else 2)
        if self.schatten not in (2, 4):
            raise ValueError(f"schatten is 2 (Frobenius), 4, or None; got {self.schatten!r}")
        numerics.check_whole("chunk_bytes", self.chunk_bytes)

    @property
    def largest_chunk(self) -> int:
        """Bytes of the matrices that are iterated at the same time; see `chunk_bytes`."""
        return super().largest_chunk if self.chunk_bytes is None else self.chunk_bytes

    def arithmetic(self, dtype: DTypeLike) -> Arithmetic:
        """Chooses how matrices of a dtype, float32 or float64, are multiplied.

        Args:
            dtype: Dtype of the matrices.

        Returns:
            The dtypes of factors and sums.
        """
        narrow = self.compute_dtype
        if narrow is None:
            fast = jnp.dtype(dtype) == jnp.float32 and hardware.multiplies_bfloat16()
            narrow = jnp.bfloat16 if fast else dtype
        return Arithmetic(jnp.dtype(narrow), numerics.widest(narrow, jnp.float32))

    def travel_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Chooses bfloat16 if it is the compute dtype; float16 has a smaller range."""
        return jnp.bfloat16 if self.arithmetic(dtype).narrow == jnp.bfloat16 else dtype

    def flops(self, rows: int, columns: int, dtype: DTypeLike = jnp.float32) -> int:
        """Counts the floating-point operations of the matrix products for one matrix.

        Args:
            rows: Number of rows.
            columns: Number of columns.
            dtype: Dtype of the matrix.

        Returns:
            Multiplications and additions.

        Example:
            >>> NewtonSchulz("quintic", 5).flops(128, 128) == 5 * 3 * 2 * 128**3
            True
        """
        small, large = sorted((rows, columns))
        steps = resolve(self.coefficients, self.steps)
        return newton_schulz.flops(small, large, steps, self.arithmetic(dtype).narrow)

    def polar(self, stack: Stack) -> Stack:
        """Runs the iteration; see `Orthogonalizer.polar`."""
        rows = resolve(self.coefficients, self.steps)
        return _newton_schulz(stack, rows, self.schatten or 2, self.arithmetic(stack.dtype))


# Compiled on its own, so that calls outside of jit do not compile the iteration anew each time.
_newton_schulz = jax.jit(newton_schulz.newton_schulz, static_argnums=(1, 2, 3))


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

    def polar(self, stack: Stack) -> Stack:
        """Decomposes each matrix; see `Orthogonalizer.polar`."""
        return stack.map(_exact_polar)


def _exact_polar(matrices: jax.Array) -> jax.Array:
    u, sigma, vt = jnp.linalg.svd(numerics.normalize(matrices, (1, 2)), full_matrices=False)
    rounding = jnp.finfo(matrices.dtype).eps * max(matrices.shape[1:])
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
    return map_stacks(
        lambda stack: stack if _empty(stack) else orthogonalizer.polar(stack),
        batches,
        orthogonalizer.largest_chunk,
    )


def _empty(stack: Stack) -> bool:
    return not any(part.size for part in stack.parts)
