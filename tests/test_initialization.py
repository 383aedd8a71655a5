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
    initialization,
    label_by_path,
    scaled_gelu,
    scaled_relu,
    scaled_relu_squared,
)

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

KEY = jax.random.key(0)
NORMS = {"first": ColNorm(), "hidden": Spectral(50.0), "last": Sign(3000.0), "bias": BiasRMS(2.0)}
LABELS = label_by_path(
    [("bias", "bias"), ("embed", "first"), ("head", "last"), ("hidden", "hidden")]
)


def tree(dtype=jnp.float32):
    return {
        "embed": jnp.ones((10, 8), dtype),
        "hidden": {"kernel": jnp.ones((8, 16), dtype), "bias": jnp.zeros(16, dtype)},
        "head": jnp.ones((16, 10), dtype),
        "none": None,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_leaf_is_on_its_ball(dtype):
    params = init_params(KEY, tree(dtype), NORMS, LABELS)
    assert jax.tree.structure(params) == jax.tree.structure(tree())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    leaves = {"first": "embed", "last": "head"}
    for label, leaf in leaves.items():
        gauge = NORMS[label].gauge(params[leaf])
        np.testing.assert_allclose(gauge, 1, atol=4 * float(jnp.finfo(dtype).eps))
    gauge = NORMS["hidden"].gauge(params["hidden"]["kernel"])
    np.testing.assert_allclose(gauge, 1, atol=4 * float(jnp.finfo(dtype).eps))
    assert not bool(jnp.any(params["hidden"]["bias"]))


def test_keys_decide_and_each_start_is_compiled_once():
    shapes = {f"layer{i}": jax.ShapeDtypeStruct((5, 9), jnp.float32) for i in range(6)}
    before = initialization._compiled_draw._cache_size()
    first, again = (init_params(KEY, shapes, Sign(17.0)) for _ in range(2))
    other = init_params(jax.random.key(1), shapes, Sign(17.0))
    assert initialization._compiled_draw._cache_size() == before + 1
    for index, (path, leaf) in enumerate(first.items()):  # the numbers are the norm's own
        own = Sign(17.0).init(jax.random.fold_in(KEY, index), (5, 9))
        np.testing.assert_array_equal(leaf, own)
        np.testing.assert_array_equal(leaf, again[path])
        assert bool(jnp.any(leaf != other[path]))
        assert index == 0 or bool(jnp.any(leaf != first["layer0"]))


def test_shapes_are_enough():
    shapes = jax.eval_shape(tree)
    params = init_params(KEY, shapes, NORMS, LABELS)
    assert jax.eval_shape(lambda: params) == shapes
    assert jax.eval_shape(lambda key: init_params(key, shapes, NORMS, LABELS), KEY) == shapes


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match=r"'conv' of shape \(3, 4, 5\)"):
        init_params(KEY, {"conv": jnp.zeros((3, 4, 5))})
    leaves = {"conv": jnp.zeros((3, 4, 5)), "a": {"bias": jnp.zeros((2, 3))}}
    for norm, name in ((Auto(), "Spectral"), (ColNorm(), "ColNorm")):
        with pytest.raises(ValueError, match="no axis is guessed") as error:
            init_params(KEY, leaves, norm)
        assert f'norms = {{"conv": {name}(layout="…"), …}}' in str(error.value)
        assert 'norms = {"a_bias": BiasRMS(layout="…"), …}' in str(error.value)
    shapes = {name: jax.ShapeDtypeStruct((4,), jnp.float32) for name in "ac"}
    with pytest.raises(ValueError, match="how the model starts 'a', 'c'"):
        init_params(KEY, shapes | {"d": jnp.zeros((2, 3))})
    with pytest.raises(TypeError, match="leaf 'step'"):
        init_params(KEY, {"step": jnp.int32(0)})


@pytest.mark.parametrize("is_traced", [False, True])
def test_matrices_that_are_given_as_zeros_stay(is_traced):
    params = {"a": jnp.zeros((4, 6)), "c": jnp.ones((4, 6)), "n": jnp.full((4, 6), jnp.nan)}
    draw = lambda params: init_params(KEY, params)  # noqa: E731
    started = (jax.jit(draw) if is_traced else draw)(params)
    assert not started["a"].any()
    np.testing.assert_allclose(Auto().gauge(started["c"]), 1, atol=1e-5)
    np.testing.assert_allclose(Auto().gauge(started["n"]), 1, atol=1e-5)
    assert init_params(KEY, jax.eval_shape(lambda: params))["a"].any()
    started["a"].delete()  # as donating does
    assert params["a"].shape == (4, 6)


def test_radii_that_cannot_be_compared():
    params = {"w": jnp.ones((4, 6))}
    draw = lambda radius: init_params(KEY, params, Sign(radius))["w"]  # noqa: E731
    whole = draw(2.0)
    np.testing.assert_array_equal(draw(jnp.float32(2)), whole)
    np.testing.assert_array_equal(jax.vmap(draw)(jnp.array([2.0, 4.0]))[1], 2 * whole)


# Over devices.


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("count", [1, 8])
def test_sharding_is_kept_and_shapes_may_say_it(count, kind, is_traced):
    mesh, explicit = jax.make_mesh((count,), ("x",), axis_types=(kind,)), kind == AxisType.Explicit
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    expected = init_params(KEY, {"w": jnp.ones((4, 16))}, Spectral())["w"]
    given = {"w": jax.device_put(jnp.ones((4, 16)), split)}

    def start(shapes):
        draw = lambda: init_params(KEY, shapes, Spectral())  # noqa: E731
        return (jax.jit(draw) if is_traced else draw)()["w"]

    def resharded():
        w = jnp.ones((4, 16))
        return {"w": jax.sharding.reshard(w, split) if explicit else w}

    with jax.set_mesh(mesh):
        for shapes in (
            {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)},
            jax.eval_shape(resharded),  # on an abstract mesh, if types tell
        ):
            drawn = start(shapes)
            np.testing.assert_allclose(drawn, expected, atol=1e-6)
            if shapes["w"].sharding is not None and count > 1:
                assert drawn.sharding.spec == shapes["w"].sharding.spec
            if explicit:
                assert jax.typeof(drawn).sharding.spec == PartitionSpec(None, "x")
        if explicit and is_traced:
            traced = jax.jit(lambda p: init_params(KEY, p))(given)
            assert jax.typeof(traced["w"]) == jax.typeof(given["w"])
    if explicit:  # a mesh that is no longer there
        assert init_params(KEY, shapes, Spectral())["w"].shape == (4, 16)
    drawn = init_params(KEY, given | {"c": jnp.ones((3, 2))})
    assert drawn["w"].sharding == split
    assert not drawn["c"].committed
    shapes = {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)}
    assert init_params(KEY, shapes)["w"].sharding == split


def test_shapes_on_a_mesh_of_both_kinds():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
    split = NamedSharding(mesh, PartitionSpec("y", "x"))
    shapes = {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)}
    with jax.set_mesh(mesh):
        drawn = jax.jit(lambda: init_params(KEY, shapes))()
    assert drawn["w"].sharding.spec == split.spec


# Activations.


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
    exact = np.sqrt(2) * jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(scaled_gelu(x, approximate=False), exact)
    np.testing.assert_allclose(scaled_gelu(x), np.sqrt(2) * jax.nn.gelu(x, approximate=True))
    for activation in (scaled_relu, scaled_gelu, scaled_relu_squared):
        with pytest.raises(TypeError, match="x is an array of a floating dtype; got"):
            activation(jnp.arange(3))
