"""How small matrices are multiplied: in which dtypes, and with how much of the work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scion_jax.polar.symmetric import splits, symmetric_product


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Dtypes of matrix products.

    Attributes:
        narrow: Dtype of the factors.
        wide: Dtype of sums and products, at least float32.
    """

    narrow: jnp.dtype
    wide: jnp.dtype

    @property
    def rounds(self) -> bool:
        """Whether factors are rounded to fewer digits than float32 has."""
        return bool(jnp.finfo(self.narrow).eps > jnp.finfo(jnp.float32).eps)

    def product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y`."""
        # Accelerators would round float32 factors; who wants that asks for bfloat16.
        return jnp.matmul(
            x.astype(self.narrow),
            y.astype(self.narrow),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=self.wide,
        )

    def commuting(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x y`, for symmetric matrices that commute."""
        if splits(x.shape[1], self.narrow):
            return self.symmetric(x, y)
        return self.product(x, y)  # no transposing: twice as fast for a batch on CPUs

    def symmetric(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes `x yᵀ`, which must be symmetric."""
        return symmetric_product(x.astype(self.narrow), y.astype(self.narrow), self.product)
