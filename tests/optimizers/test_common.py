"""The harness that every optimizer passes: what a user of Optax may do with any of them.

To add an optimizer, add a row to `OPTIMIZERS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Euclidean,
    NewtonSchulz,
    Sign,
    Spectral,
    almond,
    clipped_scion,
    label_by_path,
    scion,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, and what sets it apart.

    Attributes:
        build: Called as `build(learning_rate, norms, param_labels, **options)`.
        options: Keyword arguments, every numeric one of which can be injected.
        needs_params: Whether `update` needs the parameters.
        calls_per_step: How many gradients a step takes.
        scale_free: Whether the scale of the gradients makes no difference.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, Any]
    needs_params: bool
    calls_per_step: int = 1
    scale_free: bool = True


OPTIMIZERS = {
    "scion": Case(scion, {"momentum": 0.3}, True),
    "scion showing its pairing": Case(scion, {"momentum": 0.3, "show_pairing": True}, True),
    "unconstrained_scion": Case(unconstrained_scion, {"momentum": 0.3}, False),
    "unconstrained_scion with decay": Case(
        unconstrained_scion, {"momentum": 0.3, "weight_decay": 0.1}, True
    ),
    "clipped_scion": Case(clipped_scion, {"momentum": 0.3, "rho": 3.0}, True, scale_free=False),
    "clipped_scion with short step": Case(
        clipped_scion,
        {"momentum": 0.3, "rho": 3.0, "short_step": True},
        True,
        scale_free=False,
    ),
    "unconstrained_clipped_scion": Case(
        unconstrained_clipped_scion,
        {"momentum": 0.3, "rho": 3.0},
        False,
        scale_free=False,
    ),
    "scion_light": Case(scion_light, {"momentum": 0.3}, True),
    "unconstrained scion_light": Case(scion_light, {"momentum": 0.3, "unconstrained": True}, False),
    "scion_light every 2": Case(
        scion_light, {"momentum": 0.3, "every_k": 2}, True, calls_per_step=2
    ),
    "almond": Case(almond, {"momentum": 0.3}, False),
}

DTYPES = ["float16", "bfloat16", "float32", "float64"]

NORMS = {
    "embedding": ColNorm(),
    "hidden": Spectral(3.0),
    "head": Sign(30.0),
    "bias": BiasRMS(),
}
LABELS = label_by_path([(f"^{label}", label) for label in NORMS])

# Some take a part of the tree, and then norms are left over, of which optimizers warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*no leaf:UserWarning")

every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)


def gaussian_tree(seed, dtype="float32"):
    shapes = {
        "embedding": (6, 4),
        "hidden": [(4, 6), (6, 4)],
        "head": (4, 6),
        "bias": (6,),
        "none": None,
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def build(case, learning_rate=0.05, norms=NORMS, labels=LABELS, **options):
    return case.build(learning_rate, norms, labels, **{**case.options, **options})


def run(optimizer, params, steps=3, jit=True):
    """Makes a few steps on fixed gradients; returns the last updates, parameters and state."""
    update = jax.jit(optimizer.update) if jit else optimizer.update
    dtype = optax.tree.dtype(params, "highest")
    state = optimizer.init(params)
    updates = None
    for k in range(steps):
        gradients = gaussian_tree(100 + k, dtype)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return updates, params, state


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_close(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerance
        )


close = functools.partial(assert_close, rtol=1e-4, atol=1e-4)


@every_optimizer
def test_is_a_transformation_that_takes_extra_arguments(case):
    optimizer = build(case)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    params = gaussian_tree(0)
    state = optimizer.init(params)
    updates, _ = optimizer.update(params, state, params, value=jnp.float32(1.0), loss_fn=None)
    close(updates, optimizer.update(params, state, params)[0])


@every_optimizer
def test_params_are_needed_only_where_they_are_used(case):
    optimizer = build(case)
    params = gaussian_tree(0)
    state = optimizer.init(params)
    if case.needs_params:
        with pytest.raises(ValueError, match=r"You are using a transformation that requires"):
            optimizer.update(params, state)
    else:
        close(optimizer.update(params, state)[0], optimizer.update(params, state, params)[0])


@every_optimizer
def test_state_is_arrays_in_named_tuples(case):
    state = build(case).init(gaussian_tree(0))
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)


@every_optimizer
def test_compiles_once(case):
    traces = []
    optimizer = build(case, learning_rate=optax.linear_schedule(0.1, 0.0, 5))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        traces.append(None)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = gaussian_tree(0)
    state = jax.jit(optimizer.init)(params)
    for k in range(3):
        params, state = step(params, state, gaussian_tree(k))
    assert len(traces) == step._cache_size() == 1


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3)])
@every_optimizer
def test_state_can_be_donated(case, wrap):
    optimizer = wrap(build(case))
    params = gaussian_tree(0)
    state = optimizer.init(params)  # not under jit, which would give every field its own buffer

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for k in range(2):
        donated = params
        params, state = step(params, state, gaussian_tree(k))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))


@every_optimizer
def test_jit_is_eager(case):
    compiled, eager = (
        run(build(case), gaussian_tree(0)),
        run(build(case), gaussian_tree(0), jit=False),
    )
    for one, other in zip(compiled, eager, strict=True):
        close(one, other)


@every_optimizer
def test_every_number_can_be_injected(case):
    numbers = {k: v for k, v in case.options.items() if not isinstance(v, bool)}
    injected = optax.inject_hyperparams(case.build, static_args=("param_labels",))(
        0.05, NORMS, LABELS, **case.options
    )
    plain = run(build(case), gaussian_tree(0))
    updates, params, state = run(injected, gaussian_tree(0))
    close((updates, params), plain[:2])
    assert {"learning_rate", *numbers} <= set(state.hyperparams)
    # and they act: a new learning rate reaches the next update
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    zeros, _ = injected.update(updates, state, params)
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(zeros))


@every_optimizer
def test_injected_float32_leaves_bfloat16_alone(case):
    injected = optax.inject_hyperparams(
        case.build, static_args=("param_labels",), hyperparam_dtype=jnp.float32
    )(0.05, NORMS, LABELS, **case.options)
    updates, _, _ = run(injected, gaussian_tree(0, "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


@every_optimizer
def test_a_constant_schedule_is_a_constant(case):
    constant = optax.constant_schedule
    scheduled = build(
        case,
        learning_rate=constant(0.05),
        momentum=constant(case.options["momentum"]),
    )
    one, other = run(build(case), gaussian_tree(0)), run(scheduled, gaussian_tree(0))
    assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@every_optimizer
def test_dtypes_are_stable(x64, case, dtype):
    params = gaussian_tree(0, dtype)
    optimizer = build(case)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert types(updates) == types(params)
    assert types(after) == types(state)

    def skip_or_step(carry, skip):
        params, state = carry

        def step(params, state):
            updates, state = optimizer.update(params, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(skip, lambda p, s: (p, s), step, params, state), None

    (params_after, state_after), _ = jax.lax.scan(
        skip_or_step, (params, state), jnp.array([False, True, False])
    )
    assert types((params_after, state_after)) == types((params, state))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params_after))


@every_optimizer
def test_mixed_dtypes_and_a_momentum_of_its_own(case):
    params = gaussian_tree(0)
    params["hidden"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["hidden"])
    for momentum_dtype in (None, jnp.float32, jnp.bfloat16):
        optimizer = build(case, momentum_dtype=momentum_dtype)
        state = optimizer.init(params)
        updates, after = jax.eval_shape(optimizer.update, params, state, params)
        assert types(updates) == types(params)
        assert types(after) == types(state)
        if momentum_dtype:
            # Buffers are like a parameter; the pairings of all leaves are not.
            shapes = {p.shape for p in jax.tree.leaves(params) if p.ndim}
            floats = [x.dtype for x in jax.tree.leaves(state) if x.shape in shapes]
            assert set(floats) == {jnp.dtype(momentum_dtype)}


@jax.numpy_dtype_promotion("standard")  # MultiSteps itself divides by an integer
@every_optimizer
def test_multi_steps_is_the_mean_gradient(case):
    params = gaussian_tree(0)
    accumulated = optax.MultiSteps(build(case), every_k_schedule=2)
    state = accumulated.init(params)
    first, second = gaussian_tree(1), gaussian_tree(2)
    nothing, state = accumulated.update(first, state, params)
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(nothing))
    updates, state = accumulated.update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    close(updates, build(case).update(mean, build(case).init(params), params)[0])


@every_optimizer
def test_masked(case):
    params = gaussian_tree(0)
    mask = jax.tree.map(lambda _: False, params) | {"hidden": [True, False]}
    optimizer = optax.masked(build(case), mask)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    part = {"hidden": [params["hidden"][0]]}
    alone, _ = build(case).update(part, build(case).init(part), part)
    np.testing.assert_array_equal(updates["head"], params["head"])
    np.testing.assert_array_equal(updates["hidden"][1], params["hidden"][1])
    close(updates["hidden"][0], alone["hidden"][0])


@every_optimizer
def test_inside_multi_transform(case):
    params = gaussian_tree(0)
    labels = jax.tree.map(lambda _: "other", params) | {"hidden": "ours"}
    optimizer = optax.multi_transform({"ours": build(case), "other": optax.sgd(1.0)}, labels)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    part = {"hidden": params["hidden"]}
    alone, _ = build(case).update(part, build(case).init(part), part)
    close(updates["hidden"], alone["hidden"])
    np.testing.assert_allclose(updates["head"], -params["head"])


@every_optimizer
def test_apply_if_finite(case):
    params = gaussian_tree(0)
    optimizer = optax.apply_if_finite(build(case), max_consecutive_errors=3)
    state = optimizer.init(params)
    bad = gaussian_tree(1)
    bad["head"] = bad["head"].at[0, 0].set(jnp.nan)
    updates, state = optimizer.update(bad, state, params)
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(updates))
    updates, state = optimizer.update(params, state, params)
    close(updates, build(case).update(params, build(case).init(params), params)[0])


@pytest.mark.parametrize("name", [name for name, case in OPTIMIZERS.items() if case.scale_free])
def test_clipping_the_gradient_first_changes_nothing_at_first(name):
    """The LMO does not see the scale; in float32, as bfloat16 rounds each scale differently."""
    case = OPTIMIZERS[name]
    params = gaussian_tree(0)
    hidden = Spectral(3.0, orthogonalizer=NewtonSchulz(compute_dtype=jnp.float32))
    alone = build(case, norms={**NORMS, "hidden": hidden})
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), alone)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    expected, _ = alone.update(params, alone.init(params), params)
    close(updates, expected)


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


@every_optimizer
def test_eval_shape(case):
    params = gaussian_tree(0)
    optimizer = build(case)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = jax.eval_shape(optimizer.init, shapes)
    assert types(state) == types(optimizer.init(params))
    updates, after = jax.eval_shape(optimizer.update, shapes, state, shapes)
    assert types(updates) == types(params)
    assert types(after) == types(state)


@every_optimizer
def test_vmap_over_seeds(case):
    optimizer = build(case)
    trees = [gaussian_tree(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def step(params):
        return optimizer.update(params, optimizer.init(params), params)

    together = jax.vmap(step)(stacked)
    for index, tree in enumerate(trees):
        close(jax.tree.map(lambda leaf, i=index: leaf[i], together), step(tree))


@every_optimizer
def test_vmap_over_hyperparameters(case):
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)}

    def step(radius, learning_rate):
        optimizer = case.build(learning_rate, Spectral(radius), None, **case.options)
        return optimizer.update(params, optimizer.init(params), params)[0]

    radii, rates = jnp.array([1.0, 50.0]), jnp.array([0.1, 0.01])
    together = jax.vmap(step)(radii, rates)["w"]
    for radius, rate, updates in zip(radii, rates, together, strict=True):
        np.testing.assert_allclose(updates, step(float(radius), float(rate))["w"], rtol=1e-4)


@pytest.mark.parametrize("tree", [{}, {"none": None}, [], (), {"masked": optax.MaskedNode()}])
@every_optimizer
def test_empty_trees(case, tree):
    optimizer = build(case)
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    assert updates == tree


@every_optimizer
def test_scalar_parameters(case):
    optimizer = build(case, norms=Auto(), labels=None)
    updates, state = None, optimizer.init(jnp.float32(1.0))
    for _ in range(case.calls_per_step):
        updates, state = optimizer.update(jnp.float32(2.0), state, jnp.ones(()))
    assert updates.shape == ()
    assert float(updates) < 0


def quadratic(params):
    return jnp.sum((params - jnp.array([0.5, -0.3])) ** 2)


def rosenbrock(params):
    x, y = params
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@pytest.mark.parametrize("norm", [Euclidean(2.0), BiasRMS(2.0), Sign(2.0, normalized=False)])
@pytest.mark.parametrize(
    ("objective", "solution", "start"),
    [(quadratic, [0.5, -0.3], [-0.5, 0.8]), (rosenbrock, [1.0, 1.0], [-0.5, 0.5])],
)
@every_optimizer
def test_converges(case, objective, solution, start, norm):
    steps = 100_000
    schedule = optax.linear_schedule(0.005, 0.0, steps // case.calls_per_step)
    optimizer = build(case, schedule, norm, None, momentum=0.1)

    @jax.jit
    def minimize(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]

    np.testing.assert_allclose(minimize(jnp.array(start)), solution, atol=2e-2)


@every_optimizer
def test_explicit_mesh(case):
    """float16, batch axis first, split on the middle axis: a contraction is sharded."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec(None, "x", None))
    norm = Spectral(3.0, layout="bio")
    optimizer = build(case, norms=norm, labels=None)
    values = np.random.default_rng(0).standard_normal((2, 8, 4)).astype(np.float16)

    def type_of(tree):
        return jax.tree.map(jax.typeof, tree)

    def last_updates(params, transform):
        init, update = transform(optimizer.init), transform(optimizer.update)
        state = init(params)
        first, updates = type_of(state), None
        for _ in range(case.calls_per_step):
            updates, state = update(params, state, params)
            assert type_of(updates) == type_of(params)
            assert type_of(state) == first
        return np.asarray(updates, np.float32)

    with jax.set_mesh(mesh):
        zero = np.zeros((2, 8, 4), np.float16)
        assert not last_updates(jax.device_put(zero, split), jax.jit).any()
        expected = last_updates(jax.device_put(values, PartitionSpec()), jax.jit)
        assert np.abs(expected).max() > 0
        for transform in (lambda function: function, jax.jit):
            updates = last_updates(jax.device_put(values, split), transform)
            np.testing.assert_allclose(updates, expected, atol=2e-3)
