"""Many devices: the same results as on one, with the least communication."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import scion_jax
from scion_jax import NewtonSchulz, Spectral, label_by_path, orthogonalize
from tests.polar.test_orthogonalize import SPECTRA, with_spectrum
from tests.support.meshes import EXACT, OPTIMIZERS, collectives, lmos_of, make

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
    return P(*parts)


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


def two_steps(built, axes):
    """Two steps on gradients that a mapped function averages over devices."""

    def run(params, gradients):
        state = built.init(params)
        for _ in range(2):
            mean = jax.tree.map(lambda g: jax.lax.pmean(g, axes), gradients)
            updates, state = built.update(mean, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return run


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
    built = OPTIMIZERS[optimizer](0.1, NORMS, LABELS, shard_over=names)
    steps, mesh = two_steps(built, ("fsdp", "tensor")), make("4x2", "Auto")
    mapped = jax.shard_map(steps, mesh=mesh, in_specs=P(), out_specs=P())
    close(jax.jit(mapped)(*tree()), expected[optimizer])


@pytest.mark.parametrize("names", [None, "devices"])
def test_inside_pmap(names, expected):
    built = OPTIMIZERS["clipped_scion"](0.1, NORMS, LABELS, shard_over=names)
    repeated = jax.tree.map(lambda x: jnp.stack([x] * 8), tree())
    result = jax.pmap(two_steps(built, "devices"), axis_name="devices")(*repeated)
    for device in (0, 5):
        close(jax.tree.map(lambda x, d=device: x[d], result), expected["clipped_scion"])


@pytest.mark.parametrize("rho", [0.0, 1e4])
def test_pairing_of_parts_inside_shard_map(rho):
    """A leaf that is split over a mapped axis counts with all of its parts, once."""
    mesh = make("8", "Auto")
    split, whole = P("fsdp"), P()
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


@pytest.mark.fast
def test_a_stack_split_along_itself_over_some_of_the_devices():
    """Four matrices on four devices, which are padded to eight."""
    norm = Spectral(layout="bio", orthogonalizer=EXACT)
    d = jax.random.normal(jax.random.key(0), (4, 8, 4))
    mesh = make("4x2", "Explicit")
    with jax.set_mesh(mesh):
        given = jax.device_put(d, NamedSharding(mesh, P("fsdp")))
        (result,) = jax.jit(lambda d: lmos_of(norm, [d]))(given)
        assert result.sharding.is_equivalent_to(given.sharding, 3)
    np.testing.assert_allclose(result, norm.lmo(d), atol=1e-5)


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
            NamedSharding(mesh, P(None, "fsdp", "tensor")),
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

    first, whole = P("fsdp"), P()
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
    whole = P()
    with jax.set_mesh(make("4x2", "Explicit")):
        given = [jax.device_put(d, P("fsdp")) for d in ds]
        mapped = jax.shard_map(
            lambda ds: lmos_of(norm, ds), in_specs=whole, out_specs=whole, axis_names={"tensor"}
        )
        step = jax.jit(mapped).lower(given).compile()
        assert "all-to-all" in [name for name, _ in collectives(step.as_text())]
        results = step(given)
    for result, d in zip(results, ds, strict=True):
        np.testing.assert_allclose(result, norm.lmo(d), atol=1e-5)


@pytest.mark.fast
def test_orthogonalize_keeps_the_sharding():
    mesh = make("4x2", "Explicit")
    with jax.set_mesh(mesh):
        there = NamedSharding(mesh, P(None, "fsdp", "tensor"))
        x = jax.device_put(jax.random.normal(jax.random.key(0), (3, 8, 12)), there)
        result = jax.jit(lambda x: orthogonalize(x, EXACT))(x)
        assert result.sharding.is_equivalent_to(there, 3)
    expected = orthogonalize(jnp.asarray(np.asarray(x)), EXACT)
    np.testing.assert_allclose(result, expected, atol=1e-5)


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


CLOSED_FORMS = [
    scion_jax.Euclidean(),
    scion_jax.ColNorm(),
    scion_jax.RowNorm(),
    scion_jax.BiasRMS(layout="oo"),
]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("norm", CLOSED_FORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_of_split_leaves_whatever_the_scale(x64, norm, kind, dtype):
    """Sums of squares of entries that are huge, tiny and neither, in one reduction over devices."""
    d = np.random.default_rng(0).standard_normal((16, 8)).astype(dtype)
    mixed = d * 10.0 ** np.array([0, -30, 20, 0] * 2, dtype)
    infinite = mixed.copy()
    infinite[3, 5] = np.inf
    scales = (1e-34, 1e-30, 1e-19, 1e-15, 1.0, 1e15, 1e19, 1e36)
    if dtype == "float64":
        scales = (1e-300, 1e-200, 1e-120, 1e-60, 1.0, 1e120, 1e200, 1e300)
    arrays = [*(d * np.asarray(scale, dtype) for scale in scales), mixed, infinite]
    expected = [norm.lmo(jnp.asarray(array)) for array in arrays]  # on one device
    for result in expected[: len(scales)]:
        np.testing.assert_allclose(result, expected[4], rtol=1e-5)
    assert bool(jnp.isnan(expected[-1][3, 5]))
    mesh = make("4x2", kind)
    with jax.set_mesh(mesh):
        lmo = jax.jit(norm.lmo)
        for spec in (P("fsdp", "tensor"), P(None, "fsdp")):
            for array, wanted in zip(arrays, expected, strict=True):
                result = lmo(jax.device_put(array, NamedSharding(mesh, spec)))
                np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_largest_singular_value_by_default(kind):
    """Nothing is said but the mesh; the spectra, shapes and scales of the test on one device."""
    rng = np.random.default_rng(0)
    shapes = ((2, 8), (9, 40), (16, 16), (48, 48), (128, 32))
    ds, numbers = [], range(8)
    for n, m in shapes:
        for kind_of_spectrum, spectrum in SPECTRA.items():
            low, high = sorted((n, m))
            matrix = (
                rng.standard_normal((low, high))
                if kind_of_spectrum == "gaussian"
                else with_spectrum(spectrum(np.arange(low), low), high, 1)
            )
            matrix = matrix if n <= m else matrix.T
            scales = 10.0 ** (4.0 * np.array(numbers) - 16)[:, None, None]
            ds.append((matrix * scales).astype(np.float32))
    norm = Spectral(layout="bio", normalized=False)
    mesh = make("8", kind)
    with jax.set_mesh(mesh):
        given = [
            jax.device_put(d, NamedSharding(mesh, P(None, "fsdp")))
            for d in ds
            if d.shape[1] % 8 == 0
        ]
        given += [
            jax.device_put(d, NamedSharding(mesh, P(None, None, "fsdp")))
            for d in ds
            if d.shape[1] % 8
        ]
        results = jax.jit(lambda ds: lmos_of(norm, ds))(given)
    for d, result in zip(given, results, strict=True):
        for v in np.asarray(result) / np.sqrt(d.shape[2]):
            assert np.linalg.norm(v, 2) <= 1.005


@pytest.mark.parametrize("short_step", [False, True])
@pytest.mark.parametrize("spec", [P("fsdp"), P(("fsdp", "tensor"))])
def test_clipping_across_parts_inside_shard_map(spec, short_step):
    """Pairings of parts add up before their absolute values do, and the largest gauge counts.

    "out" lies outside of its ball, where the step would climb.
    """
    norm = scion_jax.Sign(1.0, normalized=False)
    rng = np.random.default_rng(0)
    params = {"in": rng.uniform(-1, 1, (8, 4)), "out": rng.uniform(2, 9, (8, 4)), "whole": [0.5, 1]}
    gradients = {"in": rng.standard_normal((8, 4)), "whole": [1.0, -2.0]}
    gradients["out"] = -np.abs(rng.standard_normal((8, 4)))
    gradients["out"][0] = 0  # the first device has nothing to climb
    params, gradients = (
        {key: jnp.asarray(value, jnp.float32) for key, value in tree.items()}
        for tree in (params, gradients)
    )
    optimizer = scion_jax.clipped_scion(0.1, norm, rho=1e3, momentum=1.0, short_step=short_step)

    def step(params, gradients):
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        return updates, (state[1].pairing, state[1].factor)

    specs = {"in": spec, "out": spec, "whole": P()}
    mapped = jax.shard_map(
        step,
        mesh=make("4x2", "Auto"),
        in_specs=(specs, specs),
        out_specs=(specs, (P(), P())),
    )
    updates, numbers = jax.jit(mapped)(params, gradients)
    expected, expected_numbers = step(params, gradients)
    np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-5)
    assert 0 < numbers[1] < 1
    for key, value in expected.items():
        np.testing.assert_allclose(updates[key], value, rtol=1e-4, atol=1e-7)
