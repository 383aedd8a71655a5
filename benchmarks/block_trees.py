"""Block trees: the hidden matrices of a GPT-2, which the optimizers are compared on.

A layer of width `d` has the kernels `query`, `key`, `value` and `output`, `d × d`, `expand`,
`d × 4d`, and `contract`, `4d × d`, each `(input, output)` as Flax stores it. Embeddings, biases and
gains are left out: they need no orthogonalization, and their cost is that of a few passes over
memory under any optimizer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.flops import flops
from scion_jax import NewtonSchulz, Spectral, unconstrained_scion

Tree = dict[str, dict[str, Any]]

SQUARE_PER_LAYER = 4  # d × d matrices

LEARNING_RATE = 1e-3  # of no consequence for time and memory
OURS, PEER = "unconstrained_scion", "optax.contrib.muon"
COMPARED: dict[str, optax.GradientTransformation] = {
    OURS: unconstrained_scion(LEARNING_RATE, Spectral()),
    PEER: optax.contrib.muon(LEARNING_RATE),
}


def block_shapes(layers: int, width: int) -> Tree:
    """Returns the shapes of the matrices, which need no memory.

    Args:
        layers: The number of layers.
        width: The width `d` of the residual stream.

    Returns:
        A `jax.ShapeDtypeStruct` in float32 for each matrix, by layer and name.
    """
    sizes = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "output": (width, width),
        "expand": (width, 4 * width),
        "contract": (4 * width, width),
    }
    return {
        f"layer{index}": {
            name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()
        }
        for index in range(layers)
    }


def gaussian_like(shapes: Any, seed: int) -> Any:
    """Draws arrays of independent standard normal numbers.

    Args:
        shapes: A tree of arrays or of their shapes.
        seed: Of the numbers.

    Returns:
        A tree of arrays.
    """
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape, np.float32), leaf.dtype),
        shapes,
    )


def array_bytes(tree: Any) -> int:
    """Returns the size of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def necessary_flops(tree: Any, orthogonalizer: NewtonSchulz) -> int:
    """Counts the products that orthogonalizing a tree of matrices takes.

    Args:
        tree: Matrices or their shapes.
        orthogonalizer: The method.

    Returns:
        Floating-point operations of all matrix products, two for each multiply-add; what is done
        for each entry is left out.
    """
    sizes = (sorted(leaf.shape) for leaf in jax.tree.leaves(tree))
    return sum(flops(orthogonalizer, rows, columns) for rows, columns in sizes)
