"""What holds for one norm or another, and for their own kinds of starting points."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import scion_jax
from scion_jax import Auto, BiasRMS, ExactPolar, Sign, Spectral, SpectralConv, scale_by_lmo
from tests.support.norms import gaussian

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]


def test_spectral_init_is_semi_orthogonal_and_uniform():
    norm = Spectral(layout="oi", normalized=False)
    for shape in [(6, 4), (4, 6)]:
        draws = jax.vmap(lambda key, shape=shape: norm.init(key, shape))(
            jax.random.split(jax.random.key(0), 2000)
        )
        small = draws / np.sqrt(shape[0])
        gram = np.einsum("nab,ncb->nac" if shape[0] < shape[1] else "nba,nbc->nac", small, small)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-5)
        np.testing.assert_allclose(small.mean(0), 0, atol=0.05)  # no preferred sign


def test_starting_points():
    key = jax.random.key(0)
    assert Sign().init(key, (3, 4), np.float64).dtype == jnp.float32  # what JAX makes of it
    assert not bool(jnp.any(Sign(zero_init=True).init(key, (3, 4))))
    assert len(np.unique(Sign().init(key, (8, 8)))) == 2


def test_convolution_counts_its_window():
    """One spectral unit of a 3×3 convolution: every output keeps the RMS of its input's window."""
    v = SpectralConv(layout="ssio").lmo(jnp.asarray(gaussian((3, 3, 4, 6)), jnp.float32))
    flat = np.asarray(v).reshape(36, 6)
    assert np.linalg.norm(flat, 2) == pytest.approx(np.sqrt(6 / 4) / 9, rel=0.06)


def test_a_radius_may_be_traced_through_the_iteration():
    d, radii = jnp.asarray(gaussian((3, 4)), jnp.float32), jnp.array([0.5, 50.0])
    for kind in (Spectral, Auto):
        mapped = jax.vmap(lambda radius, kind=kind: kind(radius).lmo(d))(radii)
        for radius, v in zip(radii, mapped, strict=True):
            np.testing.assert_allclose(v, kind(float(radius)).lmo(d), rtol=1e-4, atol=1e-4)


def test_as_a_flax_initializer():
    norm = Spectral(50.0)
    dense = linen.Dense(8, kernel_init=norm.init, bias_init=BiasRMS().init)
    kernel = dense.init(jax.random.key(0), jnp.ones((1, 4)))["params"]["kernel"]
    assert float(norm.gauge(kernel)) == pytest.approx(1, abs=1e-5)
    linear = nnx.Linear(4, 8, kernel_init=norm.init, rngs=nnx.Rngs(0))
    assert float(norm.gauge(linear.kernel[...])) == pytest.approx(1, abs=1e-5)


def test_auto_asks_for_the_rank():
    told = Auto(2.0, vector_radius=3.0, constrained=False, orthogonalizer=ExactPolar())
    d = jnp.asarray(gaussian((3, 4)), jnp.float32)
    matrix, vector = Spectral(2.0, orthogonalizer=ExactPolar()), BiasRMS(3.0)
    stacked = dataclasses.replace(told, layout="bo")
    for rule, norm, x in (
        (told, matrix, d),
        (told, vector, d[0]),
        (told, vector, d[0, 0]),
        (stacked, BiasRMS(3.0, layout="bo"), d),
        (dataclasses.replace(told, layout="oi"), dataclasses.replace(matrix, layout="oi"), d),
    ):
        np.testing.assert_array_equal(rule.lmo(x), norm.lmo(x))
        for method in ("gauge", "dual_norm"):
            assert float(getattr(rule, method)(x)) == float(getattr(norm, method)(x))
        key = jax.random.key(1)
        np.testing.assert_array_equal(rule.init(key, x.shape), norm.init(key, x.shape))
    # and both kinds of parameters are free if it says so
    optimizer = scion_jax.scion(0.5, told, momentum=1.0)
    params = {"w": d, "b": d[0]}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for name, norm in (("w", matrix), ("b", vector)):
        np.testing.assert_allclose(updates[name], -0.5 * norm.lmo(params[name]), atol=1e-6)


@dataclasses.dataclass(frozen=True)
class EntrySum(scion_jax.Norm):
    """Somebody's own norm: the sum of absolute entries."""

    def unit_lmo(self, d, axes):
        largest = jnp.abs(d) == jnp.max(jnp.abs(d), axes.matrix, keepdims=True)
        vertices = jnp.where(largest, jnp.sign(d), 0)
        return vertices / jnp.sum(largest, axes.matrix, keepdims=True, dtype=d.dtype)

    def unit_gauge(self, x, axes):
        return jnp.sum(jnp.abs(x), axes.matrix)

    def unit_dual_norm(self, d, axes):
        return jnp.max(jnp.abs(d), axes.matrix)

    def unit_init(self, key, axes):
        return jnp.zeros(axes.shape)


def test_leaves_together_are_leaves_alone():
    """Whatever the norms, layouts and dtypes, and in any order."""
    table = {
        "a": (Auto(2.0), (3, 5)),
        "b": (Spectral(3.0, layout="oi"), (5, 3)),
        "c": (Auto(vector_radius=5.0), (5,)),
        "d": (Spectral(max=True), (4, 4)),
        "e": (Spectral(orthogonalizer=ExactPolar()), (3, 5)),
        "f": (SpectralConv(), (2, 2, 3, 5)),
        "g": (Sign(layout="oi"), (3, 5)),
        "h": (Sign(2.0), (3, 5)),
        "i": (Sign(layout="oi"), (3, 5)),
        "j": (EntrySum(3.0, layout="bio"), (2, 3, 5)),
        "k": (EntrySum(3.0, layout="bio"), (2, 3, 5)),
        "l": (BiasRMS(layout="o[5]"), (5,)),
        "m": (BiasRMS(), (5,)),
        "n": (BiasRMS(), (5,)),
        "o": (scion_jax.ColNorm(), (3, 5)),
        "p": (scion_jax.ColNorm(layout="i[2,1]o"), (3, 5)),
    }
    norms = {name: norm for name, (norm, _) in table.items()}
    ds = {
        n: jnp.asarray(gaussian(s, i), jnp.float32) for i, (n, (_, s)) in enumerate(table.items())
    }
    ds["n"] = ds["n"].astype(jnp.bfloat16)
    lmo = scale_by_lmo(norms, {name: name for name in norms})
    together, _ = lmo.update(ds, lmo.init(ds), ds)
    backwards = {name: f"{25 - ord(name) + ord('a')}" for name in norms}
    other = scale_by_lmo({label: norms[n] for n, label in backwards.items()}, backwards)
    again, _ = other.update(ds, other.init(ds), ds)
    for name, d in ds.items():
        alone = np.asarray(norms[name].lmo(d), np.float32)
        np.testing.assert_allclose(np.asarray(together[name], np.float32), alone, atol=1e-5)
        np.testing.assert_allclose(np.asarray(again[name], np.float32), alone, atol=1e-5)
