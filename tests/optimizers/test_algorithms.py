"""Every algorithm against a naive float64 restatement, written from its formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scion_jax
from scion_jax import ExactPolar, clipped_scion, unconstrained_clipped_scion, unconstrained_scion
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


def rho(k):
    """So that some steps are clipped and some are not."""
    return 100.0 + 40 * k


def ahead(k):
    """Optimism, up to 1, where only the newest gradient counts."""
    return 1 - 0.1 * (k % 4) ** 2


def never(k):
    return 0.0


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


def norm(w, gauge=naive.gauge):
    """The product norm, max_l ‖w_l‖_l / r_l."""
    return max(
        gauge(name, w[label], layout, radius, **options)
        for label, (name, layout, radius, options, _) in LAYERS.items()
    )


def combine(function, *trees):
    return {label: function(*(tree[label] for tree in trees)) for label in LAYERS}


def pairing(d, w):
    return sum(float(np.sum(d[label] * w[label])) for label in LAYERS)


def gaussian(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {label: scale * rng.standard_normal(layer[-1]) for label, layer in LAYERS.items()}


def moved(k, x, w, factor=1.0):
    return combine(lambda x, w: x - gamma(k) * factor * w, x, w)


# The direction w of a step, and its factor, from count, parameters and averaged gradient.
def scion(k, x, d):
    return combine(np.add, x, lmo(d)), 1.0


def decayed(mu):
    return lambda k, x, d: (combine(lambda x, v: mu * x + v, x, lmo(d)), 1.0)


def clipped(k, x, d):
    w = combine(np.add, x, lmo(d))
    assert all(np.sum(d[label] * w[label]) >= 0 for label in LAYERS)  # inside the ball
    return w, min(1, pairing(d, w) / rho(k))


def short(k, x, d):
    w = combine(np.add, x, lmo(d))
    return w, min(1, pairing(d, w) / (rho(k) / 3 * norm(w, naive.gauge_bound) ** 2))


def unconstrained_clipped(k, x, d):
    v = lmo(d)
    return v, min(1, pairing(d, v) / rho(k))


def blend(old, new, weight):
    return combine(lambda old, new: (1 - weight) * old + weight * new, old, new)


def of_averages(rule, optimism=never):
    """An algorithm, from what it does with the averaged gradient."""

    def run(x, gradients):
        d = gaussian(0, 0.0)
        for k, g in enumerate(gradients):
            d = blend(d, g, alpha(k))
            x = moved(k, x, *rule(k, x, blend(d, g, optimism(k))))
            yield x

    return run


def light(rule, optimism=never, every_k=1):
    def run(x, gradients):
        total = gaussian(0, 0.0)
        for call, g in enumerate(gradients):
            total = combine(np.add, total, g)
            if (call + 1) % every_k == 0:
                k = call // every_k
                d = combine(lambda total, k=k: alpha(k) * total / every_k, total)
                x = moved(k, x, *rule(k, x, blend(d, g, optimism(k))))
                total = combine(lambda total, k=k: (1 - alpha(k)) * total, total)
            yield x

    return run


def almond(x, gradients):
    d = gaussian(0, 0.0)
    for k, g in enumerate(gradients):
        d = combine(lambda d, v, k=k: (1 - alpha(k)) * d + alpha(k) * v, d, lmo(g))
        x = moved(k, x, d)
        yield x


RHO = {"rho": scheduled(rho)}
SHORT = {"rho": scheduled(lambda k: rho(k) / 3), "short_step": True}
FREE = {"unconstrained": True}
AHEAD = {"optimism": scheduled(ahead)}
ALGORITHMS = {
    "scion": (scion_jax.scion, {}, of_averages(scion)),
    "unconstrained_scion": (unconstrained_scion, {}, of_averages(decayed(0))),
    "with decay": (unconstrained_scion, {"weight_decay": 0.3}, of_averages(decayed(0.3))),
    "clipped_scion": (clipped_scion, RHO, of_averages(clipped)),
    "clipped_scion with short step": (clipped_scion, SHORT, of_averages(short)),
    "unconstrained_clipped": (unconstrained_clipped_scion, RHO, of_averages(unconstrained_clipped)),
    "scion_light": (scion_jax.scion_light, {}, light(scion)),
    "unconstrained scion_light": (scion_jax.scion_light, FREE, light(decayed(0))),
    "almond": (scion_jax.almond, {}, almond),
    "optimistic scion": (scion_jax.scion, AHEAD, of_averages(scion, ahead)),
    "optimistic unconstrained_scion": (
        unconstrained_scion,
        {"optimism": 0.3},
        of_averages(decayed(0), lambda k: 0.3),
    ),
    "optimistic clipped_scion": (clipped_scion, RHO | AHEAD, of_averages(clipped, ahead)),
    "optimistic clipped_scion with short step": (
        clipped_scion,
        SHORT | AHEAD,
        of_averages(short, ahead),
    ),
    "optimistic unconstrained_clipped": (
        unconstrained_clipped_scion,
        RHO | AHEAD,
        of_averages(unconstrained_clipped, ahead),
    ),
    "optimistic scion_light": (scion_jax.scion_light, AHEAD, light(scion, ahead)),
    "optimistic scion_light every 3": (
        scion_jax.scion_light,
        {**AHEAD, **FREE, "every_k": 3},
        light(decayed(0), ahead, 3),
    ),
}


def on_the_ball():
    """A start inside every ball."""
    return combine(lambda x: 0.9 * x, lmo(gaussian(100)))


@pytest.mark.parametrize(("build", "options", "restatement"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_twenty_steps(x64, build, options, restatement):
    optimizer = build(scheduled(gamma), our_norms(), LABELS, momentum=scheduled(alpha), **options)
    gradients = [gaussian(seed) for seed in range(STEPS)]
    params = jax.tree.map(jnp.asarray, on_the_ball())
    state, update, factors = optimizer.init(params), jax.jit(optimizer.update), []
    for g, x in zip(gradients, restatement(on_the_ball(), gradients), strict=True):
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
        factors += [float(f) for _, f in optax.tree.get_all_with_path(state, "factor")]
        chex.assert_trees_all_close(params, x, rtol=1e-9, atol=1e-9)
    if "rho" in options:
        assert min(factors) < 1 == max(factors)


def test_short_step_by_its_own_bound(x64):
    """With the bound that users get: never longer than by exact norms, and hardly shorter."""
    options = {"rho": 1e3, "short_step": True, "momentum": 1.0}
    optimizer = clipped_scion(0.1, our_norms(), LABELS, **options)
    params, update = jax.tree.map(jnp.asarray, on_the_ball()), jax.jit(optimizer.update)
    for seed in range(5):
        d = gaussian(seed)
        w = combine(np.add, on_the_ball(), lmo(d))
        exact = pairing(d, w) / (1e3 * norm(w) ** 2)
        _, state = update(jax.tree.map(jnp.asarray, d), optimizer.init(params), params)
        assert 0.98 * exact <= float(optax.tree.get(state, "factor")) <= (1 + 1e-9) * exact
