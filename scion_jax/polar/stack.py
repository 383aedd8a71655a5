"""Stacks: matrices of one shape, lying or standing, that go through an iteration together.

The polar factor of `Xᵀ` is the transpose of that of `X`, so a `3072 × 768` matrix may share all
work on small `768 × 768` matrices with the `768 × 3072` ones. Nothing has to be transposed for it:
the small matrix is `X Xᵀ` of the one and `Xᵀ X` of the other, and multiplies from the left or the
right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Product = Callable[[jax.Array, jax.Array], jax.Array]


class Stack(NamedTuple):
    """Matrices of one shape, `n × m` or `m × n` with `n ≤ m`; at least one of the two is there.

    Attributes:
        wide: Shape `(batch, n, m)`, or None.
        tall: Shape `(batch, m, n)`, or None.
    """

    wide: jax.Array | None = None
    tall: jax.Array | None = None

    @property
    def parts(self) -> tuple[jax.Array, ...]:
        """What is there of `wide` and `tall`."""
        return tuple(part for part in self if part is not None)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of the lying and of the standing matrices."""
        wide, tall = (0 if part is None else part.shape[0] for part in self)
        return wide, tall

    @property
    def small(self) -> int:
        """`n`, the smaller side."""
        return min(self.parts[0].shape[1:])

    @property
    def large(self) -> int:
        """`m`, the larger side."""
        return max(self.parts[0].shape[1:])

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of all matrices."""
        return self.parts[0].dtype

    def map(self, function: Callable[..., jax.Array], *others: Stack) -> Stack:
        """Applies a function to the lying and to the standing matrices (with those of `others`)."""
        parts = zip(self, *others, strict=True)
        return Stack(*(None if part[0] is None else function(*part) for part in parts))

    def split(self, values: jax.Array) -> Stack:
        """Splits an array with one entry, or small matrix, for each matrix of the stack."""
        parts = zip(self, jnp.split(values, self.sizes[:1]), strict=True)
        return Stack(*(None if part is None else value for part, value in parts))

    def gram(self, symmetric_product: Product) -> jax.Array:
        """Computes `X Xᵀ` of the lying and `Xᵀ X` of the standing matrices.

        Args:
            symmetric_product: Computes `A Bᵀ`.

        Returns:
            Shape `(batch, n, n)`, the lying matrices first.
        """
        grams = []
        if self.wide is not None:
            grams.append(symmetric_product(self.wide, self.wide))
        if self.tall is not None:
            grams.append(symmetric_product(self.tall.mT, self.tall.mT))
        return grams[0] if len(grams) == 1 else jnp.concatenate(grams)

    def multiply(self, small: jax.Array, product: Product) -> Stack:
        """Computes `S X` for the lying and `X S` for the standing matrices.

        Args:
            small: Symmetric matrices `S`, `(batch, n, n)`, the lying matrices' first.
            product: Computes `A B`.

        Returns:
            The products.
        """
        wide, tall = self.split(small)
        return Stack(
            None if self.wide is None or wide is None else product(wide, self.wide),
            None if self.tall is None or tall is None else product(self.tall, tall),
        )
