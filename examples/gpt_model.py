"""A small GPT in Flax NNX whose every parameter is a matrix with a known role.

No biases and no norm gains: each layer is one matrix, and a norm ball around each matrix bounds the
whole network. `scaled_relu_squared` keeps the variance of its input, as the radii assume.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gpt_mesh import split_batch
from scion_jax import scaled_relu_squared

ROTARY_BASE = 10_000.0
INITIAL_DEVIATION = 0.02  # used by AdamW and Muon; the scion family starts on its own balls

Matrix = partial(nnx.Linear, use_bias=False, kernel_init=nnx.initializers.normal(INITIAL_DEVIATION))


def rms_norm(x: jax.Array) -> jax.Array:
    """Scales the last axis to a root mean square of 1, without parameters."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding: turns pairs of channels by angles that grow with the position.

    Args:
        x: Queries or keys, shape ``(batch, sequence, heads, channels)``.

    Returns:
        The same, turned, so that dot products depend on distances only.
    """
    length, half = x.shape[1], x.shape[3] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = jnp.arange(length, dtype=x.dtype)[:, None] * frequency
    cosine, sine = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with normalized, rotated queries and keys."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        """Makes the four matrices."""
        self.heads = heads
        self.query = Matrix(width, width, rngs=rngs)
        self.key = Matrix(width, width, rngs=rngs)
        self.value = Matrix(width, width, rngs=rngs)
        self.output = Matrix(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, sequence, width)`` to the same shape."""
        per_head = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        query = rotate(rms_norm(self.query(x).reshape(per_head)))
        key = rotate(rms_norm(self.key(x).reshape(per_head)))
        value = self.value(x).reshape(per_head)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.reshape(x.shape))


class Perceptron(nnx.Module):
    """The block's two matrices with the squared rectifier between them."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        """Makes the two matrices."""
        self.expand = Matrix(width, 4 * width, rngs=rngs)
        self.contract = Matrix(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, sequence, width)`` to the same shape."""
        return self.contract(scaled_relu_squared(self.expand(x)))


class Block(nnx.Module):
    """Attention, then perceptron, each added to what it reads in normalized form."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        """Makes both halves."""
        self.attention = Attention(width, heads, rngs)
        self.perceptron = Perceptron(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, sequence, width)`` to the same shape."""
        x = x + self.attention(rms_norm(x))
        return x + self.perceptron(rms_norm(x))


class GPT(nnx.Module):
    """The decoder: embedding, blocks, head."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, tied: bool, rngs: nnx.Rngs
    ) -> None:
        """Makes the model.

        Args:
            vocabulary: The number of different tokens.
            width: The width of the residual stream.
            layers: The number of blocks.
            heads: The attention heads of a block.
            tied: Whether the embedding is also the output head.
            rngs: Flax's random streams.
        """
        self.embedding = nnx.Embed(
            vocabulary,
            width,
            embedding_init=nnx.initializers.normal(INITIAL_DEVIATION),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.head = None if tied else Matrix(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``(batch, sequence)`` to logits ``(batch, sequence, vocabulary)``."""
        x = split_batch(rms_norm(self.embedding(tokens)))
        for block in self.blocks:
            x = split_batch(block(x))
        x = rms_norm(x)
        return self.embedding.attend(x) if self.head is None else self.head(x)
