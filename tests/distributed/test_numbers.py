"""Numbers on many devices: ranges, spectra, clipping across parts, and the way stacks take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import scion_jax
from scion_jax import Spectral
from tests.polar.test_orthogonalize import SPECTRA, with_spectrum
from tests.support.meshes import collectives, compiled, lmos_of, make

pytestmark = pytest.mark.fast

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
        for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(None, "fsdp")):
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
            jax.device_put(d, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
            for d in ds
            if d.shape[1] % 8 == 0
        ]
        given += [
            jax.device_put(d, NamedSharding(mesh, PartitionSpec(None, None, "fsdp")))
            for d in ds
            if d.shape[1] % 8
        ]
        results = jax.jit(lambda ds: lmos_of(norm, ds))(given)
    for d, result in zip(given, results, strict=True):
        for v in np.asarray(result) / np.sqrt(d.shape[2]):
            assert np.linalg.norm(v, 2) <= 1.005


@pytest.mark.parametrize("short_step", [False, True])
@pytest.mark.parametrize("spec", [PartitionSpec("fsdp"), PartitionSpec(("fsdp", "tensor"))])
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

    specs = {"in": spec, "out": spec, "whole": PartitionSpec()}
    mapped = jax.shard_map(
        step,
        mesh=make("4x2", "Auto"),
        in_specs=(specs, specs),
        out_specs=(specs, (PartitionSpec(), PartitionSpec())),
    )
    updates, numbers = jax.jit(mapped)(params, gradients)
    expected, expected_numbers = step(params, gradients)
    np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-5)
    assert 0 < numbers[1] < 1
    for key, value in expected.items():
        np.testing.assert_allclose(updates[key], value, rtol=1e-4, atol=1e-7)


LAYERS = {
    f"{name}{layer}": shape
    for layer in range(8)
    for name, shape in {"q": (64, 64), "up": (64, 256)}.items()
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_replicated_axes_move_a_share_only(kind):
    """Parameters split over one axis and replicated over two: shared out first, gathered last.

    On an Auto mesh the order is the mesh's or the given one: types do not say what is split.
    """
    names = ("data", "tensor", "fsdp") if kind == "Auto" else None
    optimizer = scion_jax.scion(0.1, Spectral(), shard_over=names)
    mesh = make("2x2x2", kind)
    found = collectives(compiled(optimizer, LAYERS, mesh, PartitionSpec("fsdp", None)))
    kinds = [name for name, _ in found]
    assert kinds.count("all-to-all") == 4  # two a stack
    assert kinds.count("all-gather") == 4  # of results, one a stack and axis
    own = sum(64 * size for _, size in LAYERS.values()) / 2 * 4  # bytes of half of every matrix
    moved = sum(size for name, size in found if name == "all-to-all")
    assert moved <= 1.1 * 2 * own / 4  # of which it moves its quarter, there and back
    assert sum(size for name, size in found if name == "all-gather") <= 1.1 * (own / 2 + own)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_matrices_split_over_two_axes_are_never_gathered(kind):
    optimizer = scion_jax.scion(0.1, Spectral())
    found = collectives(
        compiled(optimizer, LAYERS, make("4x2", kind), PartitionSpec("fsdp", "tensor"))
    )
    assert {name for name, _ in found} <= {"all-to-all", "collective-permute"}
    assert [name for name, _ in found].count("all-to-all") <= 8
