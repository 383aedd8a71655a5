"""Under each of JAX's strict flags everything works as without it."""

import chex
import jax
import jax.numpy as jnp
import pytest

from scion_jax import ExactPolar, NewtonSchulz, frank_wolfe_gap, gauge_bounds, gauges, orthogonalize
from tests.support.norms import arrays_for, every_norm, gaussian, make
from tests.support.optimizers import LABELS, NORMS, build, every_optimizer, gaussian_tree

pytestmark = pytest.mark.unoptimized

FLAGS = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_check_tracer_leaks": True,
    "jax_enable_x64": True,
}
same_types = chex.assert_trees_all_equal_shapes_and_dtypes


@pytest.fixture(params=FLAGS)
def evaluate(request):
    """Calls under a flag: runs, where numbers matter, else traces only."""
    before = getattr(jax.config, request.param)
    jax.config.update(request.param, FLAGS[request.param])
    yield jax.eval_shape if request.param != "jax_debug_nans" else lambda f, *a: jax.jit(f)(*a)
    jax.config.update(request.param, before)


@every_optimizer
def test_optimizers(evaluate, case):
    optimizer, params = build(case), gaussian_tree(0)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return updates, state

    state = optimizer.init(params)
    for gradients in (gaussian_tree(1), jax.tree.map(jnp.zeros_like, params)):
        same_types(evaluate(step, params, state, gradients), (params, state))


@every_norm
def test_norms(evaluate, name, options):
    layout, shape = arrays_for(name)[-2]
    norm = make(name, options, layout, compute_dtype=None)

    def compute(x, key):
        arrays = norm.lmo(x), norm.init(key, x.shape, x.dtype)
        return arrays, (norm.gauge(x), norm.dual_norm(x), gauge_bounds(x, norm))

    x = gaussian(shape, dtype=jnp.float32)
    arrays, sizes = evaluate(compute, x, jax.random.key(0))
    same_types(arrays, (x, x))
    assert {size.dtype for size in jax.tree.leaves(sizes)} == {jnp.dtype("float32")}


METHODS = [
    *(NewtonSchulz(), NewtonSchulz(compute_dtype="float32"), ExactPolar()),
    NewtonSchulz("quintic", compute_dtype="float16"),
]


@pytest.mark.parametrize("method", METHODS)
def test_orthogonalizers(evaluate, method):
    xs = [gaussian(shape, dtype=jnp.float32) for shape in ((3, 4), (4, 3), (2, 4, 4), (2, 3, 12))]
    same_types(evaluate(lambda xs: [orthogonalize(x, method) for x in xs], xs), xs)


def test_diagnostics(evaluate):
    def sizes(x):
        return gauges(x, NORMS, LABELS), frank_wolfe_gap(x, x, NORMS, LABELS)

    found = evaluate(sizes, gaussian_tree(0))
    assert {size.dtype for size in jax.tree.leaves(found)} == {jnp.dtype("float32")}
