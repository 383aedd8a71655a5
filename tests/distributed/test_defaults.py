"""Many devices as users have them: bfloat16 on the way, and compiled with all optimizations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from scion_jax import NewtonSchulz, Spectral
from tests.polar.test_orthogonalize import SPECTRA, with_spectrum
from tests.support.meshes import lmos_of, make
from tests.support.norms import gaussian

pytestmark = pytest.mark.fast
every_kind = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


@every_kind
@pytest.mark.parametrize("compute", [None, jnp.float16, jnp.bfloat16])
def test_scale_survives_the_way(kind, compute):
    """Values in bfloat16, infinities and ranges are those of one device."""
    d = jnp.asarray(gaussian((6, 16, 24)), jnp.float32)
    scales = jnp.array([1e-30, 1e-19, 1.0, 1e6, 1e19, 1e30])[:, None, None]
    norm = Spectral(layout="bio", orthogonalizer=NewtonSchulz(compute_dtype=compute))
    expected, mesh = np.asarray(norm.lmo(d)), make("4x2", kind)
    with jax.set_mesh(mesh):
        there = NamedSharding(mesh, P(None, "fsdp", "tensor"))
        given = jax.device_put((d * scales).at[2, 0, 0].set(jnp.inf), there)
        result = np.asarray(jax.jit(lambda d: lmos_of(norm, [d]))(given)[0])
    assert np.isnan(result[2]).any()
    clean = np.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(result[clean], expected[clean], atol=0.03)


@every_kind
def test_largest_singular_value_by_default(kind):
    """Nothing is said but the mesh; the spectra, shapes and scales of the test on one device."""
    ds, scales = [], 10.0 ** (4.0 * np.arange(8) - 16)[:, None, None]
    for n, m in ((2, 8), (9, 40), (16, 16), (48, 48), (128, 32)):
        low, high = sorted((n, m))
        matrices = [
            with_spectrum(spectrum(np.arange(low), low), high, 1)
            if spectrum
            else gaussian((low, high))
            for spectrum in SPECTRA.values()
        ]
        stack = np.concatenate([matrix * scales for matrix in matrices]).astype(np.float32)
        ds.append(stack if n <= m else stack.mT)
    norm, mesh = Spectral(layout="bio", normalized=False), make("8", kind)
    with jax.set_mesh(mesh):
        specs = [P(None, "fsdp") if d.shape[1] % 8 == 0 else P(None, None, "fsdp") for d in ds]
        given = [jax.device_put(d, NamedSharding(mesh, s)) for d, s in zip(ds, specs, strict=True)]
        results = jax.jit(lambda ds: lmos_of(norm, ds))(given)
    for d, result in zip(given, results, strict=True):
        values = np.linalg.norm(np.asarray(result) / np.sqrt(d.shape[2]), 2, axis=(1, 2))
        assert values.max() <= 1.005
