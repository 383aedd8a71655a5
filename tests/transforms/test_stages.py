"""The stages: averages, LMOs and decay, each on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import Auto, ColNorm, Sign, Spectral, average_gradients, scale_by_lmo
from scion_jax.transforms import decay_weights

pytestmark = pytest.mark.fast


def run(transformation, gradients, params=None):
    state = transformation.init(gradients[0])
    outputs = []
    for g in gradients:
        updates, state = transformation.update(g, state, params)
        outputs.append(updates)
    return outputs, state


def test_average_is_the_exponential_one():
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.standard_normal(5), jnp.float32) for _ in range(6)]
    outputs, state = run(average_gradients(0.3), gradients)
    d = np.zeros(5)
    for g, output in zip(gradients, outputs, strict=True):
        d = 0.7 * d + 0.3 * np.asarray(g, np.float64)
        np.testing.assert_allclose(output, d, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.average, outputs[-1])
    assert state.count == 6


def test_momentum_schedule_starts_at_zero():
    gradients = [jnp.ones(1)] * 4
    seen = []

    def schedule(count):
        seen.append(count)
        return 1 / jnp.sqrt(count.astype(jnp.float32) + 1)

    average = average_gradients(schedule)
    seen.clear()  # it was asked once, for its shape and range
    outputs, _ = run(average, gradients)
    assert [int(count) for count in seen] == [0, 1, 2, 3]
    np.testing.assert_allclose(outputs, 1, rtol=1e-6)  # the first step forgets d_0 = 0


@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_average_dtypes(grad_dtype, dtype):
    (output,), state = run(average_gradients(0.1, dtype), [jnp.ones(3, grad_dtype)])
    assert state.average.dtype == (dtype or grad_dtype)
    assert output.dtype == jnp.float32  # what is stored may vanish in float16, the step must not


def test_average_is_taken_in_float32():
    """A bfloat16 buffer rounds once per step; the sum itself does not lose small gradients."""
    average = average_gradients(0.5, jnp.bfloat16)
    state = average.init(jnp.zeros(1))._replace(average=jnp.ones(1, jnp.bfloat16))
    output, _ = average.update(jnp.full(1, 2.0**-12), state)
    assert float(output[0]) == 0.5 + 2.0**-13


def test_full_momentum_remembers_nothing_not_even_a_nan():
    for momentum in (1.0, jnp.float32(1.0), lambda count: 1.0):
        (_, output), _ = run(average_gradients(momentum), [jnp.full(2, jnp.nan), jnp.ones(2)])
        np.testing.assert_array_equal(output, 1.0)


@pytest.mark.parametrize("momentum", [0, 0.0, -0.1, 1.5, float("nan")])
def test_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match="1 minus the usual"):
        average_gradients(momentum)


def test_momentum_dtype_is_checked():
    with pytest.raises(TypeError, match="floating"):
        average_gradients(0.1, jnp.int8)


def test_lmo_of_every_leaf():
    norm = ColNorm(2.0)
    tree = {"a": jnp.ones((3, 4)), "c": [jnp.eye(2), None]}
    (output,), state = run(scale_by_lmo(norm), [tree])
    assert state == optax.EmptyState()
    for got, d in zip(jax.tree.leaves(output), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(got, norm.lmo(d))


def test_lmo_has_the_params_dtype():
    lmo = scale_by_lmo(Sign())
    d = jnp.ones((2, 2), jnp.float32)
    assert lmo.update(d, lmo.init(d))[0].dtype == jnp.float32
    assert lmo.update(d, lmo.init(d), d.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("gradient", [3.0, jax.nn.relu, jnp.int32(3)])
def test_gradients_are_checked_without_parameters_too(gradient):
    lmo = scale_by_lmo(Sign())
    with pytest.raises(TypeError, match="leaf 'x' of the gradients"):
        lmo.update({"x": gradient}, lmo.init({"x": jnp.ones([])}))


def test_gradients_in_other_containers_are_refused():
    lmo = scale_by_lmo(Sign())
    params = [jnp.ones(2), jnp.ones(3)]
    with pytest.raises(
        ValueError, match=r"same leaves in other containers: at the top .* a tuple,"
    ):
        lmo.update(tuple(params), lmo.init(params), params)


def test_lmo_needs_a_norm():
    with pytest.raises(TypeError, match="needs a Norm"):
        scale_by_lmo(Spectral)


def test_decay():
    updates, params = jnp.ones(2, jnp.bfloat16), jnp.full(2, 4.0, jnp.bfloat16)
    for mu in (0.5, jnp.float32(0.5), np.float64(0.5)):
        decay = decay_weights(mu, Auto(), None)
        output, _ = decay.update(updates, decay.init(params), params)
        assert output.dtype == jnp.bfloat16
        np.testing.assert_array_equal(output, jnp.full(2, 3.0, jnp.bfloat16))
        with pytest.raises(ValueError, match="params"):
            decay.update(updates, decay.init(params), None)
    with pytest.raises(ValueError, match="at least 0"):
        decay_weights(-0.1, Auto(), None)
    with pytest.raises(TypeError, match="inject_hyperparams"):
        decay_weights(lambda count: 0.1, Auto(), None)
    none = decay_weights(0.0, Auto(), None)
    assert none.update(updates, none.init(params), None)[0] is updates
