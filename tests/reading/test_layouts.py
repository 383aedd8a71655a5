"""How leaves are read: what was silently wrong is refused, and right once it is told; parts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scion_jax
from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    ExactPolar,
    NewtonSchulz,
    Sign,
    Spectral,
    describe,
    dual_norm,
    frank_wolfe_gap,
    gauges,
    init_params,
    label_by_path,
    scion,
    unconstrained_scion,
)

pytestmark = pytest.mark.unoptimized

# What a default by rank once read wrongly, and what the leaf is.
SILENT = {
    "scanned q, k, v kernel": ("kernel", (3, 32, 4, 8), "bioo"),
    "scanned attention out": ("kernel", (3, 4, 8, 32), "biio"),
    "Einsum qkv, heads apart": ("w", (3, 4, 32, 8), "boio"),
    "LinearGeneral 1 to 3 axes": ("kernel", (16, 3, 4, 8), "iooo"),
    "LinearGeneral 2 to 3 axes": ("kernel", (4, 8, 2, 3, 5), "iiooo"),
    "scanned experts": ("wi", (3, 8, 16, 32), "bbio"),
    "scanned Conv2d": ("kernel", (3, 3, 3, 8, 8), "bssio"),
    "scanned Conv1d": ("kernel", (3, 3, 32, 32), "bsio"),
    "attention's bias": ("bias", (4, 8), "oo"),
    "scanned bias": ("bias", (3, 32), "bo"),
    "scanned gain": ("scale", (3, 32), "bo"),
    "scanned attention's bias": ("query_bias", (3, 4, 8), "boo"),
    "Gemma's q": ("w", (4, 32, 8), "oio"),
    "depthwise kernel": ("kernel", (3, 3, 1, 64), "ssob"),
}


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def refusal(tree, *norms):
    with pytest.raises(ValueError, match="no axis is guessed") as error:
        scion(0.1, *norms).init(tree)
    return str(error.value)


@pytest.mark.parametrize(("name", "shape", "layout"), SILENT.values(), ids=SILENT)
def test_what_was_silently_wrong(name, shape, layout):
    tree = {"block": {name: gaussian(shape)}}
    message = refusal(tree)
    assert f"'block/{name}' of shape {shape}: it could be " in message
    assert f'("^block/{name}$", "block_{name}")' in message
    assert f'{{"block_{name}": ' in message
    assert "infer_norms(loss_fn, params, *batch)" in message
    assert f"'{layout}'" in message or layout in ("iooo", "iiooo", "ssob")  # common ones
    (row,) = describe(tree, Auto(layout=layout)).rows  # once it is told
    assert (row.layout, row.norm) == (layout, "Spectral" if set("is") & set(layout) else "BiasRMS")


def test_all_unread_leaves_are_named_at_once():
    tree = {"a": gaussian((2, 3, 4)), "ok": gaussian((3, 4)), "bias": gaussian((2, 3))}
    with pytest.raises(ValueError, match=r"'a' of shape \(2, 3, 4\)[^\n]*\n  'bias' of shape"):
        describe(tree)
    for call in (gauges, dual_norm, lambda t: frank_wolfe_gap(t, t)):
        with pytest.raises(ValueError, match="layout"):
            call(tree)
    with pytest.raises(ValueError, match="layout"):
        Auto().init(jax.random.key(0), (2, 3, 4))


@pytest.mark.parametrize(
    "name", "bias scale gain gamma beta q_bias bias_hh offset b b1 b_1 bq g D A_log".split()
)
def test_a_vector_of_rank_2_needs_a_layout(name):
    vector = gaussian((3, 8))
    for norm in (Auto(), Spectral(), BiasRMS()):
        assert re.search(rf"'{name}' of shape \(3, 8\).*'bo'", refusal({name: vector}, norm))
    scion(0.1, BiasRMS(layout="bo")).init({name: vector})
    for tree in ({name: [vector]}, [{"x": {name: vector}}]):
        assert re.search(rf"{name}.* of shape \(3, 8\)", refusal(tree))


@pytest.mark.parametrize(
    "name", "scaled_dense upscale_w weight lora_b B d w1 bilinear gate".split()
)
def test_names_of_matrices(name):
    scion(0.1).init({name: gaussian((3, 8))})
    with pytest.raises(ValueError, match=rf"'{name}' of shape \(3, 8\).*BiasRMS"):
        scion(0.1, BiasRMS()).init({name: gaussian((3, 8))})
    with pytest.raises(ValueError, match=r"shape \(3, 8\) has no default layout.*'oo'.*'bo'"):
        BiasRMS().lmo(gaussian((3, 8)))


def test_hints_for_vectors():
    for shape in ((16, 1), (4, 8), (3, 4, 8), (2, 3, 4, 8)):
        message = refusal({"bias": gaussian(shape)})
        others = "o" * (len(shape) - 1)
        assert re.findall(r"'([bo]+)' \(", message) == ["o" + others, "b" + others]
        assert 'BiasRMS(layout="…")' in message


# Parts.

PARTED = {
    "fused q, k, v": ("io[3]", (8, 12), 1, [4, 4, 4], "io"),
    "grouped queries": ("io[8,4,4]", (6, 16), 1, [8, 4, 4], "io"),
    "fused inputs": ("i[2]o", (8, 6), 0, [4, 4], "io"),
    "stacked": ("bio[5,2]", (3, 4, 7), 2, [5, 2], "bio"),
    "grouped convolution": ("ssio[2]", (3, 3, 4, 6), 3, [3, 3], "ssio"),
    "depthwise": ("ssio[6]", (3, 3, 1, 6), 3, [1] * 6, "ssio"),
    "gates' bias": ("o[4]", (12,), 0, [3] * 4, "o"),
    "PyTorch's": ("o[2,6]i", (8, 5), 0, [2, 6], "oi"),
    "vectors": ("bo", (3, 8), 0, [1] * 3, "bo"),
}
PARTED_NORMS = [
    Spectral(3.0, orthogonalizer=ExactPolar()),
    Sign(2.0),
    ColNorm(2.0, normalized=True),
    BiasRMS(2.0),
]


@pytest.mark.parametrize(("layout", "shape", "axis", "sizes", "alone"), PARTED.values(), ids=PARTED)
def test_each_part_is_a_matrix_of_its_own(layout, shape, axis, sizes, alone):
    d = gaussian(shape, 1)
    pieces = jnp.split(d, np.cumsum(sizes)[:-1], axis)

    def measure(norm):
        whole = dataclasses.replace(norm, layout=layout)
        part = dataclasses.replace(norm, layout=alone)
        together = whole.lmo(d), whole.gauge(d), whole.dual_norm(d)
        lmos, sizes_alone, dual_norms = zip(
            *[(part.lmo(piece), part.gauge(piece), part.dual_norm(piece)) for piece in pieces],
            strict=True,
        )
        start = jnp.split(whole.init(jax.random.key(0), shape), np.cumsum(sizes)[:-1], axis)
        starts = jnp.stack([part.gauge(piece) for piece in start])
        one_by_one = jnp.concatenate(lmos, axis), jnp.stack(sizes_alone).max(), sum(dual_norms)
        return together, one_by_one, starts

    for norm in PARTED_NORMS:
        measured = jax.jit(measure, static_argnums=0)(norm)
        (lmo, *together), (expected, *alone_sizes), starts = measured
        np.testing.assert_allclose(lmo, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together, alone_sizes, rtol=1e-5)
        if not isinstance(norm, BiasRMS):
            np.testing.assert_allclose(starts, 1, rtol=1e-4)


MERGED = [("x", None, "y"), (None, "x", "y"), (None, ("x",), None)]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("layout", "shape", "specs"),
    [
        *((text, (16, 24), [(("x", "y"), None), ("y", "x")]) for text in ("io[3]", "io[8,4,12]")),
        ("i[2]o", (16, 24), [(("x", "y"), None), ("y", "x")]),
        ("bio", (8, 8, 24), [(("x", "y"), None), ("y", "x")]),
        *((text, (8, 4, 8), MERGED) for text in ("ioo", "oio", "bio")),
    ],
)
def test_parts_and_merged_axes_that_devices_hold_in_other_pieces(layout, shape, specs):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    d, norm = gaussian(shape), Spectral(layout=layout, orthogonalizer=NewtonSchulz("quintic", 1))
    measure = jax.jit(lambda d: (norm.lmo(d), norm.gauge(d), norm.dual_norm(d)))
    expected, *whole = measure(d)
    for spec in specs:
        split = jax.device_put(d, NamedSharding(mesh, PartitionSpec(*spec)))
        v, *sizes = measure(split)
        np.testing.assert_allclose(v, expected, atol=2e-2)
        assert jax.typeof(v) == jax.typeof(split)
        np.testing.assert_allclose(sizes, whole, rtol=1e-4)


@pytest.mark.fast
def test_axes_without_parts_stay_split_over_devices():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    d = jax.device_put(gaussian((16, 24)), NamedSharding(mesh, PartitionSpec("x", None)))
    for layout in ("io[3]", "io[8,4,12]"):
        for piece in Spectral(layout=layout).read(d.shape).to_blocks(d):
            assert jax.typeof(piece).sharding.spec[0] == "x"


# Beside the norms.


def test_vectors_keep_what_the_model_gave_them():
    params = {
        "kernel": jnp.ones((4, 6)),
        "scale": jnp.full(6, 1.5),
        "bias": jnp.full((2, 3), 0.25, jnp.bfloat16),
    }
    labels = label_by_path([("bias", "stack"), ("", "rest")])
    norms = {"stack": BiasRMS(layout="bo"), "rest": Auto(3.0)}
    started = init_params(jax.random.key(0), params, norms, labels)
    np.testing.assert_array_equal(started["scale"], params["scale"])
    np.testing.assert_array_equal(started["bias"], params["bias"])
    assert started["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(Spectral(3.0).gauge(started["kernel"]), 1, atol=1e-5)
    jax.tree.map(lambda x: x.delete(), started)  # as donating does
    assert float(params["scale"][0]) == 1.5


def test_shapes_of_gains_are_not_enough():
    for name in ("bias", "q_bias", "beta", "b", "bq", "offset"):  # Haiku's, too
        shape = {name: jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
        start = init_params(jax.random.key(0), shape)[name]
        assert start.dtype == jnp.bfloat16
        assert not start.any()
    shapes = {"norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"how the model starts 'norm/scale': pass its parameters"):
        init_params(jax.random.key(0), shapes)


def test_unconstrained_leaves_are_not_pulled():
    params = {"kernel": gaussian((4, 6)), "scale": jnp.ones(6)}
    gradients = jax.tree.map(lambda x: x[..., ::-1], params)
    labels = {"kernel": "w", "scale": "g"}
    for build, options in (
        (scion, {}),
        (scion_jax.scion_light, {}),
        (scion_jax.clipped_scion, {"rho": 1e-9}),
        (unconstrained_scion, {"weight_decay": 1.0}),
    ):
        steps = []
        for is_pulled in (False, True):
            norms = {"w": Sign(), "g": BiasRMS(2.0, constrained=is_pulled)}
            optimizer = build(0.5, norms, labels, **options)
            steps.append(optimizer.update(gradients, optimizer.init(params), params)[0])
        free, tied = steps
        np.testing.assert_allclose(free["scale"], -1.0, rtol=1e-5)  # γ v
        np.testing.assert_allclose(tied["scale"], -1.5, rtol=1e-5)  # γ (x + v)
        np.testing.assert_array_equal(free["kernel"], tied["kernel"])
