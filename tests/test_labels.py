"""Routing: labels in every form that Optax takes, patterns over paths, and errors that name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from scion_jax import (
    BiasRMS,
    Euclidean,
    Sign,
    Spectral,
    init_params,
    label_by_path,
    scale_by_lmo,
    scion,
    unconstrained_scion,
)
from scion_jax._leaves import read_leaves
from scion_jax._paths import leaf_path, nearest

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

BLOCK = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
PARAMS = {"embed": {"table": jnp.ones((6, 4))}, "blocks": [BLOCK] * 2, "head": jnp.ones((4, 6))}
NORMS = {"first": Sign(2.0), "hidden": Spectral(3.0), "bias": BiasRMS(), "last": Euclidean(5.0)}
RULES = [("^embed", "first"), ("bias$", "bias"), ("blocks/[01]/", "hidden"), ("head", "last")]
BLOCKS = [{"kernel": "hidden", "bias": "bias"}] * 2
LABELS = {"embed": {"table": "first"}, "blocks": BLOCKS, "head": "last"}
PREFIX = {"embed": "first", "blocks": BLOCKS, "head": "last"}


def ones(*shape):
    return jnp.ones(shape)


def norms_of(tree, *norms):
    return [leaf.norm for leaf in read_leaves(tree, *norms)]


def test_every_form_of_labels_routes_alike():
    expected = [NORMS[label] for label in jax.tree.leaves(LABELS)]
    for labels in (LABELS, PREFIX, lambda tree: LABELS, label_by_path(RULES)):
        assert norms_of(PARAMS, NORMS, labels) == expected
    gradients = jax.tree.map(lambda p: p + jnp.arange(1.0 * p.size).reshape(p.shape), PARAMS)
    optimizer = unconstrained_scion(1.0, NORMS, PREFIX, momentum=1.0)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(PARAMS))
    steps = jax.tree.map(lambda label, g: -NORMS[label].lmo(g), LABELS, gradients)
    for got, want in zip(jax.tree.leaves(updates), jax.tree.leaves(steps), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_rules():
    tree = {"a": {"kernel": 0.0}, "b": {"kernel": 0.0}}
    labels = label_by_path([("a/", 1), ("kernel", 2), ("", 3)])(tree)  # the first match wins
    assert labels == {"a": {"kernel": 1}, "b": {"kernel": 2}}
    with pytest.raises(ValueError, match=r"leaf 'blocks/0/bias' matches no rule.*'kernel'"):
        label_by_path([("kernel", "hidden")])(PARAMS)
    tree = {"a": None, "b": optax.MaskedNode(), "c": 1.0}  # none of which has a label but the last
    assert label_by_path([("", "x")])(tree) == {"a": None, "b": optax.MaskedNode(), "c": "x"}


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ([("(", "x")], ValueError),
        (["kernel"], TypeError),
        ([("a", None)], TypeError),
        ([("a", ("x", "y"))], TypeError),
        ([("a", "b", "c")], TypeError),
    ],
)
def test_bad_rules(rules, error):
    with pytest.raises(error, match="rule"):
        label_by_path(rules)


def test_a_norm_or_rule_that_no_leaf_uses_is_warned_of_once():
    mask = {"embed": True, "blocks": False, "head": True}
    optimizer = optax.masked(scion(0.1, NORMS, label_by_path(RULES)), mask)
    with pytest.warns(UserWarning, match="no leaf") as caught:
        state = optimizer.init(PARAMS)
    assert [str(w.message) for w in caught] == [
        "rule ('bias$', 'bias') of label_by_path is the first match of no leaf",
        "rule ('blocks/[01]/', 'hidden') of label_by_path is the first match of no leaf",
    ]
    updates, _ = optimizer.update(PARAMS, state, PARAMS)
    assert updates["blocks"][0]["kernel"] is PARAMS["blocks"][0]["kernel"]
    mask = jax.tree.map(lambda label: label in ("first", "last"), LABELS)
    masked_labels = optax.masked(scion(0.1, NORMS, LABELS), mask)
    with pytest.warns(UserWarning, match=r"norms\['(hidden|bias)'\] is used by no leaf"):
        state = masked_labels.init(PARAMS)
    again, _ = masked_labels.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(again["head"], updates["head"])


@pytest.mark.parametrize(
    ("norms", "labels", "error", "message"),
    [
        (NORMS, None, ValueError, "needs param_labels"),
        (Spectral(), LABELS, ValueError, "a mapping"),
        (Spectral, None, TypeError, r"Spectral\(50.0\)"),
        ({"x": Spectral}, {"x": "x"}, TypeError, r"norms\['x'\]"),
        ("Spectral", None, TypeError, "norms is a Norm"),
    ],
)
def test_norms_and_labels_must_belong_together(norms, labels, error, message):
    for build in (scion, unconstrained_scion):
        with pytest.raises(error, match=message):
            build(0.1, norms, labels)
    with pytest.raises(error, match=message):
        read_leaves(PARAMS, norms, labels)


def test_what_does_not_fit_is_named_at_init():
    wrong = NORMS, {**LABELS, "head": "lsat"}
    with pytest.raises(ValueError, match=r"leaf 'head' has the label 'lsat'.*'hidden'"):
        scion(0.1, *wrong).init(PARAMS)
    with pytest.raises(ValueError, match=r"leaf 'head' has the label 'lsat'"):
        init_params(jax.random.key(0), PARAMS, *wrong)
    with pytest.raises(TypeError, match=r"calling it with the parameters failed \(.*argument"):
        read_leaves(PARAMS, NORMS, lambda: LABELS)
    with pytest.raises(ValueError, match=r"'conv/kernel' of shape \(3, 4, 5\): it could be"):
        scion(0.1).init({"conv": {"kernel": ones(3, 4, 5)}})
    with pytest.raises(ValueError, match=r"2 letters, but leaf 'a/1' of shape \(3,\) has rank 1"):
        scale_by_lmo(Spectral(layout="oi")).init({"a": [ones(2, 2), ones(3)]})
    with pytest.raises(TypeError, match=r"leaf 'steps'.*int32.*optax.masked"):
        scion(0.1).init({"steps": jnp.int32(3)})


def test_paths_of_nnx_leave_out_the_variable():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == ["bias", "kernel"]


def test_labels_in_a_callable_tree_are_a_tree():
    class Net(eqx.Module):
        w: jax.Array
        c: jax.Array

        def __call__(self, x):
            return x.ndim

    params = Net(ones(2, 3), ones(3))
    labels = jax.tree.map(lambda x: f"rank {x.ndim}", params)
    norms = {"rank 2": Sign(), "rank 1": BiasRMS()}
    partial = jax.tree_util.Partial(lambda tree: labels)  # a tree without leaves, to be called
    for form in (labels, partial):
        assert norms_of(params, norms, form) == [norms["rank 2"], norms["rank 1"]]


KERNEL = {"a": {"kernel": ones(2, 3)}}
TOLD = {"a": {"kernel": "x"}}
STATE = nnx.State({"a": {"kernel": nnx.Param(ones(2, 3))}})
UNFIT = [
    (freeze(KERNEL), TOLD, "at the top the labels have a dict, the tree a FrozenDict"),
    (STATE, TOLD, "at the top the labels have a dict, the tree a State"),
    (nnx.State(KERNEL), jax.tree.map(lambda _: "x", STATE),
        "at 'a/kernel' the labels have a Param, the"),
    ([ones(2, 3)], ("x",), "at the top the labels have a tuple, the tree a list"),
    ({"a": [ones(3)]}, {"a": ("x",)}, "at 'a' the labels have a tuple, the tree a list"),
    ({0: ones(3)}, {"0": "x"},
        r"at the top the labels have a dict of \['0'\], the tree a dict of \[0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "labels", "message"), UNFIT)
def test_labels_in_other_containers_are_told_so(tree, labels, message):
    with pytest.raises(ValueError, match=f"does not fit the tree: {message}"):
        read_leaves(tree, {"x": Euclidean()}, labels)


def test_gradients_in_other_containers_are_told_so():
    optimizer, params = scion(0.1), {0: ones(3)}
    message = r"the gradients have a dict of \['0'\], the parameters a dict"
    with pytest.raises(ValueError, match=message):
        optimizer.update({"0": ones(3)}, optimizer.init(params), params)


def test_the_nearest_path_is_near():
    paths = ["up/kernel", "down/kernel", "lm_head/kernel"]
    assert nearest("^lm_haed$", paths) == "lm_head/kernel"
    assert nearest("dwon/kernle", paths) == "down/kernel"
    assert nearest("zzzz", ["up"]) is None
    assert nearest("a", []) is None
