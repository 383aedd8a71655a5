"""Many devices: the same results as on one, with the least communication."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import scion_jax
from scion_jax import NewtonSchulz, Spectral, label_by_path, orthogonalize
from tests.support.meshes import collectives, compiled, in_loops, lmos_of, make

EXACT = NewtonSchulz(compute_dtype=jnp.float32)  # comparisons are close; bfloat16 is tested below
NORMS = {
    "spectral": Spectral(3.0, orthogonalizer=EXACT),
    "stacked": Spectral(2.0, layout="bio", orthogonalizer=EXACT),
    "convolution": scion_jax.SpectralConv(2.0, layout="ssio", orthogonalizer=EXACT),
    "sign": scion_jax.Sign(4.0),
    "column": scion_jax.ColNorm(),
    "row": scion_jax.RowNorm(),
    "bias": scion_jax.BiasRMS(),
    "euclidean": scion_jax.Euclidean(),
}
SHAPES = {
    "spectral0": (8, 16),
    "spectral1": (16, 8),
    "spectral2": (8, 16),
    "spectral3": (8, 8),  # a stack of one
    "stacked0": (16, 8, 8),
    "stacked1": (8, 8, 16),
    "convolution": (1, 2, 8, 8),
    "sign": (8, 8),
    "column": (8, 24),
    "row": (16, 8),
    "bias": (16,),
    "euclidean": (8, 8),
}
LABELS = label_by_path([(f"^{name}", name) for name in NORMS])
OPTIMIZERS = {
    "scion": scion_jax.scion,
    "unconstrained_scion": scion_jax.unconstrained_scion,
    "clipped_scion": lambda *a, **k: scion_jax.clipped_scion(*a, rho=30.0, **k),
    "short_step": lambda *a, **k: scion_jax.clipped_scion(*a, rho=3.0, short_step=True, **k),
    "unconstrained_clipped_scion": lambda *a, **k: scion_jax.unconstrained_clipped_scion(
        *a, rho=100.0, **k
    ),
    "scion_light": scion_jax.scion_light,
    "almond": scion_jax.almond,
}


def tree():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
    return params, jax.tree.map(lambda x: jnp.sin(3 * x), params)


def spec(shape, mesh):
    """Splits the last axes that divide, over the first axes of the mesh."""
    parts: list[str | None] = [None] * len(shape)
    names = [name for name in ("fsdp", "tensor") if name in mesh.axis_names]
    for name, axis in zip(names, range(len(shape) - 1, -1, -1), strict=False):
        if shape[axis] % mesh.shape[name] == 0:
            parts[axis] = name
    return PartitionSpec(*parts)


def place(params, mesh):
    return {
        name: jax.device_put(p, NamedSharding(mesh, spec(p.shape, mesh)))
        for name, p in params.items()
    }


def steps(optimizer, params, gradients, count=2):
    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for _ in range(count):
        params, state = step(params, state)
    return params, state


def close(ours, expected, rtol=1e-5):
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=rtol * np.abs(value).max(), err_msg=name)


@pytest.fixture(scope="module")
def expected():
    params, gradients = tree()
    return {
        name: steps(build(0.1, NORMS, LABELS), params, gradients)[0]
        for name, build in OPTIMIZERS.items()
    }


@pytest.mark.parametrize(
    ("mesh", "optimizer", "kind"),
    [
        *(("4x2", name, "Explicit") for name in OPTIMIZERS),
        ("4x2", "scion_light", "Auto"),
        ("8", "scion", "Auto"),
        pytest.param("4x2", "short_step", "Auto", marks=pytest.mark.slow),
        pytest.param("8", "clipped_scion", "Explicit", marks=pytest.mark.slow),
        ("2x2x2", "almond", "Auto"),
        ("2x2x2", "unconstrained_scion", "Explicit"),
    ],
)
def test_on_a_mesh_as_on_one_device(optimizer, mesh, kind, expected):
    mesh = make(mesh, kind)
    params, gradients = tree()
    with jax.set_mesh(mesh):
        params, gradients = place(params, mesh), place(gradients, mesh)
        built = OPTIMIZERS[optimizer](0.1, NORMS, LABELS)
        result, state = steps(built, params, gradients)
        for name, value in result.items():
            assert value.sharding.is_equivalent_to(params[name].sharding, value.ndim), name
        for leaf in jax.tree.leaves(state):
            if leaf.shape == (16, 8, 8):
                assert leaf.addressable_shards[0].data.size < leaf.size
    close(result, expected[optimizer])


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ("short_step", ("fsdp", "tensor")),
        ("scion_light", ("fsdp", "tensor")),
        ("almond", "fsdp"),
        ("clipped_scion", None),
        ("unconstrained_clipped_scion", "tensor"),
    ],
)
def test_inside_shard_map(optimizer, names, expected):
    mesh = make("4x2", "Auto")
    params, gradients = tree()
    built = OPTIMIZERS[optimizer](0.1, NORMS, LABELS, shard_over=names)

    def two_steps(params, gradients):
        state = built.init(params)
        for _ in range(2):
            gradients = jax.tree.map(lambda g: jax.lax.pmean(g, ("fsdp", "tensor")), gradients)
            updates, state = built.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    everywhere = PartitionSpec()
    mapped = jax.shard_map(two_steps, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    close(jax.jit(mapped)(params, gradients), expected[optimizer])


@pytest.mark.parametrize("names", [None, "devices"])
def test_inside_pmap(names, expected):
    params, gradients = tree()
    built = scion_jax.clipped_scion(0.1, NORMS, LABELS, rho=30.0, shard_over=names)

    def two_steps(params, gradients):
        state = built.init(params)
        for _ in range(2):
            gradients = jax.lax.pmean(gradients, "devices")
            updates, state = built.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    repeated = jax.tree.map(lambda x: jnp.stack([x] * 8), (params, gradients))
    result = jax.pmap(two_steps, axis_name="devices")(*repeated)
    for device in (0, 5):
        close(jax.tree.map(lambda x, d=device: x[d], result), expected["clipped_scion"])


@pytest.mark.parametrize("rho", [0.0, 1e4])
def test_pairing_of_parts_inside_shard_map(rho):
    """A leaf that is split over a mapped axis counts with all of its parts, once."""
    mesh = make("8", "Auto")
    split, whole = PartitionSpec("fsdp"), PartitionSpec()
    params = {"a": jnp.zeros((8, 4)), "c": jnp.zeros((3, 5))}
    gradients = {"a": jnp.arange(32.0).reshape(8, 4) - 9, "c": jnp.ones((3, 5))}
    built = scion_jax.unconstrained_clipped_scion(
        0.1, scion_jax.Sign(normalized=False), momentum=1.0, rho=rho
    )

    def scanned(params, gradients):
        def step(carry, _):
            params, state = carry
            updates, state = built.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), state[1].pairing

        (params, _), pairings = jax.lax.scan(step, (params, built.init(params)), length=2)
        return params, pairings

    specs = {"a": split, "c": whole}
    mapped = jax.shard_map(scanned, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, whole))
    result, pairings = jax.jit(mapped)(params, gradients)
    np.testing.assert_allclose(pairings, np.abs(gradients["a"]).sum() + 15)
    close(result, scanned(params, gradients)[0])


BLOCK = {"q": (64, 64), "up": (64, 256), "down": (256, 64)}
BLOCKS = {f"{name}{layer}": shape for layer in range(8) for name, shape in BLOCK.items()}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        *((name, "Explicit") for name in OPTIMIZERS),
        *((name, "Auto") for name in ("scion", "clipped_scion", "short_step")),
    ],
)
def test_two_collectives_per_stack(optimizer, kind):
    """As users run it: nothing is said but the mesh."""
    text = compiled(
        OPTIMIZERS[optimizer](0.1, Spectral()), BLOCKS, make("8", kind), PartitionSpec("fsdp", None)
    )
    found = collectives(text)
    moves = 9 if optimizer == "short_step" else 6
    assert [name for name, _ in found].count("all-to-all") == moves
    assert len(found) <= {"short_step": 12}.get(optimizer, 7 if "clipped" in optimizer else 6)
    assert not any(name == "all-gather" and size > 1000 for name, size in found)
    # XLA for CPUs moves bfloat16 as float32.
    ideal = moves * sum(math.prod(shape) for shape in BLOCKS.values()) / 3 / 8 * 4
    assert sum(size for _, size in found) <= 1.5 * ideal
    assert not in_loops(text)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shapes", "spec", "wanted"),
    [
        ({"a": (1, 16, 16)}, PartitionSpec(None, "fsdp"), ["all-gather"]),
        ({"a": (8, 16, 16), "b": (3, 16, 16)}, PartitionSpec(None, "fsdp"), ["all-to-all"] * 2),
        ({"a": (8, 16, 16), "b": (8, 16, 16)}, PartitionSpec("fsdp"), []),
    ],
    ids=["a stack of one", "stacks of different lengths", "stacks split along themselves"],
)
def test_how_stacked_layers_travel(shapes, spec, wanted):
    optimizer = scion_jax.scion(0.1, Spectral(layout="bio"))
    found = collectives(compiled(optimizer, shapes, make("8", "Explicit"), spec))
    assert [name for name, _ in found] == wanted


@pytest.mark.fast
def test_a_stack_split_along_itself_over_some_of_the_devices():
    """Four matrices on four devices, which are padded to eight."""
    norm = Spectral(layout="bio", orthogonalizer=EXACT)
    d = jax.random.normal(jax.random.key(0), (4, 8, 4))
    mesh = make("4x2", "Explicit")
    with jax.set_mesh(mesh):
        given = jax.device_put(d, NamedSharding(mesh, PartitionSpec("fsdp")))
        (result,) = jax.jit(lambda d: lmos_of(norm, [d]))(given)
        assert result.sharding.is_equivalent_to(given.sharding, 3)
    np.testing.assert_allclose(result, norm.lmo(d), atol=1e-5)


@pytest.mark.fast
def test_arrays_on_an_explicit_mesh_that_is_not_in_force():
    """Their types say all that is needed."""
    there = NamedSharding(make("8", "Explicit"), PartitionSpec("fsdp"))
    ds = [jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=there)] * 2
    text = jax.jit(lambda ds: lmos_of(Spectral(), ds)).lower(ds).compile().as_text()
    assert [name for name, _ in collectives(text)] == ["all-to-all"] * 2


@pytest.mark.fast
@pytest.mark.parametrize(
    ("optimizer", "kind"), [*((name, "Explicit") for name in OPTIMIZERS), ("scion", "Auto")]
)
def test_nothing_is_spread_where_that_is_turned_off(optimizer, kind):
    text = compiled(
        OPTIMIZERS[optimizer](0.1, Spectral(), shard_over=()),
        {str(index): (64, 64) for index in range(8)},
        make("8", kind),
        PartitionSpec("fsdp", None),
    )
    kinds = [name for name, _ in collectives(text)]
    assert "all-gather" in kinds
    assert "all-to-all" not in kinds


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_no_communication_inside_the_iteration(kind):
    """Neither for a stack of one matrix, nor if matrices are split over further axes."""
    optimizer = scion_jax.scion(0.1, Spectral(orthogonalizer=EXACT), shard_over="fsdp")
    shapes = {"one": (32, 32), **{str(index): (64, 64) for index in range(8)}}
    text = compiled(optimizer, shapes, make("4x2", kind), PartitionSpec("fsdp", "tensor"))
    assert "while(" in text
    assert collectives(text)
    assert not in_loops(text)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("compute", [None, jnp.float16, jnp.bfloat16])
def test_scale_survives_the_way(kind, compute):
    """Values in bfloat16, infinities and ranges are those of one device."""
    d = jax.random.normal(jax.random.key(0), (6, 16, 24))
    scales = jnp.array([1e-30, 1e-19, 1.0, 1e6, 1e19, 1e30])[:, None, None]
    norm = Spectral(layout="bio", orthogonalizer=NewtonSchulz(compute_dtype=compute))
    expected = norm.lmo(d)
    mesh = make("4x2", kind)
    with jax.set_mesh(mesh):
        given = jax.device_put(
            (d * scales).at[2, 0, 0].set(jnp.inf),
            NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")),
        )
        (result,) = jax.jit(lambda d: lmos_of(norm, [d]))(given)
    assert bool(jnp.isnan(result[2]).any())
    clean = np.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(np.asarray(result)[clean], np.asarray(expected)[clean], atol=0.03)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("names", [None, ("fsdp",), ("fsdp", "tensor"), ("tensor",)])
@pytest.mark.parametrize("own_first", [True, False])
def test_own_and_shared_leaves_inside_shard_map(kind, names, own_first):
    """A leaf of each device's own stays where it is; one that all share is shared out."""
    mesh = make("4x2", kind)
    norm = Spectral(orthogonalizer=EXACT)
    keys = jax.random.split(jax.random.key(0), 3)
    own = jax.random.normal(keys[0], (4, 2, 8, 12))  # two, or nothing would be shared out
    shared = [jax.random.normal(key, (8, 12)) for key in keys[1:]]

    def mapped(own, shared):
        leaves = [*own[0], *shared] if own_first else [*shared, *own[0]]
        results = lmos_of(norm, leaves, names)
        mine = results[:2] if own_first else results[2:]
        return jnp.stack(mine)[None], results[2:] if own_first else results[:2]

    first, whole = PartitionSpec("fsdp"), PartitionSpec()
    with jax.set_mesh(mesh):
        given = jax.device_put(own, NamedSharding(mesh, first))
        own_result, results = jax.jit(
            jax.shard_map(mapped, in_specs=(first, whole), out_specs=(first, whole))
        )(given, shared)
    expected = [norm.lmo(leaf) for leaf in (*own.reshape(8, 8, 12), *shared)]
    for result, wanted in zip([*own_result.reshape(8, 8, 12), *results], expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-5)


def test_inside_shard_map_over_some_axes_only():
    """The others stay the types' own, and work is spread over them."""
    norm = Spectral(orthogonalizer=EXACT)
    ds = list(jax.random.normal(jax.random.key(0), (2, 8, 12)))
    whole = PartitionSpec()
    with jax.set_mesh(make("4x2", "Explicit")):
        given = [jax.device_put(d, PartitionSpec("fsdp")) for d in ds]
        mapped = jax.shard_map(
            lambda ds: lmos_of(norm, ds), in_specs=whole, out_specs=whole, axis_names={"tensor"}
        )
        step = jax.jit(mapped).lower(given).compile()
        assert "all-to-all" in [name for name, _ in collectives(step.as_text())]
        results = step(given)
    for result, d in zip(results, ds, strict=True):
        np.testing.assert_allclose(result, norm.lmo(d), atol=1e-5)


def test_two_mapped_devices_share_the_work():
    whole = PartitionSpec()
    mapped = jax.shard_map(
        lambda ds: lmos_of(Spectral(), ds, ("tensor",)),
        mesh=make("4x2", "Auto"),
        in_specs=whole,
        out_specs=whole,
    )
    assert "all_gather" in str(jax.make_jaxpr(mapped)([jnp.ones((8, 12))] * 2))


@pytest.mark.fast
@pytest.mark.parametrize("layout", ["ioo", "iio", "sio"])
def test_axes_that_become_one_may_be_split(layout):
    """Each of them; results are split as their leaf is."""
    norm = Spectral(layout=layout)
    for axis in range(3):
        spec = PartitionSpec(*("fsdp" if a == axis else None for a in range(3)))
        there = NamedSharding(make("4x2", "Explicit"), spec)
        with jax.set_mesh(there.mesh):
            given = jax.ShapeDtypeStruct((4, 8, 12), jnp.float32, sharding=there)
            (axes,) = norm.read(given.shape).blocks
            assert "fsdp" in jax.eval_shape(axes.to_matrices, given).sharding.spec  # held once
            assert jax.eval_shape(norm.lmo, given).sharding.spec == spec


@pytest.mark.fast
def test_stack_rows_and_columns_may_be_split_at_once():
    norm = Spectral(layout="biioo")
    spec = PartitionSpec("fsdp", "tensor", None, "data", None)
    there = NamedSharding(make("2x2x2", "Explicit"), spec)
    with jax.set_mesh(there.mesh):
        given = jax.ShapeDtypeStruct((2, 2, 3, 2, 5), jnp.float32, sharding=there)
        (axes,) = norm.read(given.shape).blocks
        matrices = jax.eval_shape(axes.to_matrices, given)
        assert matrices.sharding.spec == PartitionSpec("fsdp", "tensor", "data")
        assert jax.eval_shape(norm.lmo, given).sharding.spec == spec


@pytest.mark.fast
def test_orthogonalize_keeps_the_sharding():
    mesh = make("4x2", "Explicit")
    with jax.set_mesh(mesh):
        there = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        x = jax.device_put(jax.random.normal(jax.random.key(0), (3, 8, 12)), there)
        result = jax.jit(lambda x: orthogonalize(x, EXACT))(x)
        assert result.sharding.is_equivalent_to(there, 3)
    expected = orthogonalize(jnp.asarray(np.asarray(x)), EXACT)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("norm", "most", "kind"),
    [
        (scion_jax.Sign(), 0, "Auto"),
        (scion_jax.Sign(), 0, "Explicit"),
        (scion_jax.ColNorm(), 1, "Explicit"),
        (scion_jax.RowNorm(), 1, "Auto"),
        (scion_jax.BiasRMS(layout="io"), 1, "Explicit"),
        (scion_jax.Euclidean(), 1, "Auto"),
    ],
)
def test_one_small_reduction_per_label(norm, most, kind):
    mesh = make("8", kind)
    optimizer = scion_jax.scion(0.1, norm, shard_over="fsdp" if kind == "Auto" else None)
    for specs in (PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp")):
        found = collectives(compiled(optimizer, BLOCKS, mesh, specs))
        assert len(found) <= most
        assert all(name == "all-reduce" for name, _ in found)


@pytest.mark.fast
def test_one_reduction_for_vectors_without_a_whole_axis():
    shapes = {"a": (16,), "b": (16,)}
    optimizer = scion_jax.scion(0.1, scion_jax.BiasRMS())
    found = collectives(compiled(optimizer, shapes, make("8", "Explicit"), PartitionSpec("fsdp")))
    assert [name for name, _ in found] == ["all-reduce"]


@pytest.mark.fast
def test_shares_of_the_work():
    """Each device multiplies its own matrices only."""
    text = compiled(
        scion_jax.scion(0.1, Spectral()),
        {str(index): (64, 64) for index in range(32)},
        make("8", "Explicit"),
        PartitionSpec("fsdp", None),
    )
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
    assert shapes
    assert {math.prod(map(int, shape.split(","))) for shape in shapes} == {4 * 64 * 64}


@pytest.mark.fast
def test_init_and_shapes():
    mesh = make("8", "Explicit")
    with jax.set_mesh(mesh):
        params = place(tree()[0], mesh)
        optimizer = scion_jax.clipped_scion(0.1, NORMS, LABELS, rho=1.0)
        state = jax.jit(optimizer.init)(params)
        for name, average in optax.tree.get(state, "average").items():
            assert average.sharding == params[name].sharding
        shapes = jax.eval_shape(optimizer.update, params, state, params)[0]
        for name, shape in shapes.items():
            assert shape.sharding.spec == params[name].sharding.spec
        expected, _ = jax.jit(optimizer.update)(params, state, params)
        donated = jax.jit(optimizer.update, donate_argnums=(0, 1))
        copied = jax.tree.map(jnp.copy, params)
        updates, _ = donated(copied, state, params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copied))
        close(updates, expected)


@pytest.mark.fast
def test_named_axes_of_a_mesh_in_force():
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    optimizer = scion_jax.scion(0.1, shard_over="fsdp")
    state = optimizer.init(params)
    with jax.set_mesh(make("8", "Auto")):
        updates, _ = jax.jit(optimizer.update)(params, state, params)
    close(updates, scion_jax.scion(0.1).update(params, state, params)[0], rtol=1e-2)
