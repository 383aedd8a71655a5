"""How leaves are read: what was silently wrong is refused, and right once it is told; parts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scion_jax
from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Euclidean,
    ExactPolar,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
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


@pytest.mark.parametrize(("name", "shape", "layout"), SILENT.values(), ids=SILENT)
def test_what_was_silently_wrong(name, shape, layout):
    tree = {"block": {name: gaussian(shape)}}
    with pytest.raises(ValueError, match="no axis is guessed") as error:
        scion(0.1).init(tree)
    message = str(error.value)
    assert f"'block/{name}' of shape {shape}: it could be " in message
    assert f'("^block/{name}$", "block_{name}")' in message
    assert f'{{"block_{name}": ' in message
    assert "infer_norms(loss_fn, params, *batch)" in message
    vector = "i" not in layout and "s" not in layout
    kind = "BiasRMS" if vector else "Spectral"
    told = Auto(layout=layout, orthogonalizer=ExactPolar())
    optimizer = unconstrained_scion(1.0, told, momentum=1.0)
    (step,) = jax.tree.leaves(jax.jit(lambda d: optimizer.update(d, optimizer.init(d))[0])(tree))
    expected = naive.lmo(kind, tree["block"][name], layout)
    np.testing.assert_allclose(step, -expected, rtol=1e-3, atol=1e-5)


def test_the_common_candidates_are_offered():
    for name, shape, layout in SILENT.values():
        if layout not in ("iooo", "iiooo", "ssob"):
            with pytest.raises(ValueError, match=f"'{layout}'"):
                scion(0.1).init({name: gaussian(shape)})


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
    "name",
    [
        *("bias", "scale", "gain", "gamma", "beta", "q_bias", "bias_hh", "offset"),
        *("b", "b1", "b_1", "bq", "g", "D", "A_log"),
    ],
)
def test_a_vector_of_rank_2_needs_a_layout(name):
    tree = {name: gaussian((3, 8))}
    for norm in (Auto(), Spectral(), BiasRMS()):
        with pytest.raises(ValueError, match=rf"'{name}' of shape \(3, 8\).*'bo'"):
            scion(0.1, norm).init(tree)
    scion(0.1, BiasRMS(layout="bo")).init(tree)
    for tree in ({name: [gaussian((3, 8))]}, [{"x": {name: gaussian((3, 8))}}]):
        with pytest.raises(ValueError, match=rf"{name}.* of shape \(3, 8\)"):
            scion(0.1).init(tree)


@pytest.mark.parametrize(
    "name", ["scaled_dense", "upscale_w", "weight", "lora_b", "B", "d", "w1", "bilinear", "gate"]
)
def test_names_of_matrices(name):
    scion(0.1).init({name: gaussian((3, 8))})
    with pytest.raises(ValueError, match=rf"'{name}' of shape \(3, 8\).*BiasRMS"):
        scion(0.1, BiasRMS()).init({name: gaussian((3, 8))})
    with pytest.raises(ValueError, match=r"shape \(3, 8\) has no default layout.*'oo'.*'bo'"):
        BiasRMS().lmo(gaussian((3, 8)))


@pytest.mark.parametrize(
    ("shape", "could", "layout"),
    [
        ((16, 1, 1), ["ooo"], "ooo"),  # Equinox's Conv2d
        ((16, 1), ["oo"], "oo"),
        ((4, 8), ["oo", "bo"], "…"),  # a LayerNorm over two axes, or a stack
        ((3, 4, 8), ["boo", "bbo", "ooo"], "…"),
        ((3, 8, 1), ["boo", "ooo"], "…"),
        ((1, 1), ["oo", "bo"], "…"),
        ((2, 3, 4, 8), [], "…"),
    ],
)
def test_hints_name_a_layout_only_where_it_is_sure(shape, could, layout):
    with pytest.raises(ValueError, match="no axis is guessed") as error:
        scion(0.1).init({"bias": gaussian(shape)})
    message = str(error.value)
    assert re.findall(r"'([bo]+)' \(", message) == could
    assert f'BiasRMS(layout="{layout}")' in message


def test_stacked_vectors_are_normalized_apart():
    d = gaussian((3, 8)) * jnp.array([[1.0], [1e-3], [1e-3]])
    steps = BiasRMS(layout="bo").lmo(d)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(steps**2, axis=1)), 1, rtol=1e-5)


PARTED = {
    "fused q, k, v": ("io[3]", (8, 12), 1, [4, 4, 4], "io"),
    "grouped queries": ("io[8,4,4]", (6, 16), 1, [8, 4, 4], "io"),
    "fused inputs": ("i[2]o", (8, 6), 0, [4, 4], "io"),
    "stacked": ("bio[5,2]", (3, 4, 7), 2, [5, 2], "bio"),
    "grouped convolution": ("ssio[2]", (3, 3, 4, 6), 3, [3, 3], "ssio"),
    "depthwise": ("ssio[6]", (3, 3, 1, 6), 3, [1] * 6, "ssio"),
    "gates' bias": ("o[4]", (12,), 0, [3] * 4, "o"),
    "PyTorch's": ("o[2,6]i", (8, 5), 0, [2, 6], "oi"),
}
PARTED_NORMS = [
    Spectral(3.0, orthogonalizer=ExactPolar()),
    Sign(2.0),
    ColNorm(2.0, normalized=True),
    BiasRMS(2.0),
]


@pytest.mark.parametrize("norm", PARTED_NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize(("layout", "shape", "axis", "sizes", "alone"), PARTED.values(), ids=PARTED)
def test_each_part_is_a_matrix_of_its_own(norm, layout, shape, axis, sizes, alone):
    whole = dataclasses.replace(norm, layout=layout)
    part = dataclasses.replace(norm, layout=alone)

    def pieces(array):
        return jnp.split(array, np.cumsum(sizes)[:-1], axis)

    @jax.jit
    def measure(d):
        together = whole.lmo(d), whole.gauge(d), whole.dual_norm(d)
        lmos, gauges, dual_norms = zip(
            *[(part.lmo(piece), part.gauge(piece), part.dual_norm(piece)) for piece in pieces(d)],
            strict=True,
        )
        start = whole.init(jax.random.key(0), shape)
        starts = jnp.stack([part.gauge(piece) for piece in pieces(start)])
        one_by_one = jnp.concatenate(lmos, axis), jnp.stack(gauges).max(), sum(dual_norms)
        return together, one_by_one, starts

    (lmo, *sizes_together), (expected, *sizes_alone), starts = measure(gaussian(shape, 1))
    np.testing.assert_allclose(lmo, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sizes_together, sizes_alone, rtol=1e-5)
    if not isinstance(norm, BiasRMS):
        np.testing.assert_allclose(starts, 1, rtol=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize("spec", [(("x", "y"), None), ("y", "x")])
@pytest.mark.parametrize("layout", ["io[3]", "io[8,4,12]", "i[2]o", "bio"])
def test_parts_of_axes_that_devices_hold_in_other_pieces(layout, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    shape = (16, 24) if "b" not in layout else (8, 8, 24)
    spec = PartitionSpec(*spec)
    d = gaussian(shape)
    norm = Spectral(layout=layout)
    split = jax.device_put(d, NamedSharding(mesh, spec))
    measure = jax.jit(lambda d: (norm.lmo(d), norm.gauge(d), norm.dual_norm(d)))
    (v, *sizes), (expected, *sizes_whole) = measure(split), measure(d)
    np.testing.assert_allclose(v, expected, atol=2e-2)
    assert jax.typeof(v) == jax.typeof(split)
    np.testing.assert_allclose(sizes, sizes_whole, rtol=1e-4)


@pytest.mark.fast
def test_axes_without_parts_stay_split_over_devices():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    d = jax.device_put(gaussian((16, 24)), NamedSharding(mesh, PartitionSpec("x", None)))
    for layout in ("io[3]", "io[8,4,12]"):
        for piece in Spectral(layout=layout).read(d.shape).split(d):
            assert jax.typeof(piece).sharding.spec[0] == "x"


@pytest.mark.fast
def test_merged_axes_that_are_split_over_devices():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    d = gaussian((8, 4, 8))
    for layout in ("ioo", "oio", "bio"):
        lmo = jax.jit(Spectral(layout=layout).lmo)
        expected = lmo(d)
        for spec in [("x", None, "y"), (None, "x", "y"), (None, ("x",), None)]:
            split = jax.device_put(d, NamedSharding(mesh, PartitionSpec(*spec)))
            v = lmo(split)
            np.testing.assert_allclose(v, expected, atol=2e-2)
            assert jax.typeof(v) == jax.typeof(split)


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


def test_convolutions_are_read_by_their_rank_and_need_a_window():
    row = describe({"w": gaussian((2, 3, 4, 5))}, SpectralConv()).rows[0]
    assert (row.layout, row.matrices) == ("ssio", "6·4 → 5")
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(2, 3\) has no window axis 's'"):
        describe({"w": gaussian((2, 3))}, SpectralConv())


@pytest.mark.parametrize("kind", [Auto, Sign, ColNorm, RowNorm, BiasRMS, Euclidean])
def test_empty_arrays_can_be_described(kind):
    for shape in [(0, 0), (0, 3), (3, 0), (0,)]:
        norm = kind(layout="io"[-len(shape) :])
        assert describe({"w": gaussian(shape)}, norm).rows[0].shape == shape


def test_shapes_of_gains_are_not_enough():
    shapes = {"norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.float32)}}
    for name in ("bias", "q_bias", "beta", "b", "bq", "offset"):  # Haiku's, too
        shape = {name: jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
        start = init_params(jax.random.key(0), shape)[name]
        assert start.dtype == jnp.bfloat16
        assert not start.any()
    with pytest.raises(ValueError, match=r"how the model starts 'norm/scale': pass its parameters"):
        init_params(jax.random.key(0), shapes)


def test_unconstrained_leaves_are_not_pulled():
    params = {"kernel": gaussian((4, 6)), "scale": jnp.ones(6)}
    gradients = jax.tree.map(lambda x: x[..., ::-1], params)
    norms = {"w": Spectral(), "g": BiasRMS(2.0, constrained=False)}
    labels = {"kernel": "w", "scale": "g"}
    pulled = {"w": Spectral(), "g": BiasRMS(2.0)}
    for build, options in (
        (scion, {}),
        (scion_jax.scion_light, {}),
        (scion_jax.clipped_scion, {"rho": 1e-9}),
        (unconstrained_scion, {"weight_decay": 1.0}),
    ):
        free, tied = (
            build(0.5, n, labels, **options).update(
                gradients, build(0.5, n, labels, **options).init(params), params
            )[0]
            for n in (norms, pulled)
        )
        np.testing.assert_allclose(free["scale"], -1.0, rtol=1e-5)  # γ v
        np.testing.assert_allclose(tied["scale"], -1.5, rtol=1e-5)  # γ (x + v)
        np.testing.assert_array_equal(free["kernel"], tied["kernel"])


def test_describe():
    params = {
        "conv": gaussian((3, 3, 8, 16)),
        "embed": gaussian((100, 16)),
        "head": gaussian((16, 10)),
        "qkv": gaussian((16, 32)),
        "layers": gaussian((5, 16, 64)),
        "one": gaussian((7, 1)),
        "row": gaussian((1, 10)),
        "rows": gaussian((6, 10)),
        "scale": jnp.ones((5, 16)),
        "slope": jnp.float32(0.25),
        "whole": gaussian((6, 10)),
    }
    norms = {
        "conv": SpectralConv(8.0),
        "embed": ColNorm(2.0),
        "head": Sign(160.0),
        "qkv": Spectral(3.0, layout="io[16,8,8]"),
        "layers": Spectral(2.0, layout="bio"),
        "one": ColNorm(5.0),
        "row": RowNorm(2.0),
        "rows": RowNorm(3.0),
        "scale": BiasRMS(layout="bo"),
        "slope": BiasRMS(2.0),
        "whole": Euclidean(4.0),
    }
    labels = {name: name for name in params}
    table = describe(params, norms, labels)
    rows = {row.path: row for row in table.rows}
    assert rows["conv"][1:7] == ((3, 3, 8, 16), "conv", "SpectralConv", "ssio", "9·8 → 16", 8.0)
    assert rows["qkv"].matrices == "16 → 16, 2 × (16 → 8)"
    assert rows["layers"].matrices == "5 × (16 → 64)"
    assert rows["scale"].matrices == "5 × (16)"
    optimizer = unconstrained_scion(1.0, norms, labels)
    steps, _ = optimizer.update(params, optimizer.init(params))
    for name, step in steps.items():  # orthogonalized to within 3 %
        rms = float(jnp.sqrt(jnp.mean(step**2)))
        np.testing.assert_allclose(rows[name].step_rms, rms, rtol=4e-2)
    lines = str(table).splitlines()
    assert len(lines) == 2 + len(params)
    assert lines[0].split("  ")[0] == "path"
    assert all(f"{word}" in lines[0] for word in ("label", "layout", "radius", "d_in → d_out"))
    assert repr(table) == str(table)
    shapes = jax.eval_shape(lambda: params)
    assert describe(shapes, norms, labels) == table
    assert describe({"b": jnp.ones(3)}).rows[0].label is None
    assert all(row.read_at == "" for row in table.rows)
    assert "read at" not in lines[0]
    assert describe({"w": jnp.ones((1, 1))}).rows[0].step_rms == 1


def paths_in(table):
    return [re.split(r"\s{2,}", line)[0] for line in str(table).splitlines()[2:]]


def test_equal_blocks_are_folded():
    def block(width=8):
        return {"w": gaussian((8, width)), "layers": [{"v": gaussian((8, 8))} for _ in range(3)]}

    params = {"blocks": [block() for _ in range(12)], "h_1": gaussian((2, 3)), "z": gaussian((2,))}
    table = describe(params)
    assert paths_in(table) == ["blocks/0…11/layers/0…2/v", "blocks/0…11/w", "h_1", "z"]
    assert len(table.rows) == 12 * 4 + 2
    whole = describe(params, fold=False)
    assert whole.rows == table.rows
    assert paths_in(whole) == [row.path for row in table.rows]
    params["blocks"][4] = block(16)  # unlike the others
    params["blocks"][7]["layers"].pop()  # another set
    assert paths_in(describe(params)) == [
        "blocks/0…6,8…11/layers/0…2/v",
        "blocks/0…3,5…11/w",
        "blocks/4/w",
        "blocks/7/layers/0…1/v",
        "h_1",
        "z",
    ]
    linen = {
        f"Block_{i}": {"Dense_0": gaussian((4, 4)), "Dense_1": gaussian((4, 4))} for i in (0, 2)
    }
    assert paths_in(describe(linen)) == ["Block_0,2/Dense_0…1"]
    assert paths_in(describe({"0": gaussian((4, 4)), "x": {"0": gaussian((4, 4))}})) == ["0", "x/0"]
    assert paths_in(describe({})) == []
