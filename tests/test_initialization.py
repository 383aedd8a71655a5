"""Boundary initialization of whole trees, and the activations that go with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Sign,
    Spectral,
    init_params,
    label_by_path,
    scaled_gelu,
    scaled_relu,
    scaled_relu_squared,
)

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

NORMS = {"first": ColNorm(), "hidden": Spectral(50.0), "last": Sign(3000.0), "bias": BiasRMS(2.0)}
LABELS = label_by_path(
    [("bias", "bias"), ("embed", "first"), ("head", "last"), ("hidden", "hidden")]
)


def tree(dtype=jnp.float32):
    return {
        "embed": jnp.zeros((10, 8), dtype),
        "hidden": {"kernel": jnp.zeros((8, 16), dtype), "bias": jnp.zeros(16, dtype)},
        "head": jnp.zeros((16, 10), dtype),
        "none": None,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_leaf_is_on_its_ball(dtype):
    params = init_params(jax.random.key(0), tree(dtype), NORMS, LABELS)
    assert jax.tree.structure(params) == jax.tree.structure(tree())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for norm, leaf in (
        (NORMS["first"], params["embed"]),
        (NORMS["hidden"], params["hidden"]["kernel"]),
        (NORMS["last"], params["head"]),
    ):
        np.testing.assert_allclose(norm.gauge(leaf), 1, atol=tolerance)
    assert not bool(jnp.any(params["hidden"]["bias"]))


def test_leaves_of_one_shape_differ_and_keys_decide():
    same = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
    one = init_params(jax.random.key(0), same)
    assert bool(jnp.any(one["a"] != one["b"]))
    np.testing.assert_array_equal(one["a"], init_params(jax.random.key(0), same)["a"])
    assert bool(jnp.any(one["a"] != init_params(jax.random.key(1), same)["a"]))


def test_shapes_are_enough():
    shapes = jax.eval_shape(tree)
    params = init_params(jax.random.key(0), shapes, NORMS, LABELS)
    assert jax.eval_shape(lambda: params) == shapes
    abstract = jax.eval_shape(
        lambda key: init_params(key, shapes, NORMS, LABELS), jax.random.key(0)
    )
    assert abstract == shapes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_is_kept(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    params = {"a": jax.device_put(jnp.zeros((4, 16)), split), "b": jnp.zeros((3, 2))}
    drawn = init_params(jax.random.key(0), params)
    assert drawn["a"].sharding == split
    assert not drawn["b"].committed
    np.testing.assert_allclose(Auto().gauge(drawn["a"]), 1, atol=1e-5)
    shapes = {"a": jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)}
    assert init_params(jax.random.key(0), shapes)["a"].sharding == split
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            traced = jax.jit(lambda p: init_params(jax.random.key(0), p))({"a": params["a"]})
        assert jax.typeof(traced["a"]) == jax.typeof(params["a"])


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match=r"'conv' of shape \(3, 4, 5\)"):
        init_params(jax.random.key(0), {"conv": jnp.zeros((3, 4, 5))})
    leaves = {"conv": jnp.zeros((3, 4, 5)), "a": {"bias": jnp.zeros((2, 3))}}
    for norm, name in ((Auto(), "Spectral"), (ColNorm(), "ColNorm")):
        with pytest.raises(ValueError, match="no axis is guessed") as error:
            init_params(jax.random.key(0), leaves, norm)
        assert f'norms = {{"conv": {name}(layout="…"), …}}' in str(error.value)
        assert 'norms = {"a_bias": BiasRMS(layout="bo"), …}' in str(error.value)
    shapes = {name: jax.ShapeDtypeStruct((4,), jnp.float32) for name in "ac"}
    with pytest.raises(ValueError, match="how the model starts 'a', 'c'"):
        init_params(jax.random.key(0), shapes | {"b": jnp.zeros((2, 3))})
    with pytest.raises(TypeError, match="leaf 'step'"):
        init_params(jax.random.key(0), {"step": jnp.int32(0)})


# E[(√2 relu(x))²] = 1, and E[(√2 gelu(x))²] = 2 E[(x Φ(x))²] by quadrature, for Gaussian x.
@pytest.mark.parametrize(("activation", "moment"), [(scaled_relu, 1.0), (scaled_gelu, 0.8504)])
def test_second_moments_of_scaled_activations(activation, moment):
    x = jnp.linspace(-9, 9, 20_001)
    density = jnp.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    mean = jnp.sum(activation(x) ** 2 * density) * (x[1] - x[0])
    assert float(mean) == pytest.approx(moment, abs=1e-3)
    assert activation(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_activation_values():
    x = jnp.array([-2.0, 0.5, 2.0])
    np.testing.assert_allclose(scaled_relu(x), np.sqrt(2) * np.maximum(x, 0), rtol=1e-6)
    np.testing.assert_allclose(scaled_relu_squared(x), [0, 0.5, 8.0], rtol=1e-6)
    np.testing.assert_allclose(
        scaled_gelu(x, approximate=False), np.sqrt(2) * jax.nn.gelu(x, approximate=False)
    )
    np.testing.assert_allclose(scaled_gelu(x), np.sqrt(2) * jax.nn.gelu(x, approximate=True))
    for activation in (scaled_relu, scaled_gelu, scaled_relu_squared):
        with pytest.raises(TypeError, match="x is an array of a floating dtype; got"):
            activation(jnp.arange(3))
