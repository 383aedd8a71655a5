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
    same = {"a": jnp.ones((4, 4)), "c": jnp.ones((4, 4))}
    one = init_params(jax.random.key(0), same)
    assert bool(jnp.any(one["a"] != one["c"]))
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
    params = {"a": jax.device_put(jnp.ones((4, 16)), split), "c": jnp.ones((3, 2))}
    drawn = init_params(jax.random.key(0), params)
    assert drawn["a"].sharding == split
    assert not drawn["c"].committed
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
        assert 'norms = {"a_bias": BiasRMS(layout="…"), …}' in str(error.value)
    shapes = {name: jax.ShapeDtypeStruct((4,), jnp.float32) for name in "ac"}
    with pytest.raises(ValueError, match="how the model starts 'a', 'c'"):
        init_params(jax.random.key(0), shapes | {"d": jnp.zeros((2, 3))})
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


MESHES = [(count, kind) for count in (1, 8) for kind in (AxisType.Auto, AxisType.Explicit)]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("count", "kind"), MESHES)
def test_shapes_say_how_the_result_is_split(count, kind, traced):
    mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))

    def start(shapes):
        draw = lambda: init_params(jax.random.key(0), shapes, Spectral())  # noqa: E731
        return (jax.jit(draw) if traced else draw)()

    expected = init_params(jax.random.key(0), {"w": jnp.ones((4, 16))}, Spectral())["w"]

    def given():
        w = jnp.ones((4, 16))
        return {"w": jax.sharding.reshard(w, split) if kind == AxisType.Explicit else w}

    with jax.set_mesh(mesh):
        for shapes in (
            {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)},
            jax.eval_shape(given),  # on an abstract mesh, if types tell
        ):
            drawn = start(shapes)["w"]
            np.testing.assert_allclose(drawn, expected, atol=1e-6)
            if shapes["w"].sharding is not None and count > 1:
                assert drawn.sharding.spec == shapes["w"].sharding.spec
            if kind == AxisType.Explicit:
                assert jax.typeof(drawn).sharding.spec == PartitionSpec(None, "x")
    if kind == AxisType.Explicit:  # a mesh that is no longer there
        assert init_params(jax.random.key(0), shapes, Spectral())["w"].shape == (4, 16)


def test_shapes_on_a_mesh_of_both_kinds():
    kinds = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    split = NamedSharding(mesh, PartitionSpec("y", "x"))
    shapes = {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)}
    with jax.set_mesh(mesh):
        drawn = jax.jit(lambda: init_params(jax.random.key(0), shapes))()
    assert drawn["w"].sharding.spec == split.spec


@pytest.mark.parametrize("traced", [False, True])
def test_matrices_that_are_given_as_zeros_stay(traced):
    params = {"a": jnp.zeros((4, 6)), "c": jnp.ones((4, 6)), "n": jnp.full((4, 6), jnp.nan)}
    draw = lambda params: init_params(jax.random.key(0), params)  # noqa: E731
    started = (jax.jit(draw) if traced else draw)(params)
    assert not started["a"].any()
    np.testing.assert_allclose(Auto().gauge(started["c"]), 1, atol=1e-5)
    np.testing.assert_allclose(Auto().gauge(started["n"]), 1, atol=1e-5)
    shapes = jax.eval_shape(lambda: params)
    assert init_params(jax.random.key(0), shapes)["a"].any()
    started["a"].delete()  # as donating does
    assert params["a"].shape == (4, 6)


def test_each_start_is_compiled_once():
    shapes = {f"layer{i}": jax.ShapeDtypeStruct((5, 9), jnp.float32) for i in range(6)}
    before = initialization._compiled_draw._cache_size()
    first = init_params(jax.random.key(0), shapes, Sign(17.0))
    init_params(jax.random.key(1), shapes, Sign(17.0))
    assert initialization._compiled_draw._cache_size() == before + 1
    for index, leaf in enumerate(first.values()):  # the numbers are the norm's own
        own = Sign(17.0).init(jax.random.fold_in(jax.random.key(0), index), (5, 9))
        np.testing.assert_array_equal(leaf, own)


def test_radii_that_cannot_be_compared():
    params = {"w": jnp.ones((4, 6))}
    whole = init_params(jax.random.key(0), params, Sign(2.0))["w"]
    draw = lambda radius: init_params(jax.random.key(0), params, Sign(radius))["w"]  # noqa: E731
    np.testing.assert_array_equal(draw(jnp.float32(2)), whole)
    np.testing.assert_array_equal(jax.vmap(draw)(jnp.array([2.0, 4.0]))[1], 2 * whole)
