"""What people get wrong, and what they are told: early, in our words, with the leaf's name.

One table: a call, the error, and words of its message. To refuse something more, add a row.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scion_jax
from scion_jax import (
    Auto,
    Euclidean,
    NewtonSchulz,
    Sign,
    Spectral,
    SpectralConv,
    almond,
    average_gradients,
    clip_by_pairing,
    clipped_scion,
    decay_weights,
    describe,
    gauges,
    init_params,
    label_by_path,
    orthogonalize,
    scale_by_lmo,
    scion,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
    with_shardings,
)
from tests.support.norms import NORMS

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

OPTIMIZERS = [
    scion,
    unconstrained_scion,
    scion_light,
    almond,
    lambda rate, *args, **kwargs: clipped_scion(rate, *args, rho=1.0, **kwargs),
    lambda rate, *args, **kwargs: unconstrained_clipped_scion(rate, *args, rho=1.0, **kwargs),
]
PARAMS = {"a": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
ONES = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
NAN, INF = float("nan"), float("inf")


def lmo(norm, shape, dtype="float32"):
    return norm.lmo(jnp.ones(shape, dtype))


def updated(optimizer, gradients, params=PARAMS):
    return optimizer.update(gradients, optimizer.init(params), params)


# Of every optimizer: a call of its builder.
OF_OPTIMIZERS = [
    (lambda make: make("1e-3"), TypeError, "learning_rate must be a number; got '1e-3'"),
    (lambda make: make(None), TypeError, "learning_rate must be a number; got None"),
    (lambda make: make(True), TypeError, "learning_rate must be a number; got True"),
    (lambda make: make(-0.1), ValueError, "learning_rate must be at least 0"),
    (lambda make: make(NAN), ValueError, "learning_rate must be at least 0"),
    (lambda make: make(np.ones(3)), ValueError, r"one number; got an array of shape \(3,\)"),
    (lambda make: make(lambda count: None), TypeError, "learning_rate, a sch.*number; got None"),
    (lambda make: make(lambda count: jnp.ones(16)), ValueError, r"must be one number.*\(16,\)"),
    (lambda make: make(lambda: 0.1), TypeError, "number of updates made; calling <lambda>"),
    (lambda make: make(0.1, momentum="0.9"), TypeError, "must be a number; got '0.9'"),
    (lambda make: make(0.1, momentum=None), TypeError, "must be a number; got None"),
    (lambda make: make(0.1, momentum=jnp.ones(3)), ValueError, r"array of shape \(3,\)"),
    (lambda make: make(0.1, momentum=0.0), ValueError, "above 0 and at most 1"),
    (lambda make: make(0.1, momentum=NAN), ValueError, "above 0 and at most 1"),
    (lambda make: make(0.1, momentum=lambda count: 2.0), ValueError, "above 0 and at most 1"),
    (lambda make: make(0.1, momentum=lambda count: None), TypeError, "a number; got None"),
    (lambda make: make(0.1, momentum=lambda: 0.1), TypeError, "with a count failed"),
    (lambda make: make(0.1, momentum_dtype="bf16"), TypeError, "momentum_dtype"),
    (lambda make: make(0.1, momentum_dtype="int8"), TypeError, "momentum_dtype"),
    (lambda make: make(0.1, shard_over=4), TypeError, "names of mesh axes"),
    (lambda make: make(0.1, shard_over=(3,)), TypeError, "names of mesh axes"),
    (lambda make: make(0.1, shard_over=b"fsdp"), TypeError, "names of mesh axes"),
    (lambda make: make(0.1, shard_over=("fsdp", "fsdp")), ValueError, "twice"),
    (
        lambda make: updated(make(0.1, shard_over="no"), ONES, ONES),
        ValueError,
        "neither an axis of",
    ),
    # Leaves that are no parameters.
    (lambda make: make(0.1).init({"x": 3.0}), TypeError, "'x' .*is 3.0, which is no array"),
    (lambda make: make(0.1).init({"x": jax.nn.relu}), TypeError, "'x' .*no array.*eqx.filter"),
    (lambda make: make(0.1).init({"x": jnp.int32(3)}), TypeError, "leaf 'x'.*int32.*wrt="),
    (lambda make: make(0.1).init({"x": jnp.complex64(1)}), TypeError, "leaf 'x'.*complex64"),
    (lambda make: make(0.1).init({"x": jax.random.key(0)}), TypeError, "leaf 'x'.*key<fry>"),
    (
        lambda make: make(0.1).init({"x": jnp.ones(2, jnp.float8_e4m3fn)}),
        TypeError,
        "leaf 'x'.*float8_e4m3fn",
    ),
    (lambda make: make(0.1).init({"x": jnp.ones((2, 3, 4))}), ValueError, "'x' of shape"),
    # Gradients that do not fit.
    (
        lambda make: updated(make(0.1), {"a": {**PARAMS["a"], "kernel": jnp.ones((6, 4))}}),
        ValueError,
        r"'a/kernel' has shape \(6, 4\) in the gradients and \(4, 6\) in the parameters",
    ),
    (
        lambda make: updated(make(0.1), {"a": {"kernel": jnp.ones((4, 6))}}),
        ValueError,
        "leaf 'a/bias' is in the parameters only",
    ),
    (
        lambda make: updated(make(0.1), {"a": {**PARAMS["a"], "scale": jnp.ones(6)}}),
        ValueError,
        "leaf 'a/scale' is in the gradients only",
    ),
    (
        lambda make: updated(make(0.1), [jnp.ones(3)]),
        ValueError,
        "leaf '0' is in the gradients only; leaf 'a/bias' is in the parameters",
    ),
    (
        lambda make: updated(make(0.1), (jnp.ones(2), jnp.ones(3)), [jnp.ones(2), jnp.ones(3)]),
        ValueError,
        "at the top .* a tuple,",
    ),
    # Norms.
    (lambda make: make(0.1, "Spectral").init(PARAMS), TypeError, "norms"),
    (lambda make: make(0.1, Spectral).init(PARAMS), TypeError, "norms"),
]

# Of every optimizer that looks ahead, and of the stage that does it.
OF_OPTIMISM = [
    ("0.1", TypeError, "optimism must be a number; got '0.1'"),
    (None, TypeError, "optimism must be a number; got None"),
    (True, TypeError, "optimism must be a number; got True"),
    (jnp.ones(3), ValueError, r"optimism must be one number.*\(3,\)"),
    (-0.1, ValueError, "optimism must be at least 0 and at most 1; got -0.1"),
    (1.5, ValueError, "optimism must be at least 0 and at most 1; got 1.5"),
    (NAN, ValueError, "optimism must be at least 0 and at most 1"),
    (lambda count: 2.0, ValueError, "optimism, a schedule, at the first update must be at least 0"),
    (lambda count: None, TypeError, "optimism, a schedule, must be a number; got None"),
    (
        lambda: 0.1,
        TypeError,
        "optimism.* is a number or a schedule",
    ),
]

# Of every function that takes norms and labels: `use(labels)`, with one norm, labelled "x".
LABELS = [
    ({"a": {"kernel": "x"}}, "leaf 'a/bias' has no label"),
    ({"a": {"kernel": "x", "bias": None}}, "leaf 'a/bias' has no label"),
    ({"a": "x", "b": "x"}, "the label at 'b' has no leaf"),
    ({"a": {"kernel": "x", "bias": "y"}}, "leaf 'a/bias' has the label 'y'"),
    (lambda tree: None, "has no label"),
]

REFUSED = [
    # A constrained step goes at most all the way.
    (lambda: scion(2.0), ValueError, "learning_rate must be at least 0 and at most 1"),
    (lambda: scion_light(2.0), ValueError, "learning_rate must be at least 0 and at most 1"),
    (lambda: clipped_scion(2.0, rho=1.0), ValueError, "learning_rate must be .* at most 1"),
    # Hyperparameters.
    (lambda: Sign("50"), TypeError, "Sign: radius must be a number; got '50'"),
    (lambda: Sign(jnp.ones(3)), ValueError, "Sign: radius must be one number"),
    (lambda: Sign(jnp.array(True)), TypeError, "radius must be a number; got an array of dt"),
    (lambda: Auto(vector_radius=0.0), ValueError, "vector_radius must be above 0 and finite"),
    (lambda: Spectral(orthogonalizer="svd"), TypeError, r"NewtonSchulz\(…\) or ExactPolar"),
    (lambda: Spectral(rms=True, max=True), ValueError, "leave out max and normalized"),
    (lambda: SpectralConv(rms=True, normalized=False), ValueError, "SpectralConv: rms=True is"),
    (lambda: Auto(orthogonalizer=None), TypeError, r"NewtonSchulz\(…\) or ExactPolar"),
    *(
        (
            lambda kind=kind, radius=radius: kind(radius),
            ValueError,
            "radius must be above 0 and finite",
        )
        for kind in {getattr(scion_jax, name) for name, _ in NORMS.values()}
        for radius in (0.0, -1.0, NAN, INF, np.float32(-1))
    ),
    (lambda: clipped_scion(0.1, rho="600"), TypeError, "rho must be a number; got '600'"),
    (lambda: clipped_scion(0.1, rho=-1.0), ValueError, "rho must be at least 0"),
    (lambda: clipped_scion(0.1, rho=NAN), ValueError, "rho must be at least 0"),
    (lambda: clipped_scion(0.1, rho=INF), ValueError, "rho must be .*finite"),
    (lambda: unconstrained_clipped_scion(0.1, rho=-1.0), ValueError, "rho must be at least 0"),
    (lambda: clipped_scion(0.1, rho=lambda count: -1.0), ValueError, "rho, a schedule"),
    (lambda: unconstrained_scion(0.1, weight_decay="0.1"), TypeError, "weight_decay must be a num"),
    (lambda: unconstrained_scion(0.1, weight_decay=INF), ValueError, "weight_decay must be at lea"),
    (lambda: scion_light(0.1, every_k="2"), TypeError, "every_k must be a number"),
    (lambda: scion_light(0.1, every_k=1.5), ValueError, "every_k must be a whole number"),
    (lambda: scion_light(0.1, every_k=0), ValueError, "every_k must be .*at least 1"),
    (lambda: scion_light(0.1, every_k=2**31), ValueError, "every_k must be a whole number"),
    (lambda: average_gradients(0.0), ValueError, "1 minus the usual"),
    (lambda: average_gradients(1.5), ValueError, "1 minus the usual"),
    (lambda: average_gradients(0.1, jnp.int8), TypeError, "floating"),
    (lambda: scale_by_lmo(Spectral), TypeError, "norm"),
    (lambda: decay_weights(-0.1, Auto()), ValueError, "at least 0"),
    (lambda: with_shardings(scion(0.1), {"a": "fsdp"}), TypeError, "each leaf is a PartitionSpec"),
    (lambda: decay_weights(lambda count: 0.1, Auto()), TypeError, "weight_decay must be a n"),
    (lambda: label_by_path({"a": "b"}), TypeError, "a list of pairs"),
    (lambda: label_by_path("ab"), TypeError, "a list of pairs"),
    # Orthogonalizers.
    (lambda: NewtonSchulz("quartic"), ValueError, "unknown coefficients 'quartic'"),
    (lambda: NewtonSchulz([]), ValueError, "at least one step"),
    (lambda: NewtonSchulz([(1.0, 2.0)]), TypeError, "one per step"),
    (lambda: NewtonSchulz(3.0), TypeError, "one per step"),
    (lambda: NewtonSchulz(steps=0), ValueError, "at least 1"),
    (lambda: NewtonSchulz(steps=2.5), ValueError, "whole number"),
    (lambda: NewtonSchulz(compute_dtype="int32"), TypeError, "floating dtype"),
    (lambda: NewtonSchulz(schatten=3), ValueError, r"2 \(Frobenius\), 4, or None"),
    (lambda: orthogonalize(jnp.ones(3)), ValueError, "needs matrices"),
    (lambda: orthogonalize(jnp.ones((2, 2), jnp.int32)), TypeError, "floating dtype"),
    # Layouts.
    (lambda: Spectral(layout="ii"), ValueError, "no output axis"),
    (lambda: Spectral(layout="zo"), ValueError, "letter 'z'"),
    (lambda: Spectral(layout="IO"), ValueError, "letter 'I'"),
    (lambda: Spectral(layout=("i", "o")), TypeError, "is a string"),
    (lambda: Spectral(layout="io[0]"), ValueError, "equal parts"),
    (lambda: Spectral(layout="io[]"), ValueError, "equal parts"),
    (lambda: Spectral(layout="io[a]"), ValueError, "equal parts"),
    (lambda: Spectral(layout="s[2]io"), ValueError, "'i' and 'o' may be followed"),
    (lambda: Spectral(layout="i o"), ValueError, "cannot be read from ' o' on"),
    (lambda: Spectral(layout="io[3"), ValueError, "cannot be read from"),
    (lambda: lmo(Spectral(layout="io"), (2, 3, 4)), ValueError, r"2 letters.*rank 3"),
    (lambda: lmo(Spectral(layout="ssio"), (2, 3)), ValueError, r"4 letters.*rank 2"),
    (lambda: lmo(Sign(layout="io[4]"), (2, 6)), ValueError, "axis 1.*6 entries.*4 equal parts"),
    (
        lambda: lmo(Sign(layout="io[3,2]"), (2, 6)),
        ValueError,
        r"\[3, 2\] of axis 1.*up to 5.*has 6",
    ),
    (lambda: lmo(SpectralConv(), (3, 4)), ValueError, "no window axis 's'"),
    *(
        (lambda norm=norm: lmo(norm, (2, 3, 4)), ValueError, "has no default layout")
        for norm in (Auto(), Spectral(), Sign())
    ),
    *(
        (lambda dtype=dtype: lmo(Sign(), (2, 2), dtype), TypeError, dtype)
        for dtype in ("int32", "bool", "complex64")
    ),
    # Stages.
    *(
        (
            lambda stage=stage, leaf=leaf: stage.init({"x": leaf}),
            TypeError,
            f"leaf 'x' of the parameters.* {words}",
        )
        for stage in (average_gradients(0.1), clip_by_pairing(optax.identity(), 1.0))
        for leaf, words in ((3.0, "3.0, which is no array"), (jnp.int32(3), "has dtype int32"))
    ),
    *(
        (
            lambda leaf=leaf: scale_by_lmo(Sign()).update({"x": leaf}, optax.EmptyState()),
            TypeError,
            "leaf 'x'",
        )
        for leaf in (3.0, jax.nn.relu, jnp.int32(3))
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), OF_OPTIMIZERS)
def test_every_optimizer_refuses(call, error, words):
    for make in OPTIMIZERS:
        with pytest.raises(error, match=words):
            call(make)


@pytest.mark.parametrize(("optimism", "error", "words"), OF_OPTIMISM)
def test_no_look_ahead_of_that_kind(optimism, error, words):
    for make in (*OPTIMIZERS, average_gradients):
        if make is not almond:
            with pytest.raises(error, match=words):
                make(0.1, optimism=optimism)


@pytest.mark.parametrize(("labels", "words"), LABELS)
def test_labels_that_do_not_fit(labels, words):
    uses = [
        *(lambda *args, make=make: make(0.1, *args).init(PARAMS) for make in OPTIMIZERS),
        *(lambda *args, use=use: use(PARAMS, *args) for use in (gauges, describe)),
        lambda *args: init_params(jax.random.key(0), PARAMS, *args),
        lambda *args: scale_by_lmo(*args).init(PARAMS),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=words):
            use({"x": Auto()}, labels)


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_what_the_state_tells_without_parameters():
    for make in (unconstrained_scion, almond, OPTIMIZERS[5]):
        with pytest.raises(ValueError, match="'a/bias' is in the average in the state only"):
            make(0.1).update({"a": {"kernel": jnp.ones((4, 6))}}, make(0.1).init(PARAMS))
    light = scion_light(0.1, unconstrained=True)
    with pytest.raises(ValueError, match=r"the gradients .* the sum in the state"):
        light.update({"a": {"kernel": jnp.ones((4, 6))}}, light.init(PARAMS))


def test_leaves_are_checked_before_any_buffer_is_made():
    """A billion entries would not fit: nothing is allocated for a tree that is refused."""
    huge = {"x": jax.ShapeDtypeStruct((2**14, 2**14, 2**10), jnp.float32)}
    for make in OPTIMIZERS:
        with pytest.raises(ValueError, match="'x' of shape"):
            make(0.1).init(huge)


def test_what_a_schedule_raises_comes_through_and_says_whose_it_is():
    def broken(count):
        raise OSError("no table of rates")

    for make in OPTIMIZERS:
        with pytest.raises(OSError, match="no table of rates") as caught:
            make(broken)
        assert caught.value.__notes__ == [
            "This is of learning_rate: the schedule broken was given a count."
        ]


def test_a_schedule_that_leaves_the_segment():
    """No step goes further than all the way."""
    optimizer = scion(optax.linear_schedule(0.5, 3.0, 4), Sign(normalized=False), momentum=1.0)
    x, state = jnp.ones(3), optimizer.init(jnp.ones(3))
    for _ in range(6):
        updates, state = optimizer.update(jnp.array([1.0, -1.0, 0.0]), state, x)
        x = x + updates
        assert float(jnp.abs(x).max()) <= 1


def test_the_usual_momentum_is_warned_of():
    for make in [*OPTIMIZERS, lambda rate, momentum: average_gradients(momentum)]:
        with pytest.warns(UserWarning, match="write 0.05 for what others call 0.95") as caught:
            make(0.1, momentum=0.95)
        assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="write 0.2 for what others call 0.8"):
        scion(0.1, momentum=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scion(0.1, momentum=1.0), scion(0.1, momentum=0.6)


def test_code_without_a_module_is_warned():
    """As loaders of configurations run it."""
    with pytest.warns(UserWarning, match="write 0.05 for what others call 0.95"):
        exec("import scion_jax; scion_jax.scion(0.1, momentum=0.95)", {})


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


def test_what_is_not_refused():
    unconstrained_scion(2.0), scion_light(2.0, unconstrained=True), almond(2.0)
    clipped_scion(0.1, rho=0), unconstrained_clipped_scion(0.1, rho=0.0)
    # Where there is no gradient, `params` may hold anything, as with Optax's own optimizers.
    params = {"w": jnp.ones((2, 3)), "activation": jax.nn.relu}
    arrays = {"w": params["w"], "activation": None}
    for make in OPTIMIZERS:
        optimizer = make(0.1)
        updates, _ = optimizer.update(arrays, optimizer.init(arrays), params)
        expected, _ = optimizer.update(arrays, optimizer.init(arrays), arrays)
        np.testing.assert_array_equal(updates["w"], expected["w"])


def test_labels_by_path():
    rules = [("^embed", "first"), ("", "rest")]
    labels, tree = label_by_path(rules), {"params": {"embed": 0.0, "head": 0.0}}
    assert labels(tree) == {"params": {"embed": "first", "head": "rest"}}  # without the collection
    assert label_by_path([("^params/embed", 1), ("", 2)])(tree)["params"]["embed"] == 1
    assert label_by_path(rules) == label_by_path(rules) != label_by_path(rules[::-1])
    assert hash(label_by_path(rules)) == hash(label_by_path(rules))


def test_two_leaves_of_one_path_are_refused():
    tree = {"a/w": jnp.ones((2, 3)), "a": {"w": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="two leaves have the path 'a/w'"):
        scion_jax.gauge_bounds(tree, Euclidean())
