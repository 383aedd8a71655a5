"""ScionLight: the accumulator that is also the momentum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import Auto, Euclidean, NewtonSchulz, scion, scion_light, unconstrained_scion

pytestmark = pytest.mark.fast


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.standard_normal((4, 6)), dtype),
        "bias": jnp.asarray(rng.standard_normal(6), dtype),
    }


def buffers(state):
    """Counts the arrays of a parameter's shape in a state."""
    return sum(leaf.shape == (4, 6) for leaf in jax.tree.leaves(state))


def run(optimizer, calls, params):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    trajectory = []
    for k in range(calls):
        updates, state = update(tree(10 + k), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


@jax.numpy_dtype_promotion("standard")  # MultiSteps itself divides by an integer
@pytest.mark.parametrize("unconstrained", [False, True])
@pytest.mark.parametrize("every_k", [1, 4])
def test_equals_scion_under_multi_steps_with_one_buffer_less(unconstrained, every_k):
    schedule = optax.linear_schedule(0.3, 0.1, 4)
    # float32, as bfloat16 rounds the two buffers, of different scales, differently.
    norms = Auto(3.0, orthogonalizer=NewtonSchulz(compute_dtype=jnp.float32))
    light = scion_light(schedule, norms, unconstrained=unconstrained, every_k=every_k)
    plain = (unconstrained_scion if unconstrained else scion)(schedule, norms)
    accumulated = optax.MultiSteps(plain, every_k)
    one, light_state = run(light, 4 * every_k + 1, tree(0))
    other, other_state = run(accumulated, 4 * every_k + 1, tree(0))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    assert buffers(light_state) == 1
    assert buffers(other_state) == 2


def test_no_lmo_runs_between_steps():
    """A NaN in the buffer would come out of an LMO at once."""
    optimizer = scion_light(0.1, Auto(), every_k=3)
    params = tree(0)
    state = optimizer.init(params)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), tree(1))
    for _ in range(2):
        updates, state = optimizer.update(bad, state, params)
        assert not any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))
    updates, state = optimizer.update(bad, state, params)
    assert bool(jnp.isnan(updates["bias"]).any())
    assert (int(state.count), int(state.gathered)) == (1, 0)


def test_full_momentum_forgets():
    """The PyTorch reference keeps the buffer at momentum 1; here it is emptied, as the formula."""
    optimizer = scion_light(0.1, Auto(), momentum=1.0)
    params = tree(0)
    _, state = optimizer.update(tree(1), optimizer.init(params), params)
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(state.gradient_sum))


def test_looks_ahead_with_one_buffer():
    """Along k times the last gradient: with equal ones in a step, as under MultiSteps."""
    optimizer = scion_light(0.1, Euclidean(), optimism=0.3, momentum=0.2, every_k=2)
    params, update = tree(0), jax.jit(optimizer.update)
    state, d = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for k in range(3):
        g = tree(10 + k)
        _, state = update(g, state, params)
        updates, state = update(g, state, params)
        d = jax.tree.map(lambda d, g: 0.8 * d + 0.2 * g, d, g)
        for name, x in params.items():
            d_bar = 0.7 * d[name] + 0.3 * g[name]
            expected = -0.1 * (x + d_bar / jnp.linalg.norm(d_bar))
            np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-6)
    assert buffers(state) == 1


@pytest.mark.parametrize("optimism", [0.0, jnp.float32(0.0), lambda count: jnp.float32(0.0)])
def test_without_a_look_ahead_momentum_may_end_at_zero(optimism):
    """Then `αG` is zero, and its direction is that of `G` still."""
    alpha = optax.linear_schedule(0.5, 0.0, 1)
    optimizer = scion_light(0.1, Euclidean(), momentum=alpha, optimism=optimism, unconstrained=True)
    x = jnp.zeros(2)
    _, state = optimizer.update(jnp.array([6.0, 8.0]), optimizer.init(x), x)
    updates, _ = optimizer.update(jnp.zeros(2), state, x)
    np.testing.assert_allclose(updates, [-0.06, -0.08], rtol=1e-5)


def test_momentum_schedule_and_bfloat16_buffer():
    optimizer = scion_light(
        0.1, Euclidean(), momentum=optax.constant_schedule(0.5), momentum_dtype=jnp.bfloat16
    )
    params = tree(0)
    gradients = tree(1, jnp.bfloat16)  # halves of which are bfloat16 too, so nothing is rounded
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert state.gradient_sum["kernel"].dtype == jnp.bfloat16
    assert updates["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(state.gradient_sum["kernel"], gradients["kernel"] / 2)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    same, _ = optimizer.update(wide, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], same["kernel"])


def test_small_gradients_add_up_between_steps():
    """In bfloat16 each is below half of the sum's last place; a thousand of them are not."""
    optimizer = scion_light(0.1, Auto(), momentum_dtype=jnp.bfloat16, every_k=2000)
    large = jnp.linspace(1.0, 1.4, 64)
    _, state = optimizer.update(large, optimizer.init(large), large)

    def call(state, _):
        return optimizer.update(jnp.full(64, 2.0**-11), state, large)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(call, state, length=1000))(state)
    added = state.gradient_sum.astype(jnp.float32) - large
    assert abs(float(added.mean()) - 1000 * 2.0**-11) < 0.05


def test_a_step_at_every_call_takes_no_conditional():
    x = {"bias": tree(0)["bias"]}
    for every_k in (1, 2):
        optimizer = scion_light(0.1, Euclidean(), every_k=every_k)
        text = str(jax.make_jaxpr(optimizer.update)(x, optimizer.init(x), x))
        assert ("cond[" in text) == (every_k > 1)


@pytest.mark.parametrize("every_k", [1, 2, 3])
def test_no_two_calls_in_a_row_round_by_the_same_hash(every_k):
    """Else what one call rounds up the next one does, too: errors of a constant would add up."""
    options = {"momentum": 1e-9, "momentum_dtype": "bfloat16"}
    optimizer = scion_light(0.1, Euclidean(), every_k=every_k, **options)
    ones = jnp.ones(256, jnp.bfloat16)
    gradient = jnp.linspace(0.2, 0.45, 256) * 2.0**-7  # of the last place of what is there
    state = optimizer.init(gradient)._replace(gradient_sum=ones)
    update, ups = jax.jit(optimizer.update), []
    for _ in range(7):
        _, after = update(gradient, state, gradient)
        ups.append(np.asarray(after.gradient_sum != 1))
        state = after._replace(gradient_sum=ones)
    both = [float(np.mean(one & other)) for one, other in itertools.pairwise(ups)]
    assert max(both) < 0.7 * min(np.mean(up) for up in ups)  # not the same entries
