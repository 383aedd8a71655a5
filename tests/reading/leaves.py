"""Tables of leaves: what the parameters of a model are to its loss, and short words for them.

A table maps paths to layouts: `"io"` is a matrix, `"o"` a vector, and what is something else says
so: `"embedding io"`.
"""

import re

import jax
import jax.numpy as jnp
import optax

from scion_jax import infer_norms


def of(kernel, bias=None):
    return {"kernel": kernel} | ({"bias": bias} if bias else {})


ORDINARY = ("first", "hidden", "vectors")
LINEAR = of("io", "o")
NORM = {"scale": "o", "bias": "o"}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def squares(outputs):
    """A loss: the mean of the squares of all that a model returns."""
    return sum(jnp.mean(jnp.square(output)) for output in jax.tree.leaves(outputs))


def cross_entropy(logits, classes):
    """Another one: how unlikely the classes are."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


def read(function, params, *inputs, **options):
    """Reads a program; returns its table."""
    assignment = infer_norms(function, params, *inputs, **{"last": None, **options})
    table = {}
    for entry in assignment.entries:
        word, layout = entry.label.rsplit(" ", 1)
        assert entry.norm.layout == layout
        table[entry.path.removeprefix("params/")] = layout if word in ORDINARY else entry.label
        if word in ORDINARY:
            assert (word == "vectors") == (not re.search("[is]", layout)), entry
    return table


def under(prefix, table):
    return {f"{prefix}/{path}": layout for path, layout in table.items()}


def stack(table, axis=0):
    """Layers along an axis; numbers that are stacked are a vector of one entry each."""
    stacked = {}
    for path, layout in table.items():
        letters = re.findall(r"\w(?:\[.*?\])?", layout)
        letters.insert(len(letters) + 1 + axis if axis < 0 else axis, "b")
        stacked[path] = "".join(letters)
    return stacked


def attention(bias=True):
    kernels = {f"{part}/kernel": "ioo" for part in ("query", "key", "value")}
    biases = {f"{part}/bias": "oo" for part in ("query", "key", "value")} | {"out/bias": "o"}
    return {**kernels, "out/kernel": "iio", **(biases if bias else {})}
