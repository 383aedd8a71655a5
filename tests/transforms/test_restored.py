"""A state that comes back in another dtype than the optimizer was built for."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from scion_jax import Euclidean, average_gradients, scion, scion_light

pytestmark = pytest.mark.fast

BUILDS = {
    "average_gradients": lambda dtype: average_gradients(0.25, dtype),
    "scion": lambda dtype: scion(0.1, Euclidean(), momentum=0.25, momentum_dtype=dtype),
    "scion_light": lambda dtype: scion_light(0.1, Euclidean(), momentum=0.25, momentum_dtype=dtype),
}
PARAMS = {"w": jnp.arange(1.0, 7.0).reshape(2, 3)}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def restored(build, stored, wanted):
    """An update of the optimizer for one dtype with the state of the one for another."""
    old, new = build(stored), build(wanted)
    _, state = old.update(PARAMS, old.init(PARAMS), PARAMS)
    return new, state


def dtypes(state):
    return {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (2, 3)}


@pytest.mark.parametrize("transform", [lambda update: update, jax.jit])
@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", None)]
)
@every_build
def test_nothing_is_lost_in_a_wider_buffer(build, stored, wanted, transform):
    optimizer, state = restored(build, stored, wanted)
    updates, after = transform(optimizer.update)(PARAMS, state, PARAMS)
    assert dtypes(after) == {jnp.dtype("float32")}
    same, _ = restored(build, wanted, wanted)
    cast = optax.tree.map_params(optimizer, lambda leaf: leaf.astype("float32"), state)
    expected = transform(same.update)(PARAMS, cast, PARAMS)
    chex.assert_trees_all_close((updates, after), expected)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
@every_build
def test_what_a_buffer_would_lose_is_refused(build, stored, wanted):
    optimizer, state = restored(build, stored, wanted)
    with pytest.raises(TypeError, match=rf"holds {stored} for .* built for {wanted},"):
        optimizer.update(PARAMS, state, PARAMS)
