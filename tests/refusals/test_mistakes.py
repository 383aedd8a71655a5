"""What people get wrong, and what they are told: early, in our words, with the leaf's name."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Euclidean,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
    almond,
    average_gradients,
    clipped_scion,
    describe,
    gauges,
    init_params,
    label_by_path,
    scion,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
    vanishing_momentum,
)

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

OPTIMIZERS = [
    scion,
    unconstrained_scion,
    scion_light,
    almond,
    lambda lr, *args, **kwargs: clipped_scion(lr, *args, rho=1.0, **kwargs),
    lambda lr, *args, **kwargs: unconstrained_clipped_scion(lr, *args, rho=1.0, **kwargs),
]
PARAMS = {"a": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("learning_rate", "error", "message"),
    [
        ("1e-3", TypeError, "learning_rate must be a number; got '1e-3'"),
        (None, TypeError, "learning_rate must be a number; got None"),
        (True, TypeError, "learning_rate must be a number; got True"),
        (-0.1, ValueError, "learning_rate must be at least 0"),
        (float("nan"), ValueError, "learning_rate must be at least 0"),
        (np.ones(3), ValueError, r"one number; got an array of shape \(3,\)"),
        (lambda count: None, TypeError, "learning_rate, a schedule, must be a number; got None"),
        (lambda count: jnp.ones(16), ValueError, r"a schedule, must be one number.*\(16,\)"),
        (lambda: 0.1, TypeError, "a function of the number of updates made; calling <lambda>"),
    ],
)
def test_learning_rates(learning_rate, error, message):
    for build in OPTIMIZERS:
        with pytest.raises(error, match=message):
            build(learning_rate)


def test_what_a_schedule_raises_comes_through_and_says_whose_it_is():
    def broken(count):
        raise OSError("no table of rates")

    for build in OPTIMIZERS:
        with pytest.raises(OSError, match="no table of rates") as caught:
            build(broken)
        assert caught.value.__notes__ == [
            "This is of learning_rate: the schedule broken was given a count."
        ]


def test_a_constrained_step_goes_at_most_all_the_way():
    for build in (scion, scion_light, OPTIMIZERS[4]):
        with pytest.raises(ValueError, match="learning_rate must be at least 0 and at most 1"):
            build(2.0)
    unconstrained_scion(2.0), scion_light(2.0, unconstrained=True), almond(2.0)


@pytest.mark.parametrize(
    ("momentum", "error", "message"),
    [
        ("0.9", TypeError, "must be a number; got '0.9'"),
        (None, TypeError, "must be a number; got None"),
        (jnp.ones(3), ValueError, r"one number; got an array of shape \(3,\)"),
        (0.0, ValueError, "above 0 and at most 1"),
        (lambda count: 2.0, ValueError, "at the first update must be above 0 and at most 1; got"),
        (lambda count: 0.0, ValueError, "at the first update must be above 0 and at most 1; got"),
        (lambda count: None, TypeError, "must be a number; got None"),
        (vanishing_momentum, TypeError, "calling vanishing_momentum with a count failed"),
    ],
)
def test_momenta(momentum, error, message):
    for build in OPTIMIZERS:
        with pytest.raises(error, match=message):
            build(0.1, momentum=momentum)
    with pytest.raises(error, match=message):
        average_gradients(momentum)


def test_the_usual_momentum_is_warned_of():
    builds = [*OPTIMIZERS, lambda lr, momentum: average_gradients(momentum)]
    for build in builds:
        with pytest.warns(UserWarning, match="write 0.05 for what others call 0.95") as caught:
            build(0.1, momentum=0.95)
        assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="write 0.2 for what others call 0.8"):
        scion(0.1, momentum=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scion(0.1, momentum=1.0), scion(0.1, momentum=0.6)


@pytest.mark.parametrize("dtype", ["bf16", "int8", 3])
def test_momentum_dtypes(dtype):
    for build in OPTIMIZERS:
        with pytest.raises(TypeError, match=r"momentum_dtype (is a dtype such as|must be a float)"):
            build(0.1, momentum_dtype=dtype)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Sign("50"), TypeError, "Sign: radius must be a number; got '50'"),
        (lambda: Sign(jnp.ones(3)), ValueError, "Sign: radius must be one number"),
        (lambda: Sign(jnp.array(True)), TypeError, "radius must be a number; got an array of dt"),
        (lambda: Sign(jnp.float32(jnp.nan)), ValueError, "Sign: radius must be above 0"),
        (lambda: Auto(vector_radius=0.0), ValueError, "vector_radius must be above 0 and finite"),
        (lambda: Sign(normalized=1), TypeError, "normalized is True or False"),
        (lambda: Sign(constrained="no"), TypeError, "constrained is True or False"),
        (lambda: Spectral(orthogonalizer="svd"), TypeError, r"NewtonSchulz\(…\) or ExactPolar"),
        (lambda: Auto(orthogonalizer=None), TypeError, r"NewtonSchulz\(…\) or ExactPolar"),
        (lambda: clipped_scion(0.1, rho="600"), TypeError, "rho must be a number; got '600'"),
        (lambda: clipped_scion(0.1, rho=lambda c: -1.0), ValueError, "rho, a schedule"),
        (lambda: clipped_scion(0.1, rho=np.inf), ValueError, "rho must be above 0 and finite"),
        (lambda: clipped_scion(0.1, rho=1.0, short_step=1), TypeError, "short_step is True or"),
        (
            lambda: unconstrained_scion(0.1, weight_decay="0.1"),
            TypeError,
            "weight_decay must be a number; got '0.1'",
        ),
        (
            lambda: unconstrained_scion(0.1, weight_decay=np.inf),
            ValueError,
            "weight_decay must be at least 0 and finite",
        ),
        (lambda: scion_light(0.1, every_k="2"), TypeError, "every_k must be a number"),
        (lambda: scion_light(0.1, every_k=1.5), ValueError, "every_k must be a whole number"),
        (lambda: scion(0.1, shard_over=4), TypeError, "shard_over"),
        (lambda: Sign().init(0, (2, 3)), TypeError, "key is one PRNG key, .*; got 0"),
        (lambda: Sign().init(KEY, (2, -1)), TypeError, r"shape is a tuple of .*; got \(2, -1\)"),
        (lambda: Sign().init(KEY, (2, 3), "int8"), TypeError, "dtype must be a floating dtype"),
        (lambda: label_by_path({"a": "b"}), TypeError, "a list of pairs"),
        (lambda: label_by_path("ab"), TypeError, "a list of pairs"),
    ],
)
def test_hyperparameters(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_every_norm_checks_its_radius_and_its_flags():
    flags = {
        Auto: (),
        BiasRMS: (),
        ColNorm: ("normalized",),
        Euclidean: (),
        RowNorm: ("normalized",),
        Sign: ("normalized", "zero_init"),
        Spectral: ("normalized", "max"),
        SpectralConv: ("normalized", "max"),
    }
    for norm, names in flags.items():
        with pytest.raises(ValueError, match=f"{norm.__name__}: radius must be above 0 and finite"):
            norm(0.0)
        for name in (*names, "constrained"):
            with pytest.raises(TypeError, match=f"{norm.__name__}: {name} is True or False; got 0"):
                norm(**{name: 0})


def test_every_optimizer_checks_its_flags():
    flags = {scion: "show_pairing", unconstrained_scion: "show_pairing"}
    for build, name in (flags | {scion_light: "unconstrained"}).items():
        with pytest.raises(TypeError, match=f"{name} is True or False; got 1"):
            build(0.1, **{name: 1})
    with pytest.raises(TypeError, match="fold is True or False; got 1"):
        describe(PARAMS, fold=1)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3.0, r"leaf 'x' is 3.0, which is no array; make it one"),
        (jax.nn.relu, r"leaf 'x' is .*, which is no array.*eqx.filter"),
        (jnp.float32, r"leaf 'x' is .*float32.*, which is no array"),
        (jnp.int32(3), "leaf 'x'.*int32.*wrt="),
        (jnp.ones((2, 2), jnp.float8_e4m3fn), "leaf 'x'.*float8_e4m3fn"),
        (jnp.ones((2, 2), jnp.complex64), "leaf 'x'.*complex64"),
    ],
)
def test_leaves_that_are_no_parameters(leaf, message):
    for build in OPTIMIZERS:
        with pytest.raises(TypeError, match=message):
            build(0.1).init({"x": leaf})
    with pytest.raises(TypeError, match="leaf 'x' of the parameters"):
        average_gradients(0.1).init({"x": leaf})


def test_random_keys_are_no_parameters():
    for build in OPTIMIZERS:
        with pytest.raises(TypeError, match=r"leaf 'x'.*key<fry>"):
            build(0.1).init({"x": jax.random.key(0)})


def test_leaves_are_checked_before_any_buffer_is_made(monkeypatch):
    def no_buffer(*args, **kwargs):
        raise AssertionError("made a buffer")

    monkeypatch.setattr("scion_jax.transforms.zeros_like", no_buffer)
    monkeypatch.setattr("scion_jax.optimizers.light.zeros_like", no_buffer)
    for build in OPTIMIZERS:
        with pytest.raises(ValueError, match="'x' of shape"):
            build(0.1).init({"x": jnp.ones((2, 3, 4))})


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            {"a": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(6)}},
            r"'a/kernel' has shape \(6, 4\) in the gradients and \(4, 6\) in the parameters",
        ),
        ({"a": {"kernel": jnp.ones((4, 6))}}, "leaf 'a/bias' is in the parameters only"),
        (
            {"a": {**PARAMS["a"], "scale": jnp.ones(6)}},
            "leaf 'a/scale' is in the gradients only",
        ),
        ([jnp.ones(3)], "leaf '0' is in the gradients only; leaf 'a/bias' is in the parameters"),
    ],
)
def test_gradients_that_do_not_fit(gradients, message):
    for build in OPTIMIZERS:
        optimizer = build(0.1)
        state = optimizer.init(PARAMS)
        with pytest.raises(ValueError, match=message):
            optimizer.update(gradients, state, PARAMS)
        if build in (unconstrained_scion, almond, OPTIMIZERS[5]):
            in_the_state = message.replace("the parameters", "the average in the state")
            with pytest.raises(ValueError, match=in_the_state):
                optimizer.update(gradients, state)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": {"kernel": "x"}}, "fit the tree: leaf 'a/bias' has no label; give"),
        ({"a": {"kernel": "x", "bias": None}}, "leaf 'a/bias' has no label"),
        ({"a": "x", "b": "x"}, "fit the tree: the label at 'b' has no leaf; give"),
        ({"a": {"kernel": "x", "bias": "y"}}, "leaf 'a/bias' has the label 'y'"),
        (lambda tree: None, "has no label"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    for build in OPTIMIZERS:
        with pytest.raises(ValueError, match=message):
            build(0.1, {"x": Auto()}, labels).init(PARAMS)
    for function in (gauges, describe, lambda *args: init_params(jax.random.key(0), *args)):
        with pytest.raises(ValueError, match=message):
            function(PARAMS, {"x": Auto()}, labels)


def test_an_equinox_model_is_taken_for_its_arrays():
    """Where there is no gradient, `params` may hold anything, as with Optax's own optimizers."""
    params = {"w": jnp.ones((2, 3)), "activation": jax.nn.relu}
    arrays = {"w": params["w"], "activation": None}
    for build in OPTIMIZERS:
        optimizer = build(0.1)
        updates, _ = optimizer.update(arrays, optimizer.init(arrays), params)
        expected, _ = optimizer.update(arrays, optimizer.init(arrays), arrays)
        np.testing.assert_array_equal(updates["w"], expected["w"])


def test_linen_paths_need_no_collection():
    labels = label_by_path([("^embed", "first"), ("", "rest")])
    tree = {"params": {"embed": 0.0, "head": 0.0}}
    assert labels(tree) == {"params": {"embed": "first", "head": "rest"}}
    assert label_by_path([("^params/embed", 1), ("", 2)])(tree)["params"]["embed"] == 1


def test_labels_by_path_are_values():
    rules = [("^embed", "first"), ("", "rest")]
    assert label_by_path(rules) == label_by_path(rules)
    assert hash(label_by_path(rules)) == hash(label_by_path(rules))
    assert label_by_path(rules) != label_by_path(rules[::-1])


@pytest.mark.parametrize(
    "use",
    [
        lambda *args: scion(0.1, *args).init(PARAMS),
        lambda *args: init_params(jax.random.key(0), PARAMS, *args),
    ],
)
def test_unused_rules_and_norms_are_warned_of(use):
    norms = {"last": Sign(), "rest": Auto(), "lsat": Sign()}
    labels = label_by_path([("^a/kernell", "last"), ("", "rest")])
    with pytest.warns(UserWarning, match="no leaf") as caught:
        use(norms, labels)
    expected = [
        "rule ('^a/kernell', 'last') of label_by_path is the first match of no leaf; the nearest "
        "path is 'a/kernel'",
        "norms['lsat'] is used by no leaf",
    ]
    assert [str(warning.message) for warning in caught] == expected
    assert {warning.filename for warning in caught} == {__file__}
    assert list(describe(PARAMS, norms, labels).unused) == expected


def test_pairings_of_several_groups_are_all_found():
    """`optax.tree.get` wants one; under `multi_transform` there is one for each group."""
    labels = {"a": {"kernel": "x", "bias": "y"}}
    clip = {"x": clipped_scion(0.1, rho=1.0), "y": clipped_scion(0.1, BiasRMS(), rho=1.0)}
    state = optax.multi_transform(clip, labels).init(PARAMS)
    assert len(optax.tree.get_all_with_path(state, "pairing")) == 2
