"""What Flax's layers hold, written out by hand: which entries of a parameter are which matrix.

Nothing here reads a layout. A `View` takes an array of the indices of a parameter's entries apart
into its matrices, `(d_out, columns)` each, or its vectors, with plain reshapes and slices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from naive import polar
from scion_jax import unconstrained_scion
from scion_jax.labels import leaf_path


def dense(w):
    """`(in, out)`"""
    return [w.T]


def heads(w):
    """`(in, heads, width)`: queries, keys or values"""
    return [w.reshape(len(w), -1).T]


def merge(w):
    """`(heads, width, out)`, or anything that ends in one output axis"""
    return [w.reshape(-1, w.shape[-1]).T]


def per_head(w):
    """`(heads, in, width)`, all heads one matrix"""
    return [np.concatenate([head.T for head in w])]


def stack(view):
    """Layers along the first axis"""
    return lambda w: [part for layer in w for part in view(layer)]


def stack_at(axis, view):
    """Layers along another axis"""
    return lambda w: stack(view)(np.moveaxis(w, axis, 0))


def gates(count, view=merge):
    """Several matrices along the last axis"""
    return lambda w: [p for part in np.split(w, count, axis=-1) for p in view(part)]


def transposed(w):
    """`(…, out, in)`, as `ConvTranspose(transpose_kernel=True)` has it"""
    return merge(np.swapaxes(w, -1, -2))


def vector(w):
    return [w.reshape(-1)]


def step(view, d, window=1):
    """The step of a parameter at radius 1: of matrices as Spectral, of vectors as BiasRMS."""
    d = np.asarray(d, np.float64)
    expected = np.full(d.size, np.nan)
    for entries in view(np.arange(d.size).reshape(d.shape)):
        values = d.reshape(-1)[entries]
        if entries.ndim == 1:
            expected[entries] = values / np.sqrt(np.mean(values**2))
        else:
            d_out, columns = entries.shape
            radius = np.sqrt(d_out / (columns // window)) / window
            expected[entries] = radius * polar(values)
    assert not np.isnan(expected).any(), "the view leaves entries out"
    return expected.reshape(d.shape)


def check(name, params, norms, labels, expected):
    """Compares the first step of every leaf with the one by hand."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [leaf_path(keys).removeprefix("params/") for keys, _ in leaves]
    assert sorted(paths) == sorted(expected)
    rng = np.random.default_rng(len(paths))
    gradients = [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for _, leaf in leaves]
    structure = jax.tree.structure(params)
    optimizer = unconstrained_scion(1.0, norms, labels, momentum=1.0)
    tree = structure.unflatten(gradients)
    updates, _ = jax.jit(lambda tree: optimizer.update(tree, optimizer.init(tree), tree))(tree)
    for path, update, gradient in zip(paths, jax.tree.leaves(updates), gradients, strict=True):
        view, window = expected[path] if isinstance(expected[path], tuple) else (expected[path], 1)
        want = step(view, gradient, window)
        error = np.linalg.norm(-np.asarray(update) - want) / np.linalg.norm(want)
        assert error < 1e-3, f"{name}: '{path}' {gradient.shape}: {error}"


def attention(axis=None, bias=True):
    wrap = (lambda view: view) if axis is None else (lambda view: stack_at(axis, view))
    kernels = {f"{part}/kernel": wrap(heads) for part in ("query", "key", "value")}
    biases = {f"{part}/bias": wrap(vector) for part in ("query", "key", "value", "out")}
    return {**kernels, "out/kernel": wrap(merge), **(biases if bias else {})}


def under(prefix, views):
    return {f"{prefix}/{path}": view for path, view in views.items()}
