"""Many devices: the same numbers as on one; what moves between them is in `test_collectives`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import scion_jax
from scion_jax import Sign, Spectral, label_by_path, orthogonalize
from tests.support.meshes import EXACT, OPTIMIZERS, collectives, lmos_of, make
from tests.support.norms import gaussian

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
pytestmark = pytest.mark.unoptimized
every_kind = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def tree():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
    return params, jax.tree.map(lambda x: jnp.sin(3 * x), params)


def place(params, mesh):
    """Splits the last axes that divide, over the first axes of the mesh."""

    def placed(array):
        parts: list[str | None] = [None] * array.ndim
        names = [name for name in ("fsdp", "tensor") if name in mesh.axis_names]
        for name, axis in zip(names, range(array.ndim - 1, -1, -1), strict=False):
            if array.shape[axis] % mesh.shape[name] == 0:
                parts[axis] = name
        return jax.device_put(array, NamedSharding(mesh, P(*parts)))

    return jax.tree.map(placed, params)


def two_steps(built, average=lambda gradients: gradients):
    def run(params, gradients):
        def step(carry, _):  # compiled once
            params, state = carry
            updates, state = built.update(average(gradients), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, built.init(params)), length=2)[0]

    return run


def close(ours, expected, tolerance=1e-5):
    for name, value in expected.items():
        atol = tolerance * np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, atol=atol, err_msg=name)


@functools.cache
def expected(optimizer):
    """What one device makes of it."""
    return jax.jit(two_steps(OPTIMIZERS[optimizer](0.1, NORMS, LABELS)))(*tree())[0]


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
def test_on_a_mesh_as_on_one_device(optimizer, mesh, kind):
    mesh = make(mesh, kind)
    with jax.set_mesh(mesh):
        params, gradients = place(tree(), mesh)
        built = OPTIMIZERS[optimizer](0.1, NORMS, LABELS)
        result, state = jax.jit(two_steps(built))(params, gradients)
        for name, value in result.items():
            assert value.sharding.is_equivalent_to(params[name].sharding, value.ndim), name
        for leaf in jax.tree.leaves(state):
            if leaf.shape == (16, 8, 8):
                assert leaf.addressable_shards[0].data.size < leaf.size
    close(result, expected(optimizer))


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
def test_inside_shard_map(optimizer, names):
    built, axes = OPTIMIZERS[optimizer](0.1, NORMS, LABELS, shard_over=names), ("fsdp", "tensor")
    steps = two_steps(built, lambda g: jax.tree.map(lambda g: jax.lax.pmean(g, axes), g))
    mapped = jax.shard_map(steps, mesh=make("4x2", "Auto"), in_specs=P(), out_specs=P())
    close(jax.jit(mapped)(*tree())[0], expected(optimizer))


@pytest.mark.parametrize("names", [None, "devices"])
def test_inside_pmap(names):
    built = OPTIMIZERS["clipped_scion"](0.1, NORMS, LABELS, shard_over=names)
    repeated = jax.tree.map(lambda x: jnp.stack([x] * 8), tree())
    steps = two_steps(built, lambda gradients: jax.lax.pmean(gradients, "devices"))
    result, _ = jax.pmap(steps, axis_name="devices")(*repeated)
    for device in (0, 5):
        close(jax.tree.map(lambda x, d=device: x[d], result), expected("clipped_scion"))


@pytest.mark.parametrize("rho", [0.0, 1e4])
def test_pairing_of_parts_inside_shard_map(rho):
    """A leaf that is split over a mapped axis counts with all of its parts, once."""
    params = {"a": jnp.zeros((8, 4)), "c": jnp.zeros((3, 5))}
    gradients = {"a": jnp.arange(32.0).reshape(8, 4) - 9, "c": jnp.ones((3, 5))}
    norm = Sign(normalized=False)
    built = scion_jax.unconstrained_clipped_scion(0.1, norm, momentum=1.0, rho=rho)

    def scanned(params, gradients):
        def step(carry, _):
            params, state = carry
            updates, state = built.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), state[1].pairing

        (params, _), pairings = jax.lax.scan(step, (params, built.init(params)), length=2)
        return params, pairings

    specs = {"a": P("fsdp"), "c": P()}
    mesh = make("8", "Auto")
    mapped = jax.shard_map(scanned, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, P()))
    result, pairings = jax.jit(mapped)(params, gradients)
    np.testing.assert_allclose(pairings, np.abs(gradients["a"]).sum() + 15)
    close(result, scanned(params, gradients)[0])


@pytest.mark.fast
@pytest.mark.parametrize("short_step", [False, True])
@pytest.mark.parametrize("spec", [P("fsdp"), P(("fsdp", "tensor"))])
def test_clipping_across_parts_inside_shard_map(spec, short_step):
    """Pairings of parts add up before their absolute values do, and the largest gauge counts.

    "out" lies outside of its ball, where the step climbs.
    """
    rng = np.random.default_rng(0)
    params = {"in": rng.uniform(-1, 1, (8, 4)), "out": rng.uniform(2, 9, (8, 4)), "whole": [0.5, 1]}
    gradients = {"in": rng.standard_normal((8, 4)), "whole": [1.0, -2.0]}
    gradients["out"] = -np.abs(rng.standard_normal((8, 4)))
    gradients["out"][0] = 0  # the first device has nothing to climb
    trees = [{k: jnp.asarray(v, jnp.float32) for k, v in t.items()} for t in (params, gradients)]
    optimizer = scion_jax.clipped_scion(
        0.1, Sign(normalized=False), rho=1e3, momentum=1.0, short_step=short_step
    )

    def step(params, gradients):
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        return updates, (state[1].pairing, state[1].factor)

    specs, mesh = {"in": spec, "out": spec, "whole": P()}, make("4x2", "Auto")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, P()))
    updates, numbers = jax.jit(mapped)(*trees)
    expected, expected_numbers = step(*trees)
    chex.assert_trees_all_close(numbers, expected_numbers, rtol=1e-5)
    assert 0 < numbers[1] < 1
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-7)


BIO = Spectral(layout="bio", orthogonalizer=EXACT)
PLACED = {
    # Four matrices on four devices, which are padded to eight.
    "split along itself": ((4, 8, 4), P("fsdp"), lambda d: lmos_of(BIO, [d])[0]),
    "orthogonalize": ((3, 8, 12), P(None, "fsdp", "tensor"), lambda x: orthogonalize(x, EXACT)),
}


@pytest.mark.fast
@pytest.mark.parametrize(("shape", "spec", "function"), PLACED.values(), ids=PLACED)
def test_results_are_split_as_what_they_are_of(shape, spec, function):
    x, mesh = gaussian(shape, dtype=np.float32), make("4x2", "Explicit")
    with jax.set_mesh(mesh):
        given = jax.device_put(x, NamedSharding(mesh, spec))
        result = jax.jit(function)(given)
        assert result.sharding.is_equivalent_to(given.sharding, 3)
    np.testing.assert_allclose(result, function(jnp.asarray(x)), atol=1e-5)


@pytest.mark.fast
@every_kind
@pytest.mark.parametrize("names", [None, ("fsdp",), ("fsdp", "tensor"), ("tensor",)])
@pytest.mark.parametrize("own_first", [True, False])
def test_own_and_shared_leaves_inside_shard_map(kind, names, own_first):
    """A leaf of each device's own stays where it is; one that all share is shared out."""
    norm, mesh = Spectral(orthogonalizer=EXACT), make("4x2", kind)
    own = gaussian((4, 2, 8, 12), dtype=np.float32)  # two, or nothing would be shared out
    shared = list(gaussian((2, 8, 12), 1, dtype=np.float32))

    def mapped(own, shared):
        leaves = [*own[0], *shared] if own_first else [*shared, *own[0]]
        results = lmos_of(norm, leaves, names)
        mine = results[:2] if own_first else results[2:]
        return jnp.stack(mine)[None], results[2:] if own_first else results[:2]

    specs = P("fsdp"), P()
    with jax.set_mesh(mesh):
        given = jax.device_put(own, NamedSharding(mesh, P("fsdp")))
        function = jax.jit(jax.shard_map(mapped, in_specs=specs, out_specs=specs))
        own_result, results = function(given, shared)
    matrices = [*own.reshape(8, 8, 12), *shared]
    expected = jax.vmap(norm.lmo)(jnp.stack(matrices))
    for result, wanted in zip([*own_result.reshape(8, 8, 12), *results], expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-5)


def test_inside_shard_map_over_some_axes_only():
    """The others stay the types' own, and work is spread over them."""
    norm, ds = Spectral(orthogonalizer=EXACT), list(gaussian((2, 8, 12), dtype=np.float32))
    with jax.set_mesh(make("4x2", "Explicit")):
        given = [jax.device_put(d, P("fsdp")) for d in ds]
        mapped = jax.shard_map(
            lambda ds: lmos_of(norm, ds), in_specs=P(), out_specs=P(), axis_names={"tensor"}
        )
        step = jax.jit(mapped).lower(given).compile()
        assert "all-to-all" in [name for name, _ in collectives(step.as_text())]
        results = step(given)
    for result, d in zip(results, ds, strict=True):
        np.testing.assert_allclose(result, norm.lmo(d), atol=1e-5)


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:.*no leaf:UserWarning")  # some are compiled only
def test_init_shapes_and_donation():
    mesh = make("8", "Explicit")
    optimizer = scion_jax.clipped_scion(0.1, NORMS, LABELS, rho=1.0)
    with jax.set_mesh(mesh):
        params = place(tree()[0], mesh)
        state = jax.jit(optimizer.init)(params)
        shapes = jax.eval_shape(optimizer.update, params, state, params)[0]
        for name, param in params.items():
            assert optax.tree.get(state, "average")[name].sharding == param.sharding
            assert shapes[name].sharding.spec == param.sharding.spec
        few = {name: params[name] for name in ("spectral0", "stacked0", "bias")}
        state = jax.jit(optimizer.init)(few)
        expected, _ = jax.jit(optimizer.update)(few, state, few)
        copied = jax.tree.map(jnp.copy, few)
        updates, _ = jax.jit(optimizer.update, donate_argnums=(0, 1))(copied, state, few)
        close(updates, expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copied))


@pytest.mark.fast
def test_named_axes_of_a_mesh_in_force():
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    optimizer = scion_jax.scion(0.1, shard_over="fsdp")
    state = optimizer.init(params)
    with jax.set_mesh(make("8", "Auto")):
        updates, _ = jax.jit(optimizer.update)(params, state, params)
    close(updates, scion_jax.scion(0.1).update(params, state, params)[0], 1e-2)


CLOSED_FORMS = [
    *(scion_jax.Euclidean(), scion_jax.ColNorm(), scion_jax.RowNorm()),
    scion_jax.BiasRMS(layout="oo"),
]
SCALES = {
    "float32": (1e-34, 1e-30, 1e-19, 1e-15, 1.0, 1e15, 1e19, 1e36),
    "float64": (1e-300, 1e-200, 1e-120, 1e-60, 1.0, 1e120, 1e200, 1e300),
}


@pytest.mark.fast
@every_kind
@pytest.mark.parametrize("norm", CLOSED_FORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("dtype", SCALES)
def test_norms_of_split_leaves_whatever_the_scale(x64, norm, kind, dtype):
    """Sums of squares of entries that are huge, tiny and neither."""
    d = gaussian((16, 8), dtype=dtype)
    mixed = d * 10.0 ** np.array([0, -30, 20, 0] * 2, dtype)
    infinite = mixed.copy()
    infinite[3, 5] = np.inf
    arrays = [*(d * np.asarray(scale, dtype) for scale in SCALES[dtype]), mixed, infinite]
    expected = [norm.lmo(jnp.asarray(array)) for array in arrays]  # on one device
    for result in expected[:8]:
        np.testing.assert_allclose(result, expected[4], rtol=1e-5)
    assert bool(jnp.isnan(expected[-1][3, 5]))
    mesh = make("4x2", kind)
    with jax.set_mesh(mesh):
        lmo = jax.jit(norm.lmo)
        for spec in (P("fsdp", "tensor"), P(None, "fsdp")):
            for array, wanted in zip(arrays, expected, strict=True):
                result = lmo(jax.device_put(array, NamedSharding(mesh, spec)))
                np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-37)
