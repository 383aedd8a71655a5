"""The compiled step: one iteration per distinct shape, however many layers there are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scion_jax
from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    NewtonSchulz,
    Norm,
    RowNorm,
    Sign,
    Spectral,
    orthogonalize,
    scion,
)

pytestmark = pytest.mark.fast

BLOCK = {"q": (16, 16), "o": (16, 16), "up": (16, 64), "down": (64, 16), "bias": (16,)}


def blocks(layers, block=BLOCK):
    """A stack of transformer-like blocks with two distinct matrix shapes, either way round."""
    return {
        f"layer{index}": {name: jnp.ones(shape) for name, shape in block.items()}
        for index in range(layers)
    }


def lowered(norms, params, labels=None):
    optimizer = scion(0.1, norms, labels)
    return jax.jit(optimizer.update).lower(params, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("dtype", "square", "rectangular"),
    [
        # X Xᵀ, four steps on it, and times X; square ones in a loop after the first step
        (jnp.float32, 3 + 3, 1 + (4 * 4 - 3) + 1),
        (jnp.bfloat16, 4 * 3, 4 * 3),  # one by one: matrices have few rows
    ],
)
def test_products_do_not_grow_with_depth(dtype, square, rectangular):
    norm, compiled = Auto(orthogonalizer=NewtonSchulz(compute_dtype=dtype)), set()
    for layers in (1, 8):
        step = lowered(norm, blocks(layers))
        products = step.as_text().count("stablehlo.dot_general")
        assert products == square + 2 * rectangular  # of wide and of tall matrices
        compiled.add(len(re.findall(r" dot\(", step.compile().as_text())))
    assert len(compiled) == 1


@dataclasses.dataclass(frozen=True)
class Orthogonal(Norm):
    """Somebody's own norm over the same iteration: half of the polar factor."""

    def polar_method(self):
        return NewtonSchulz()

    def from_polar(self, polar, axes):
        return axes.from_matrices(polar.astype(jnp.float32) / 2)

    def unit_lmo(self, d, axes):
        return axes.from_matrices(orthogonalize(axes.to_matrices(d)) / 2)

    def unit_gauge(self, x, axes):
        return 2 * jnp.linalg.norm(axes.to_matrices(x), 2, axis=(1, 2))

    def unit_dual_norm(self, d, axes):
        return jnp.linalg.norm(axes.to_matrices(d), "nuc", axis=(1, 2)) / 2

    def unit_init(self, key, axes):
        return jnp.zeros(axes.shape)


class Unfinished(Orthogonal):
    from_polar = Norm.from_polar


def test_an_own_norm_says_what_it_lacks():
    params = {"w": jnp.ones((4, 6))}
    optimizer = scion_jax.unconstrained_scion(0.1, Unfinished())
    with pytest.raises(TypeError, match=r"Unfinished has a polar_method, so it needs from_polar"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(TypeError, match=r"Orthogonal .* its gauge needs from_spectral_norm"):
        scion_jax.gauge_bounds(params, Orthogonal())


def test_an_own_norm_shares_the_iteration():
    """Its matrices are stacked with everybody's."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal((8, 12)), jnp.float32) for name in "pq"}
    norms, labels = {"own": Orthogonal(3.0), "theirs": Spectral()}, {"p": "own", "q": "theirs"}
    together = lowered(norms, params, labels).as_text().count("dot_general")
    assert together == lowered(Spectral(), {"p": params["p"]}).as_text().count("dot_general")
    optimizer = scion_jax.unconstrained_scion(1.0, norms, labels, momentum=1.0)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    for name, label in labels.items():
        np.testing.assert_allclose(updates[name], -norms[label].lmo(params[name]), atol=2e-2)


def count(jaxpr):
    """Counts equations, those inside of others too."""
    inner = (x for equation in jaxpr.eqns for x in jax.tree.leaves(list(equation.params.values())))
    jaxprs = (getattr(x, "jaxpr", x) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))
    return len(jaxpr.eqns) + sum(map(count, jaxprs))


LEAVES = {"scale": (16,), "bias": (64,), "table": (16, 8), "gate": (8, 16), "head": (8, 8)}
CLOSED = {
    "scale": BiasRMS(),
    "bias": BiasRMS(2.0),
    "table": ColNorm(),
    "gate": RowNorm(),
    "head": Sign(),
}


def test_the_graph_hardly_grows_with_depth():
    """Leaves of one shape and norm are computed together, vectors and closed forms as well."""
    norms = CLOSED | {"rest": Auto()}
    labels = scion_jax.label_by_path([*((f"{name}$", name) for name in CLOSED), ("", "rest")])

    def lmos(layers):
        params = blocks(layers, BLOCK | LEAVES)
        lmo = scion_jax.scale_by_lmo(norms, labels)
        return count(jax.make_jaxpr(lambda d: lmo.update(d, lmo.init(d), d))(params).jaxpr)

    few, many = lmos(12), lmos(48)
    assert many - few <= 36 * len(BLOCK | LEAVES) * 7  # what joins and splits, and casts


def test_nothing_is_padded_on_one_device():
    for layers in (1, 3):
        d = jnp.ones((layers, 16, 32))
        text = jax.jit(Spectral(layout="bio").lmo).lower(d).as_text()
        assert f"tensor<{layers}x16x32xf32>" in text
        assert f"tensor<{layers + 1}x" not in text


def test_long_stacks_go_through_a_loop():
    """Chunks bound temporary memory, and are traced once however many there are."""

    def plan(layers):
        step = lowered(Auto(), {str(index): jnp.ones((256, 256)) for index in range(layers)})
        memory = step.compile().memory_analysis()
        return step.as_text().count("stablehlo.dot_general"), memory.temp_size_in_bytes

    (products, temporaries), (same_products, more_temporaries) = plan(16), plan(48)
    assert products == same_products
    updates = (48 - 16) * 256 * 256 * 4
    assert more_temporaries - temporaries <= 2.6 * updates


def test_eager_calls_compile_nothing_again():
    events = []
    d = jnp.ones((5, 11))
    e = 2 * d

    def listen(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    Spectral().lmo(d)
    assert [event for event in events if "compile" in event]
    events.clear()
    Spectral(3.0).lmo(e)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in events if "compile" in event]
