"""Block trees: the layers of a GPT-2, which the optimizers are compared on.

A layer of width `d` has the kernels `query`, `key`, `value` and `output`, `d × d`, `expand`,
`d × 4d`, and `contract`, `4d × d`, each `(input, output)` as Flax stores it. Where time and memory
are measured, that is all: biases and gains need no orthogonalization, and cost a few passes over a
little memory under any optimizer. Where code is measured they count as much as matrices, and a
layer has its vectors, too: the biases of all six, and two gains and two biases of normalizations.
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


def block_shapes(layers: int, width: int, vectors: bool = False) -> Tree:
    """Returns the shapes of the parameters, which need no memory.

    Args:
        layers: The number of layers.
        width: The width `d` of the residual stream.
        vectors: Whether layers have their biases and gains.

    Returns:
        A `jax.ShapeDtypeStruct` in float32 for each parameter, by layer and name.
    """
    sizes: dict[str, tuple[int, ...]] = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "output": (width, width),
        "expand": (width, 4 * width),
        "contract": (4 * width, width),
    }
    if vectors:
        sizes |= {f"{name}_bias": size[1:] for name, size in sizes.items()}
        norms = ("attention_norm", "mlp_norm")
        sizes |= {f"{name}_{part}": (width,) for name in norms for part in ("scale", "bias")}
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
