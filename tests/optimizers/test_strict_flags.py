"""Under each of JAX's strict flags everything works as without it."""

import chex
import jax
import jax.numpy as jnp
import pytest

import scion_jax
from scion_jax import ExactPolar, NewtonSchulz, gauge_bounds, orthogonalize
from tests.support.norms import arrays_for, every_norm, gaussian, make
from tests.support.optimizers import build, every_optimizer, gaussian_tree

pytestmark = pytest.mark.unoptimized

FLAGS = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_check_tracer_leaks": True,
    "jax_enable_x64": True,
}


@pytest.fixture(params=FLAGS)
def evaluate(request):
    """Calls under a flag: runs, where numbers matter, else traces only."""
    before = getattr(jax.config, request.param)
    jax.config.update(request.param, FLAGS[request.param])
    yield jax.eval_shape if request.param != "jax_debug_nans" else lambda f, *a: jax.jit(f)(*a)
    jax.config.update(request.param, before)


@every_optimizer
def test_optimizers(evaluate, case):
    optimizer = build(case)

    def steps(params, gradients):
        state = first = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, params)
        return first, state, updates

    for seed in (1, None):
        params = gaussian_tree(0)
        gradients = jax.tree.map(jnp.zeros_like, params) if seed is None else gaussian_tree(seed)
        first, state, updates = evaluate(steps, params, gradients)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, state), (params, first))


@every_norm
def test_norms(evaluate, name, options):
    for layout, shape in arrays_for(name, {"some": True}):
        norm = make(name, options, layout, compute_dtype=None)

        def compute(x, key, norm=norm):
            v, start = norm.lmo(x), norm.init(key, x.shape, x.dtype)
            return v, start, (norm.gauge(x), norm.dual_norm(x), gauge_bounds(x, norm))

        x = gaussian(shape, dtype=jnp.float32)
        *arrays, sizes = evaluate(compute, x, jax.random.key(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(arrays, [x, x])
        assert {size.dtype for size in jax.tree.leaves(sizes)} == {jnp.dtype("float32")}


METHODS = [
    *(NewtonSchulz(), NewtonSchulz(compute_dtype="float32"), NewtonSchulz(compute_dtype="float16")),
    *(NewtonSchulz("quintic"), NewtonSchulz("polar_express"), ExactPolar()),
]


@pytest.mark.parametrize("method", METHODS)
def test_orthogonalizers(evaluate, method):
    for shape in ((3, 4), (4, 3), (2, 4, 4), (2, 3, 12)):
        x = gaussian(shape, dtype=jnp.float32)
        result = evaluate(lambda x: orthogonalize(x, method), x)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, x)


def test_diagnostics(evaluate):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    sizes = evaluate(
        lambda x: (
            scion_jax.gauges(x, scion_jax.Auto()),
            scion_jax.frank_wolfe_gap(x, x, scion_jax.Auto()),
        ),
        params,
    )
    assert {size.dtype for size in jax.tree.leaves(sizes)} == {jnp.dtype("float32")}
