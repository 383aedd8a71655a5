"""Orthogonalizers: the polar factor `U Vᵀ` of a matrix `U Σ Vᵀ`, iterated or exact.

`U Vᵀ` is the LMO of the spectral norm: it maximizes `⟨M, X⟩` over `‖X‖_{S∞} ≤ 1`, and the maximum
is the nuclear norm of `M`. Newton–Schulz approximates it with matrix products only, by applying an
odd polynomial to the singular values until all that matter are near 1 (see `_coefficients` and
`_newton_schulz`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax import _numerics as numerics
from scion_jax import _sharding as sharding
from scion_jax._checks import check_array, check_dtype
from scion_jax.polar._coefficients import Step, schatten_of, steps_of
from scion_jax.polar._cpu import by_platform
from scion_jax.polar._newton_schulz import newton_schulz
from scion_jax.polar._pieces import cut, joined


class Orthogonalizer(abc.ABC):
    """What `Spectral` needs: polar factors of a stack of matrices.

    Attributes:
        may_be_skipped: Whether devices that have no matrix need not call `polar`. It must then not
            communicate, close over nothing that is traced, and return what type it is given.
    """

    may_be_skipped: ClassVar[bool] = False

    def input_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Chooses what matrices are cast to before they move to their devices and are iterated.

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
            matrices: Shape `(batch, rows, columns)`, not empty, in the input dtype.

        Returns:
            The polar factors, of the same shape and dtype. Zero gives zero; a matrix with a NaN or
            an infinity gives NaN, the others are not touched by it.
        """

    def polar_of_pieces(self, grid: jax.Array) -> jax.Array:
        """Does the same for matrices in pieces, as they come from several devices.

        Args:
            grid: Shape `(down, across, batch, rows, columns)`; see `_pieces`.

        Returns:
            The polar factors, in the same pieces. By default the matrices are put together.
        """
        return cut(self.polar(joined(grid)), grid.shape)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz(Orthogonalizer):
    """Newton–Schulz iteration with odd quintic polynomials.

    The matrix is divided by a Schatten norm; each step is, with `A = X Xᵀ`,

        X ← a X + (b A + c A²) X

    so a singular value σ becomes `aσ + bσ³ + cσ⁵`. The default set keeps every singular value of
    the result at most 1, and at least 0.969 for σ ≥ 0.01 of the normalized matrix. How the products
    are organized (`_newton_schulz`) follows from the matrix' shape and the dtype.

    Attributes:
        coefficients: `"minimax"` (default), `"polar_express"` (the published set, divided by its
            supremum), `"quintic"` (Muon's and the published Scion's, raw: up to 1.202), or one
            `(a, b, c)` per step, used as given. A set that grows fast beyond σ = 1 needs a safety
            factor in low precision: `with_safety`.
        steps: Number of steps; None means 4 for `"minimax"`, 5 for the other names, and the length
            of a given sequence.
        compute_dtype: Dtype of the matrix products' factors; sums are taken in at least float32.
            None means float64 for float64 matrices; for all others bfloat16 (singular values then
            exceed 1 by up to 0.005), but float32 on CPUs. A CPU with instructions for bfloat16
            (AVX-512 BF16) is faster with `jnp.bfloat16`, others are slower.
        schatten: Which Schatten norm is divided by: 2, the Frobenius norm, as published, or 4,
            which is closer to the largest singular value and leaves the others further from 0.
            None means 2 for `"quintic"` and given sequences, else 4.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If the name is unknown, `steps` is less than 1, or `schatten` not 2 or 4.

    Example:
        >>> import jax.numpy as jnp
        >>> exact = NewtonSchulz(steps=8, compute_dtype=jnp.float32)
        >>> orthogonalize(jnp.array([[3.0, 0.0], [0.0, -2.0]]), exact).round(3)
        Array([[ 1.,  0.],
               [ 0., -1.]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (the iteration); the coefficients' sources
    stand in `_coefficients`.
    """

    coefficients: str | Sequence[Step] = "minimax"
    steps: int | None = None
    compute_dtype: DTypeLike | None = None
    schatten: int | None = None
    may_be_skipped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = steps_of(self.coefficients, None)
        steps_of(self.coefficients, self.steps)
        check_dtype("compute_dtype", self.compute_dtype)
        if self.schatten not in (2, 4, None):
            raise ValueError(f"schatten is 2 (Frobenius), 4, or None; got {self.schatten!r}")
        # Equal methods are to be equal, and hashable.
        if not isinstance(self.coefficients, str):
            object.__setattr__(self, "coefficients", given)
        if self.compute_dtype is not None:
            object.__setattr__(self, "compute_dtype", jnp.dtype(self.compute_dtype))

    def _factor_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Chooses the compute dtype for matrices of a dtype."""
        if self.compute_dtype is not None:
            return jnp.dtype(self.compute_dtype)
        return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.bfloat16)

    def input_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Chooses bfloat16 if it is the compute dtype; float64 reaches further, so it stays."""
        wide = super().input_dtype(dtype)
        narrow = self._factor_dtype(dtype)
        return narrow if narrow == jnp.bfloat16 and wide == jnp.float32 else wide

    def polar(self, matrices: jax.Array) -> jax.Array:
        """Runs the iteration; see `Orthogonalizer.polar`."""
        return self.polar_of_pieces(matrices[None, None])[0, 0]

    def polar_of_pieces(self, grid: jax.Array) -> jax.Array:
        """Runs the iteration on the pieces; see `Orthogonalizer.polar_of_pieces`."""
        return _iterated(grid, self)


# Compiled on its own, so that calls outside of jit do not compile the iteration anew each time.
@functools.partial(jax.jit, static_argnums=1)
def _iterated(grid: jax.Array, method: NewtonSchulz) -> jax.Array:
    steps = steps_of(method.coefficients, method.steps)
    schatten = method.schatten or schatten_of(method.coefficients)
    dtype = method._factor_dtype(grid.dtype)
    return by_platform(
        lambda x, products: newton_schulz(x, steps, schatten, products),
        grid,
        dtype,
        cpu_dtype=dtype if method.compute_dtype else numerics.widest(dtype, jnp.float32),
    )


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

    may_be_skipped: ClassVar[bool] = True

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
    check_array(matrix, "matrix")
    if matrix.ndim < 2:
        raise ValueError(
            f"matrix has shape {matrix.shape}; orthogonalize needs matrices, (…, m, n)"
        )
    orthogonalizer = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    check_orthogonalizer("orthogonalize", orthogonalizer)
    if not matrix.size:
        return jnp.asarray(matrix)
    whole = sharding.replicate(matrix).astype(orthogonalizer.input_dtype(matrix.dtype))
    polar = orthogonalizer.polar(whole.reshape(-1, *matrix.shape[-2:]))
    return sharding.shard_like(polar.reshape(matrix.shape).astype(matrix.dtype), matrix)
