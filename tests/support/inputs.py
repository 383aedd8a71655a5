"""Trees of parameters that users may come with, their norms and labels, and what is wrong there."""

import collections
import dataclasses
import re
from typing import Any, NamedTuple

import equinox
import jax
import numpy as np
import optax
from flax import nnx
from hypothesis import strategies as st

import scion_jax
from scion_jax._assignment import Entry
from scion_jax._paths import leaf_path
from tests.support.arguments import ARRAYS, NO_NORMS, NO_PARAMETERS, layouts, norms, one_of, raising


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Module(equinox.Module):
    weight: Any
    activation: Any = equinox.field(static=True, default=jax.nn.relu)


def _grown(children):
    names = one_of("kernel", "bias", "scale", "w", "a/b", "0", "")
    state = {"kernel": ARRAYS.map(nnx.Param), "bias": st.dictionaries(names, ARRAYS.map(nnx.Param))}
    return st.one_of(
        st.dictionaries(names, children, max_size=3),
        st.dictionaries(st.integers(0, 9), children, max_size=3).map(collections.OrderedDict),
        st.lists(children, max_size=3),
        st.builds(Pair, children, children),
        st.builds(Layer, children, children),
        st.builds(Module, children),
        st.fixed_dictionaries(state).map(nnx.State),
    )


TREES = st.recursive(ARRAYS | one_of(None, optax.MaskedNode()), _grown, max_leaves=5)


def paths_of(tree):
    """The paths of all leaves, as messages have them."""
    return tuple(f"'{leaf_path(keys)}'" for keys, _ in jax.tree_util.tree_leaves_with_path(tree))


@st.composite
def with_leaf(draw, tree, leaves):
    """The tree with another leaf, drawn for the one that was there, and its path."""
    flat, structure = jax.tree.flatten(tree)
    index = draw(st.integers(0, len(flat) - 1))
    flat[index] = draw(leaves(flat[index]))
    return structure.unflatten(flat), paths_of(tree)[index]


@dataclasses.dataclass
class Case:
    """Parameters with their norms and labels.

    Attributes:
        params: Parameters.
        norms: One norm, or norms by label.
        param_labels: Labels.
        bad: What is wrong, as an error may name it.
        certain: Whether an error must come if anything is wrong, or may.
    """

    params: Any
    norms: Any
    param_labels: Any
    bad: tuple[str, ...] = ()
    certain: bool = True


@st.composite
def cases(draw, faults=("", "", "leaf", "layout", "labels", "norms", "single")):
    """Parameters, norms and labels with at most one fault."""
    params, fault = draw(TREES), draw(one_of(*faults))
    paths, ranks = paths_of(params), [np.ndim(leaf) for leaf in jax.tree.leaves(params)]
    texts = [draw(layouts(np.shape(leaf))) for leaf in jax.tree.leaves(params)]
    if fault == "single":
        return Case(params, draw(norms(draw(one_of(None, *texts)))), None, paths, certain=False)
    labels = [draw(one_of(index, f"label {index}")) for index in range(len(texts))]
    norm_of = {label: draw(norms(text)) for label, text in zip(labels, texts, strict=True)}
    tree = jax.tree.structure(params).unflatten(labels)
    if fault == "norms" and tree is not None:
        return Case(params, draw(NO_NORMS), tree, ("norms", "a mapping of"))
    if fault == "labels" and paths:
        return Case(params, norm_of, draw(bad_labels(tree)), (*paths, "param_labels"))
    if fault == "leaf" and paths:
        params, path = draw(with_leaf(params, lambda _: NO_PARAMETERS))
        return Case(params, norm_of, tree, (path,))
    if fault == "layout" and paths:
        tree, path = draw(with_leaf(tree, lambda _: st.just("bad")))
        rank = ranks[paths.index(path)]
        text = draw(one_of("o" * (rank + 2), "o[9,9]" + "o" * (rank - 1), "i[7,2]o" + "b" * rank))
        return Case(params, {**norm_of, "bad": scion_jax.Euclidean(layout=text)}, tree, (path,))
    if len(set(paths)) == len(paths) and draw(st.booleans()):
        leaves = zip(paths, jax.tree.leaves(params), labels, strict=True)
        entries = [Entry(p[1:-1], np.shape(x), str(n), norm_of[n]) for p, x, n in leaves]
        return Case(params, scion_jax.Assignment(tuple(entries)), None)
    forms = [tree, lambda params: tree]
    if len(set(paths)) == len(paths):
        rules = [(f"^{re.escape(p[1:-1])}$", name) for p, name in zip(paths, labels, strict=True)]
        forms.append(scion_jax.label_by_path(rules))
    return Case(params, norm_of, draw(one_of(*forms[tree is None :])))  # None is no labels


@st.composite
def bad_labels(draw, tree):
    """Labels that do not fit, in any form."""
    strangers = one_of("nope", None, 99, {}, (), {1}, np.ones(2), [1, 2], object())
    stranger, _ = draw(with_leaf(tree, lambda _: strangers))
    bad = draw(one_of(stranger, [tree], {"a": tree}, (tree, tree), None, 99, "nope", {1}, object()))
    return draw(one_of(bad, lambda params: bad, raising, lambda: tree))
