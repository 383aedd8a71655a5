"""The harness that every optimizer passes: what a user of Optax may do with any of them.

The optimizers are rows of `tests.support.optimizers`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scion_jax import (
    Auto,
    BiasRMS,
    Euclidean,
    Sign,
    Spectral,
    almond,
    clipped_scion,
    scion,
    scion_light,
)
from tests.support.optimizers import (
    LABELS,
    NORMS,
    OPTIMIZERS,
    build,
    compiled,
    every_optimizer,
    gaussian_tree,
    run,
)
from tests.support.variants import every_variant, variant

# Some take a part of the tree, and then norms are left over, of which optimizers warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*no leaf:UserWarning")

close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
same_types = chex.assert_trees_all_equal_shapes_and_dtypes
every_name = pytest.mark.parametrize("name", OPTIMIZERS)
# Where types count, or what a wrapper makes of an optimizer beside the optimizer, compiled alike.
alike = pytest.mark.unoptimized


def first_step(optimizer, params, gradients=None):
    return optimizer.update(
        params if gradients is None else gradients, optimizer.init(params), params
    )


@every_name
def test_is_a_transformation_that_takes_extra_arguments(name):
    optimizer = build(OPTIMIZERS[name])
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    params = gaussian_tree(0)
    state = optimizer.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    extra = {"value": jnp.float32(1.0), "loss_fn": None}
    result = jax.eval_shape(lambda *args: optimizer.update(*args, **extra), params, state, params)
    same_types(result, (params, state))
    if OPTIMIZERS[name].needs_params:
        with pytest.raises(ValueError, match=r"You are using a transformation that requires"):
            jax.eval_shape(optimizer.update, params, state)
    else:
        expected, _ = first_step(compiled(name), params)
        close(compiled(name).update(params, state)[0], expected)


@functools.cache
def steps_of(name):
    """As many calls as make a step, as a function and compiled."""
    optimizer = build(OPTIMIZERS[name])

    def steps(params, gradients):
        state, updates = optimizer.init(params), None
        for _ in range(OPTIMIZERS[name].calls_per_step):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    return steps, jax.jit(steps)


@every_variant
@every_name
def test_the_same_however_it_is_called(kind, name):
    """With and without `jit`, of arrays of JAX's and NumPy's, and in `pmap`."""
    (steps, compiled), params, gradients = steps_of(name), gaussian_tree(0), gaussian_tree(1)
    result = variant(kind, compiled if "device" in kind else steps)(params, gradients)
    close(result, compiled(params, gradients))
    same_types(result, params)


@every_optimizer
def test_compiles_once_and_its_state_can_be_donated(case):
    """Also in `apply_if_finite`, which skips a step, as if there had been no bad gradient."""
    plain = build(case, learning_rate=optax.linear_schedule(0.1, 0.0, 5))
    good, ends = [gaussian_tree(k) for k in range(3)], []
    bad = [dict(g, head=jnp.full_like(g["head"], jnp.nan)) for g in good]
    for optimizer, gradients in (
        (plain, good),
        (
            optax.apply_if_finite(plain, 3),
            [g for pair in zip(bad, good, strict=True) for g in pair],
        ),
    ):
        chex.clear_trace_counter()  # which goes by where a function is written

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        @chex.assert_max_traces(n=1)
        def step(params, state, gradients, optimizer=optimizer):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = gaussian_tree(0)
        state = optimizer.init(params)  # not under jit, which would give every field its own buffer
        for given in gradients:
            donated, before = params, jax.tree.map(np.array, params)
            params, state = step(params, state, given)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
            if not np.isfinite(given["head"]).all():
                chex.assert_trees_all_equal(params, before)
        assert step._cache_size() == 1
        chex.assert_tree_all_finite(params)
        ends.append(params)
    close(*ends)


@alike
@every_name
def test_every_number_can_be_injected(name):
    case = OPTIMIZERS[name]
    numbers = {k: v for k, v in case.options.items() if not isinstance(v, bool)}
    injected = optax.inject_hyperparams(case.build, static_args=("param_labels",))(
        0.05, NORMS, LABELS, **case.options
    )
    injected = injected._replace(update=jax.jit(injected.update))
    plain = run(compiled(name), gaussian_tree(0))
    updates, params, state = run(injected, gaussian_tree(0))
    close((updates, params), plain[:2])
    assert {"learning_rate", *numbers} <= set(state.hyperparams)
    # and they act: a new learning rate reaches the next update
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    zeros, _ = injected.update(updates, state, params)
    chex.assert_trees_all_equal(zeros, jax.tree.map(jnp.zeros_like, zeros))
    # and float32 ones leave bfloat16 alone
    injected = optax.inject_hyperparams(
        case.build, static_args=("param_labels",), hyperparam_dtype=jnp.float32
    )(0.05, NORMS, LABELS, **case.options)
    params = gaussian_tree(0, "bfloat16")
    same_types(jax.eval_shape(lambda: first_step(injected, params)[0]), params)


@alike
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@every_optimizer
def test_dtypes_are_stable(x64, case, dtype):
    params = gaussian_tree(0, dtype)
    optimizer = build(case)
    state = optimizer.init(params)

    def skip_or_step(carry, skip):  # neither conditionals nor scans let a dtype change
        params, state = carry

        def step(params, state):
            updates, state = optimizer.update(params, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(skip, lambda p, s: (p, s), step, params, state), None

    def steps(params, state):
        return jax.lax.scan(skip_or_step, (params, state), jnp.array([False, True, False]))[0]

    # Run in the narrowest only: the others compile to the same.
    evaluate = jax.jit(steps) if dtype == "float16" else functools.partial(jax.eval_shape, steps)
    after = evaluate(params, state)
    same_types(after, (params, state))
    if dtype == "float16":
        chex.assert_tree_all_finite(after)


@every_optimizer
def test_mixed_dtypes_and_a_momentum_of_its_own(case):
    params = gaussian_tree(0)
    params["hidden"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["hidden"])
    for momentum_dtype in (None, jnp.float32, jnp.bfloat16):
        optimizer = build(case, momentum_dtype=momentum_dtype)
        state = optimizer.init(params)
        same_types(jax.eval_shape(optimizer.init, params), state)
        result = jax.eval_shape(optimizer.update, params, state, params)
        same_types(result, (params, state))
        if momentum_dtype:
            # Buffers are like a parameter; the pairings of all leaves are not.
            shapes = {p.shape for p in jax.tree.leaves(params)}
            floats = {x.dtype for x in jax.tree.leaves(state) if x.shape in shapes}
            assert floats == {jnp.dtype(momentum_dtype)}


@alike
@jax.numpy_dtype_promotion("standard")  # MultiSteps itself divides by an integer
@every_name
def test_multi_steps_is_the_mean_gradient(name):
    params, first, second = (gaussian_tree(seed) for seed in range(3))
    accumulated = optax.MultiSteps(build(OPTIMIZERS[name]), every_k_schedule=2)
    update = jax.jit(accumulated.update)
    nothing, state = update(first, accumulated.init(params), params)
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))
    updates, _ = update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    close(updates, first_step(compiled(name), params, mean)[0])


@alike
@every_optimizer
def test_masked_and_inside_multi_transform(case):
    """Of the others nothing is seen; whether they are masked or another's."""
    params = gaussian_tree(0)
    mask = jax.tree.map(lambda _: False, params) | {"hidden": [True, False]}
    labels = jax.tree.map(lambda _: "other", params) | {"hidden": ["ours", "other"]}
    masked = optax.masked(build(case), mask)
    several = optax.multi_transform({"ours": build(case), "other": optax.sgd(1.0)}, labels)
    part = {"hidden": [params["hidden"][0]]}
    updates, theirs, alone = jax.jit(
        lambda: (
            first_step(masked, params)[0],
            first_step(several, params)[0],
            first_step(build(case), part)[0],
        )
    )()
    for result, sign in ((updates, 1), (theirs, -1)):
        np.testing.assert_array_equal(result["head"], sign * params["head"])
        np.testing.assert_array_equal(result["hidden"][1], sign * params["hidden"][1])
        close(result["hidden"][0], alone["hidden"][0])


@every_optimizer
def test_map_params(case):
    params = gaussian_tree(0)
    optimizer = build(case)
    mapped = optax.tree.map_params(
        optimizer,
        lambda leaf, name: f"{name}: {leaf.shape}",
        optimizer.init(params),
        jax.tree.map(lambda leaf: "param", params),
        transform_non_params=lambda _: "other",
    )
    found = [leaf for leaf in jax.tree.leaves(mapped) if leaf.startswith("param")]
    expected = [f"param: {leaf.shape}" for leaf in jax.tree.leaves(params)]
    assert found == expected * (len(found) // len(expected)) != []


@alike
@every_name
def test_vmap_over_seeds_and_hyperparameters(name):
    case, trees = OPTIMIZERS[name], [gaussian_tree(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    together = jax.jit(jax.vmap(lambda params: first_step(build(case), params)))(stacked)
    for index, tree in enumerate(trees):
        expected = first_step(compiled(name), tree)
        close(jax.tree.map(lambda leaf, i=index: leaf[i], together), expected)

    params = {"w": gaussian_tree(0)["head"]}

    @jax.jit
    def step(radius, learning_rate):
        optimizer = case.build(learning_rate, Spectral(radius), None, **case.options)
        return first_step(optimizer, params)[0]["w"]

    radii, rates = jnp.array([1.0, 50.0]), jnp.array([0.1, 0.01])
    together = jax.vmap(step)(radii, rates)
    for radius, rate, updates in zip(radii, rates, together, strict=True):
        np.testing.assert_allclose(updates, step(radius, rate), rtol=1e-4)


@every_optimizer
def test_empty_trees_and_scalars(case):
    optimizer = build(case)
    for tree in ({}, {"none": None}, [], (), {"masked": optax.MaskedNode()}):
        assert first_step(optimizer, tree)[0] == tree
    optimizer = build(case, norms=Auto(), labels=None)
    updates, state = None, optimizer.init(jnp.float32(1.0))
    for _ in range(case.calls_per_step):
        updates, state = jax.jit(optimizer.update)(jnp.float32(2.0), state, jnp.ones(()))
    assert updates.shape == ()
    assert float(updates) < 0


def quadratic(params):
    return jnp.sum((params - jnp.array([0.5, -0.3])) ** 2)


def rosenbrock(params):
    x, y = params
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@every_optimizer
def test_converges(case):
    steps = 100_000
    schedule = optax.linear_schedule(0.005, 0.0, steps // case.calls_per_step)

    def minimize(norm, start, curved):
        optimizer = build(case, schedule, norm, None, momentum=0.1)

        def step(_, carry):
            params, state = carry
            gradients = jnp.where(curved, jax.grad(rosenbrock)(params), jax.grad(quadratic)(params))
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]

    starts = jnp.array([[-0.5, 0.8], [-0.5, 0.5]])
    norms = [Euclidean(2.0), BiasRMS(2.0), Sign(2.0, normalized=False)]
    for found in jax.jit(
        lambda: [
            jax.vmap(functools.partial(minimize, norm))(starts, jnp.array([False, True]))
            for norm in norms
        ]
    )():
        np.testing.assert_allclose(found, [[0.5, -0.3], [1.0, 1.0]], atol=2e-2)


@alike
@every_optimizer
def test_explicit_mesh(case):
    """float16, batch axis first, split on the middle axis: a contraction is sharded."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec(None, "x", None))
    optimizer = build(case, norms=Spectral(3.0, layout="bio"), labels=None)
    values = np.random.default_rng(0).standard_normal((2, 8, 4)).astype(np.float16)

    def last_updates(params, transform):
        init, update = transform(optimizer.init), transform(optimizer.update)
        state = init(params)
        types, updates = jax.tree.map(jax.typeof, (params, state)), None
        for _ in range(case.calls_per_step):
            updates, state = update(params, state, params)
            assert jax.tree.map(jax.typeof, (updates, state)) == types
        return np.asarray(updates, np.float32)

    with jax.set_mesh(mesh):
        whole = jax.device_put(values, PartitionSpec())
        expected = last_updates(whole, jax.jit)
        assert np.abs(expected).max() > 0
        eager = (scion, clipped_scion, scion_light, almond)
        eagerly = [lambda function: function] * (case.build in eager)
        for transform in (jax.jit, *eagerly):
            updates = last_updates(jax.device_put(values, split), transform)
            np.testing.assert_allclose(updates, expected, atol=2e-3)
        zero = jax.device_put(np.zeros((2, 8, 4), np.float16), split)
        assert not last_updates(zero, jax.jit).any()
