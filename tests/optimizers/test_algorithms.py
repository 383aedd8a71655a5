"""Every algorithm against a naive float64 restatement, written from its formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scion_jax
from scion_jax import (
    ExactPolar,
    almond,
    clipped_scion,
    scion,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
)
from tests.support import naive

pytestmark = pytest.mark.unoptimized

STEPS = 20

# label: (norm, layout, radius, options, shape)
LAYERS = {
    "embedding": ("ColNorm", "io", 2.0, {}, (6, 4)),
    "hidden": ("Spectral", "io", 3.0, {}, (4, 6)),
    "pytorch": ("Spectral", "oi", 1.0, {"max": True}, (7, 5)),
    "stacked": ("Spectral", "bio", 1.5, {"normalized": False}, (2, 4, 3)),
    "conv": ("SpectralConv", "ssio", 8.0, {}, (3, 2, 2, 4)),
    "gate": ("RowNorm", "io", 0.5, {}, (4, 3)),
    "bias": ("BiasRMS", "o", 5.0, {}, (6,)),
    "rest": ("Euclidean", "o", 2.0, {}, (3,)),
    "head": ("Sign", "io", 30.0, {}, (4, 6)),
}
LABELS = {name: name for name in LAYERS}


def gamma(k):
    return 0.2 / (k + 2)


def alpha(k):
    return 1 / np.sqrt(k + 1)


def scheduled(function):
    """The same formula for a traced count."""
    return lambda count: jnp.asarray(np.array([function(k) for k in range(STEPS)]))[count]


def our_norms():
    norms = {}
    for label, (name, layout, radius, options, _) in LAYERS.items():
        exact = {"orthogonalizer": ExactPolar()} if name.startswith("Spectral") else {}
        norms[label] = getattr(scion_jax, name)(radius, layout=layout, **options, **exact)
    return norms


def lmo(d):
    return {
        label: naive.lmo(name, d[label], layout, radius, **options)
        for label, (name, layout, radius, options, _) in LAYERS.items()
    }


def combine(function, *trees):
    return {label: function(*(tree[label] for tree in trees)) for label in LAYERS}


def zeros():
    return {label: np.zeros(layer[-1]) for label, layer in LAYERS.items()}


def gaussian(seed):
    rng = np.random.default_rng(seed)
    return {label: rng.standard_normal(layer[-1]) for label, layer in LAYERS.items()}


def naive_scion(x, gradients):
    d = zeros()
    for k, g in enumerate(gradients):
        d = combine(lambda d, g, k=k: (1 - alpha(k)) * d + alpha(k) * g, d, g)
        x = combine(lambda x, v, k=k: (1 - gamma(k)) * x - gamma(k) * v, x, lmo(d))
        yield x


def naive_unconstrained_scion(x, gradients, weight_decay=0.0):
    d = zeros()
    for k, g in enumerate(gradients):
        d = combine(lambda d, g, k=k: (1 - alpha(k)) * d + alpha(k) * g, d, g)
        x = combine(lambda x, v, k=k: x - gamma(k) * (weight_decay * x + v), x, lmo(d))
        yield x


def pairing(d, w):
    return sum(float(np.sum(d[label] * w[label])) for label in LAYERS)


def norm(w):
    """The product norm, max_l ‖w_l‖_l / r_l."""
    return max(
        naive.gauge(name, w[label], layout, radius, **options)
        for label, (name, layout, radius, options, _) in LAYERS.items()
    )


def naive_clipped_scion(x, gradients, rho, short_step=False):
    d = zeros()
    for k, g in enumerate(gradients):
        d = combine(lambda d, g, k=k: (1 - alpha(k)) * d + alpha(k) * g, d, g)
        w = combine(lambda x, v: x + v, x, lmo(d))
        gap = pairing(d, w)
        assert all(np.sum(d[label] * w[label]) >= 0 for label in LAYERS)  # inside the ball
        factor = min(1, gap / (rho(k) * (norm(w) ** 2 if short_step else 1)))
        x = combine(lambda x, w, k=k, f=factor: x - gamma(k) * f * w, x, w)
        yield x


def naive_unconstrained_clipped_scion(x, gradients, rho):
    d = zeros()
    for k, g in enumerate(gradients):
        d = combine(lambda d, g, k=k: (1 - alpha(k)) * d + alpha(k) * g, d, g)
        v = lmo(d)
        factor = min(1, pairing(d, v) / rho(k))
        x = combine(lambda x, v, k=k, f=factor: x - gamma(k) * f * v, x, v)
        yield x


def naive_scion_light(x, gradients, unconstrained=False):
    total = zeros()
    for k, g in enumerate(gradients):
        total = combine(lambda total, g: total + g, total, g)
        pull = 0 if unconstrained else gamma(k)
        x = combine(lambda x, v, k=k, p=pull: (1 - p) * x - gamma(k) * v, x, lmo(total))
        total = combine(lambda total, k=k: (1 - alpha(k)) * total, total)
        yield x


def naive_almond(x, gradients):
    d = zeros()
    for k, g in enumerate(gradients):
        d = combine(lambda d, v, k=k: (1 - alpha(k)) * d + alpha(k) * v, d, lmo(g))
        x = combine(lambda x, d, k=k: x - gamma(k) * d, x, d)
        yield x


def rho(k):
    """Around what the gap is, so that some steps are clipped and some are not."""
    return 100.0 + 40 * k


def short_steps(rate, norms, labels, *, rho, momentum, short_step):
    """`clipped_scion(short_step=True)`, with exact norms in place of bounds, composed by hand."""

    def squared_norm(w):
        return jnp.max(jnp.stack([norms[label].gauge(w[label]) for label in LAYERS])) ** 2

    assert short_step
    lmo, decay = scion_jax.scale_by_lmo(norms, labels), scion_jax.decay_weights(1.0, norms, labels)
    return optax.chain(
        scion_jax.average_gradients(momentum),
        scion_jax.clip_by_pairing(optax.chain(lmo, decay), rho, squared_norm),
        optax.scale_by_learning_rate(rate),
    )


ALGORITHMS = {
    "scion": (scion, naive_scion, {}),
    "unconstrained_scion": (unconstrained_scion, naive_unconstrained_scion, {}),
    "unconstrained_scion with decay": (
        unconstrained_scion,
        naive_unconstrained_scion,
        {"weight_decay": 0.3},
    ),
    "clipped_scion": (clipped_scion, naive_clipped_scion, {"rho": rho}),
    "clipped_scion with short step": (
        short_steps,
        naive_clipped_scion,
        {"rho": lambda k: rho(k) / 3, "short_step": True},
    ),
    "unconstrained_clipped_scion": (
        unconstrained_clipped_scion,
        naive_unconstrained_clipped_scion,
        {"rho": rho},
    ),
    "scion_light": (scion_light, naive_scion_light, {}),
    "unconstrained scion_light": (scion_light, naive_scion_light, {"unconstrained": True}),
    "almond": (almond, naive_almond, {}),
}


def on_the_ball():
    """A start inside every ball."""
    x = lmo(gaussian(100))
    return combine(lambda x: 0.9 * x, x)


@pytest.mark.parametrize(("build", "restatement", "options"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_twenty_steps(x64, build, restatement, options):
    ours = {k: scheduled(v) if callable(v) else v for k, v in options.items()}
    optimizer = build(scheduled(gamma), our_norms(), LABELS, momentum=scheduled(alpha), **ours)
    gradients = [gaussian(seed) for seed in range(STEPS)]
    params = jax.tree.map(jnp.asarray, on_the_ball())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    factors = []
    for g, x in zip(gradients, restatement(on_the_ball(), gradients, **options), strict=True):
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
        factors += [float(f) for _, f in optax.tree.get_all_with_path(state, "factor")]
        chex.assert_trees_all_close(params, x, rtol=1e-9, atol=1e-9)
    if "rho" in options:
        assert any(f < 1 for f in factors)
        assert any(f == 1 for f in factors)


def test_short_step_by_its_own_bound(x64):
    """With the bound that users get: never longer than by exact norms, and hardly shorter."""
    optimizer = clipped_scion(0.1, our_norms(), LABELS, rho=1e3, short_step=True, momentum=1.0)
    params = jax.tree.map(jnp.asarray, on_the_ball())
    for seed in range(5):
        d = gaussian(seed)
        w = combine(lambda x, v: x + v, on_the_ball(), lmo(d))
        exact = pairing(d, w) / (1e3 * norm(w) ** 2)
        _, state = optimizer.update(jax.tree.map(jnp.asarray, d), optimizer.init(params), params)
        factor = float(optax.tree.get(state, "factor"))
        assert 0.98 * exact <= factor <= (1 + 1e-9) * exact
