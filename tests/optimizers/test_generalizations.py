"""What the optimizers generalize, against Optax, and the limits in which they become each other."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    BiasRMS,
    ColNorm,
    Euclidean,
    ExactPolar,
    NewtonSchulz,
    Sign,
    Spectral,
    almond,
    clipped_scion,
    scion,
    unconstrained_clipped_scion,
    unconstrained_scion,
)
from tests.support import naive

pytestmark = pytest.mark.unoptimized

STEPS = 12
SHAPES = {"embedding": (5, 3), "hidden": (3, 4), "head": (4, 5), "bias": (4,)}
LABELS = {"embedding": "first", "hidden": "inner", "head": "last", "bias": "vector"}
# label: (norm, radius)
NORMS = {
    "first": ("ColNorm", 2.0),
    "inner": ("Spectral", 3.0),
    "last": ("Sign", 7.0),
    "vector": ("BiasRMS", 0.5),
}


def mixed_norms(divisor=1.0):
    """One norm per kind of layer; all radii divided by a number."""
    build = {
        "ColNorm": ColNorm,
        "Spectral": lambda radius: Spectral(radius, orthogonalizer=ExactPolar()),
        "Sign": Sign,
        "BiasRMS": BiasRMS,
    }
    return {label: build[name](radius / divisor) for label, (name, radius) in NORMS.items()}


def gaussian(seed, shapes=SHAPES, count=None):
    rng = np.random.default_rng(seed)
    leading = () if count is None else (count,)
    return {name: jnp.asarray(rng.standard_normal(leading + s)) for name, s in shapes.items()}


def run(optimizer, shapes=SHAPES, start=1.0, after_step=lambda params: params):
    """Returns the parameters after every step, on gradients of a fixed seed."""

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        params = after_step(optax.apply_updates(params, updates))
        return (params, state), params

    params = after_step(jax.tree.map(lambda x: start * x, gaussian(0, shapes)))
    carry = params, optimizer.init(params)
    gradients = gaussian(1, shapes, STEPS)
    return jax.jit(lambda *arguments: jax.lax.scan(step, *arguments)[1])(carry, gradients)


def assert_same(one, other, tolerance=1e-9):
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_sign_descent(x64):
    """`Sign` on everything, without momentum: SignSGD ([S] Sec. 2, Bernstein et al. 2018)."""
    ours = unconstrained_scion(0.1, Sign(normalized=False), momentum=1.0)
    assert_same(run(ours), run(optax.sign_sgd(0.1)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_signum(x64, weight_decay):
    """`Sign` with momentum α: Signum, which is Lion with `b1 = b2 = 1 − α` ([S] Sec. 2)."""
    ours = unconstrained_scion(0.1, Sign(normalized=False), momentum=0.2, weight_decay=weight_decay)
    assert_same(run(ours), run(optax.lion(0.1, b1=0.8, b2=0.8, weight_decay=weight_decay)))


def test_normalized_gradient_descent_with_momentum(x64):
    """`Euclidean`, one leaf: normalized SGD with momentum ([S] Sec. 2, Cutkosky and Mehta 2020)."""
    shapes = {"w": (3, 4)}
    theirs = optax.chain(
        optax.ema(0.8, debias=False), optax.normalize_by_update_norm(eps=0.0), optax.sgd(0.2)
    )
    ours = unconstrained_scion(0.1, Euclidean(radius=2.0), momentum=0.2)
    assert_same(run(ours, shapes), run(theirs, shapes))


def test_gradient_norm_clipping(x64):
    """GGNC with one Euclidean leaf: SGD with clipped gradients ([C] Sec. 3, Alg. 1)."""
    shapes, gamma, rho = {"w": (3, 4)}, 0.1, 3.5
    lengths = np.linalg.norm(gaussian(1, shapes, STEPS)["w"], axis=(1, 2))
    assert lengths.min() < rho < lengths.max()  # some steps are clipped, some are not
    ours = unconstrained_clipped_scion(gamma * rho, Euclidean(), rho=rho, momentum=1.0)
    theirs = optax.chain(optax.clip_by_global_norm(rho), optax.sgd(gamma))
    assert_same(run(ours, shapes), run(theirs, shapes))


MUON_SHAPES = {"wide": (3, 6), "tall": (6, 3), "square": (4, 4)}


def muon(**options):
    """Optax's Muon as published, but for its eps, which breaks scale invariance."""
    return optax.contrib.muon(0.1, beta=0.8, weight_decay=0.3, nesterov=False, eps=0.0, **options)


NEWER = pytest.mark.skipif(
    "consistent_rms" not in inspect.signature(optax.contrib.muon).parameters,
    reason="Optax 0.2.6 has no consistent_rms",
)


@pytest.mark.parametrize(
    ("maximum", "consistent_rms"),
    [(True, None), (False, None), pytest.param(False, 0.2, marks=NEWER)],
)
def test_muon(x64, maximum, consistent_rms):
    """Muon without Nesterov is `Spectral` with quintic steps, up to one factor per shape.

    Factor of the polar factor: `max(1, √(d_out/d_in))` in Muon and in `Spectral(max=True)`,
    `√(d_out/d_in)` in `Spectral()`; `consistent_rms · √max(d_in, d_out)` in Muon with that option.
    Muon debiases its average, which the LMO does not see. ([S] Sec. 2, Jordan et al. 2024.)
    """

    def correction(shape):
        fan_in, fan_out = shape
        ours = np.sqrt(fan_out / fan_in)
        if maximum:
            ours = max(1.0, ours)
        if consistent_rms is None:
            return max(1.0, np.sqrt(fan_out / fan_in)) / ours
        return consistent_rms * np.sqrt(max(fan_in, fan_out)) / ours

    quintic = NewtonSchulz("quintic", 5)
    norms = {
        name: Spectral(float(correction(shape)), max=maximum, orthogonalizer=quintic)
        for name, shape in MUON_SHAPES.items()
    }
    if maximum:
        assert {norm.radius for norm in norms.values()} == {1.0}  # no factor is left
    ours = unconstrained_scion(
        0.1, norms, {name: name for name in norms}, momentum=0.2, weight_decay=0.3
    )
    with jax.numpy_dtype_promotion("standard"):
        options = {} if consistent_rms is None else {"consistent_rms": consistent_rms}
        theirs = run(muon(**options), MUON_SHAPES)
    assert_same(run(ours, MUON_SHAPES), theirs)


LENGTHS = {"embedding": 1.0, "hidden": 2.0, "head": 3.0, "bias": 4.0}


def on_spheres(params):
    """Puts every leaf back to its own length."""
    return {name: LENGTHS[name] * x / jnp.linalg.norm(x) for name, x in params.items()}


@pytest.mark.parametrize("momentum", [1.0, 0.2])
def test_layerwise_normalization(x64, momentum):
    """`Euclidean` with `radius = coefficient · ‖x_l‖`: LARS, as long as `‖x_l‖` stays put.

    LARS averages after it has normalized, so with momentum it is ALMOND; its buffer is a sum, not
    an average, hence `learning_rate / α`. ([S] Alg. 1 and 4, You et al. 2017.)
    """
    norms = {name: Euclidean(radius=0.1 * length) for name, length in LENGTHS.items()}
    labels = {name: name for name in SHAPES}
    theirs = run(
        optax.lars(0.5, trust_coefficient=0.1, momentum=1.0 - momentum), after_step=on_spheres
    )
    averaged = almond(0.5 / momentum, norms, labels, momentum=momentum)
    assert_same(run(averaged, after_step=on_spheres), theirs)
    if momentum == 1.0:
        plain = unconstrained_scion(0.5, norms, labels, momentum=1.0)
        assert_same(run(plain, after_step=on_spheres), theirs)


TINY = 1e-30
HUGE = 1e12


def test_clipped_scion_without_clipping_is_scion(x64):
    """ρ → 0 in either variant of ClippedScion: Scion with the same learning rate ([C] Alg. 4).

    Started inside the balls (at their centres): outside of them it never steps uphill, Scion does.
    """
    expected = run(scion(0.1, mixed_norms(), LABELS, momentum=0.3), start=0.0)
    for short_step in (False, True):
        clipped = clipped_scion(
            0.1, mixed_norms(), LABELS, rho=TINY, momentum=0.3, short_step=short_step
        )
        assert_same(run(clipped, start=0.0), expected)


def test_unconstrained_clipped_scion_without_clipping_is_unconstrained_scion(x64):
    """ρ → 0 in GGNC: unconstrained Scion with the same learning rate ([C] Alg. 3)."""
    options = {"norms": mixed_norms(), "param_labels": LABELS, "momentum": 0.3}
    clipped = unconstrained_clipped_scion(0.1, rho=TINY, **options)
    assert_same(run(clipped), run(unconstrained_scion(0.1, **options)))


def test_unconstrained_clipped_scion_always_clipping_is_steepest_descent(x64):
    """ρ → ∞ in GGNC: `x ← x − γ ‖d‖_* v`, the sharp operator of the product norm ([C] Sec. 2)."""
    gamma, alpha = 0.01, 0.3
    ours = run(
        unconstrained_clipped_scion(gamma * HUGE, mixed_norms(), LABELS, rho=HUGE, momentum=alpha)
    )
    x = {name: np.array(leaf) for name, leaf in gaussian(0).items()}
    gradients = gaussian(1, count=STEPS)
    d = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for k in range(STEPS):
        v, length = {}, 0.0
        for name in SHAPES:
            d[name] = (1 - alpha) * d[name] + alpha * np.array(gradients[name][k])
            norm, radius = NORMS[LABELS[name]]
            layout = "io" if d[name].ndim == 2 else "o"
            v[name] = naive.lmo(norm, d[name], layout, radius)
            length += naive.dual_norm(norm, d[name], layout, radius)
        x = {name: x[name] - gamma * length * v[name] for name in SHAPES}
        assert_same({name: leaf[k] for name, leaf in ours.items()}, x)


def test_weight_decay_of_one_is_scion(x64):
    """μ = 1: unconstrained Scion with weight decay is Scion ([S] Sec. 3)."""
    options = {"norms": mixed_norms(), "param_labels": LABELS, "momentum": 0.3}
    decayed = unconstrained_scion(0.1, weight_decay=1.0, **options)
    assert_same(run(decayed), run(scion(0.1, **options)))


@pytest.mark.parametrize("mu", [0.25, 0.7])
def test_weight_decay_is_scion_in_a_larger_ball(x64, mu):
    """μ in (0, 1): Scion with radius `r/μ` and learning rate `γμ` ([S] Sec. 3)."""
    decayed = unconstrained_scion(0.1, mixed_norms(), LABELS, momentum=0.3, weight_decay=mu)
    larger = scion(0.1 * mu, mixed_norms(divisor=mu), LABELS, momentum=0.3)
    assert_same(run(decayed), run(larger))
