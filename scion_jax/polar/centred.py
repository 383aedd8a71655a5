"""Symmetric matrices as `s I + M`, with `M` of trace zero.

In a product of two, `(s I + M)(t I + N) = s t I + s N + t M + M N`, only the factors of `M N` are
rounded. Where the eigenvalues are close to each other, `M` is small and so is what rounding does;
nothing is lost where they are not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from scion_jax.polar.arithmetic import Arithmetic
from scion_jax.polar.stack import Stack


class Centred(NamedTuple):
    """A batch of symmetric matrices `s I + M`.

    Attributes:
        mean: `s`, the mean eigenvalue, `(batch, 1, 1)`.
        rest: `M`, of trace zero, `(batch, n, n)`.
    """

    mean: jax.Array
    rest: jax.Array

    @classmethod
    def of(cls, mean: jax.Array, rest: jax.Array) -> Centred:
        """Centres `mean · I + rest`, whatever the trace of `rest`."""
        batch, n, _ = rest.shape
        diagonal = rest.reshape(batch, n * n)[:, :: n + 1]
        shift = jnp.mean(diagonal, axis=1)[:, None, None]
        return cls(mean + shift, rest - shift * jnp.eye(n, dtype=rest.dtype))

    def commuting_product(self, other: Centred, arithmetic: Arithmetic) -> Centred:
        """Multiplies matrices that commute, so that the product is symmetric too."""
        s, m = self
        t, n = other
        return Centred.of(s * t, s * n + t * m + arithmetic.commuting(m, n))

    def polynomial(
        self, a: jax.Array, b: jax.Array, c: jax.Array, arithmetic: Arithmetic
    ) -> Centred:
        """Computes `a I + b X + c X²`."""
        s, m = self
        square = arithmetic.commuting(m, m)
        return Centred.of(a + s * (b + c * s), (b + 2 * c * s) * m + c * square)

    def times(self, x: Stack, arithmetic: Arithmetic) -> Stack:
        """Computes `S X` for the lying and `X S` for the standing matrices of a stack."""
        product = x.multiply(self.rest, arithmetic.product)
        return product.map(
            lambda new, s, old: new + s * old.astype(new.dtype), x.split(self.mean), x
        )

    def divided(self, size: jax.Array) -> Centred:
        """Divides by one number per matrix, `(batch, 1, 1)`."""
        return Centred(self.mean / size, self.rest / size)
