"""What the optimizers generalize, against Optax, and the limits in which they become each other."""

import inspect

import chex
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
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
)
from tests.support import naive

pytestmark = pytest.mark.unoptimized

STEPS = 12
SHAPES = {"embedding": (5, 3), "hidden": (3, 4), "head": (4, 5), "bias": (4,)}
ONE, MUON = {"w": (3, 4)}, {"wide": (3, 6), "tall": (6, 3), "square": (4, 4)}
LABELS = {name: name for name in SHAPES}
RADII = {"embedding": 2.0, "hidden": 3.0, "head": 7.0, "bias": 0.5}
KINDS = {"embedding": ColNorm, "hidden": Spectral, "head": Sign, "bias": BiasRMS}


def mixed(divisor=1.0):
    """One norm per kind of layer; all radii divided by a number."""
    exact = {"hidden": {"orthogonalizer": ExactPolar()}}
    return {n: KINDS[n](RADII[n] / divisor, **exact.get(n, {})) for n in KINDS}


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
    with jax.numpy_dtype_promotion("standard"):  # Optax's Muon needs it
        return jax.jit(lambda *args: jax.lax.scan(step, *args)[1])(
            carry, gaussian(1, shapes, STEPS)
        )


def muon(**options):
    """Optax's Muon as published, but for its eps, which breaks scale invariance."""
    return optax.contrib.muon(0.1, beta=0.8, weight_decay=0.3, nesterov=False, eps=0.0, **options)


def like_muon(maximum, consistent_rms=None):
    """Muon without Nesterov is `Spectral` with quintic steps, up to one factor per shape.

    Factor of the polar factor: `max(1, √(d_out/d_in))` in Muon and in `Spectral(max=True)`,
    `√(d_out/d_in)` in `Spectral()`; `consistent_rms · √max(d_in, d_out)` in Muon with that option.
    Muon debiases its average, which the LMO does not see. ([S] Sec. 2, Jordan et al. 2024.)
    """
    norms = {}
    for name, (d_in, d_out) in MUON.items():
        root, theirs = np.sqrt(d_out / d_in), max(1.0, np.sqrt(d_out / d_in))
        if consistent_rms is not None:
            theirs = consistent_rms * np.sqrt(max(d_in, d_out))
        radius = float(theirs / (max(1.0, root) if maximum else root))
        assert not maximum or radius == 1.0  # no factor is left
        quintic = NewtonSchulz("quintic", 5)
        norms[name] = Spectral(radius, max=maximum, orthogonalizer=quintic)
    return unconstrained_scion(0.1, norms, {n: n for n in norms}, momentum=0.2, weight_decay=0.3)


SIGN = Sign(normalized=False)
NEWER = pytest.mark.skipif(
    "consistent_rms" not in inspect.signature(optax.contrib.muon).parameters,
    reason="Optax 0.2.6 has no consistent_rms",
)
# ours, Optax's, shapes
OPTAX = {
    # `Sign` on everything, without momentum ([S] Sec. 2, Bernstein et al. 2018).
    "sign descent": lambda: (
        unconstrained_scion(0.1, SIGN, momentum=1.0),
        optax.sign_sgd(0.1),
        SHAPES,
    ),
    # `Sign` with momentum α: Signum, which is Lion with `b1 = b2 = 1 − α` ([S] Sec. 2).
    **{
        f"signum, weight decay {decay}": lambda decay=decay: (
            unconstrained_scion(0.1, SIGN, momentum=0.2, weight_decay=decay),
            optax.lion(0.1, b1=0.8, b2=0.8, weight_decay=decay),
            SHAPES,
        )
        for decay in (0.0, 0.3)
    },
    # Lion itself looks ahead: `b1 = (1 − ᾱ) b2` (arXiv:2605.11172).
    "lion": lambda: (
        unconstrained_scion(0.1, SIGN, momentum=0.2, optimism=0.25, weight_decay=0.3),
        optax.lion(0.1, b1=0.6, b2=0.8, weight_decay=0.3),
        SHAPES,
    ),
    # Nesterov's momentum is optimism α; only the direction counts.
    "normalized gradient descent with Nesterov's momentum": lambda: (
        unconstrained_scion(0.1, Euclidean(), momentum=0.2, optimism=0.2),
        optax.chain(
            optax.trace(0.8, nesterov=True), optax.normalize_by_update_norm(eps=0.0), optax.sgd(0.1)
        ),
        ONE,
    ),
    # `Euclidean`, one leaf ([S] Sec. 2, Cutkosky and Mehta 2020).
    "normalized gradient descent with momentum": lambda: (
        unconstrained_scion(0.1, Euclidean(radius=2.0), momentum=0.2),
        optax.chain(
            optax.ema(0.8, debias=False), optax.normalize_by_update_norm(eps=0.0), optax.sgd(0.2)
        ),
        ONE,
    ),
    # GGNC with one Euclidean leaf ([C] Sec. 3, Alg. 1); some steps are clipped, some are not.
    "gradient norm clipping": lambda: (
        unconstrained_clipped_scion(0.1 * 3.5, Euclidean(), rho=3.5, momentum=1.0),
        optax.chain(optax.clip_by_global_norm(3.5), optax.sgd(0.1)),
        ONE,
    ),
    "muon": lambda: (like_muon(True), muon(), MUON),
    "muon by Spectral without max": lambda: (like_muon(False), muon(), MUON),
    "muon with consistent_rms": lambda: (like_muon(False, 0.2), muon(consistent_rms=0.2), MUON),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=NEWER if "consistent" in n else ()) for n in OPTAX]
)
def test_as_in_optax(x64, name):
    ours, theirs, shapes = OPTAX[name]()
    chex.assert_trees_all_close(run(ours, shapes), run(theirs, shapes), rtol=1e-9, atol=1e-9)


def test_some_steps_were_clipped():
    lengths = np.linalg.norm(gaussian(1, ONE, STEPS)["w"], axis=(1, 2))
    assert lengths.min() < 3.5 < lengths.max()


LENGTHS = {"embedding": 1.0, "hidden": 2.0, "head": 3.0, "bias": 4.0}


@pytest.mark.parametrize("momentum", [1.0, 0.2])
def test_layerwise_normalization(x64, momentum):
    """`Euclidean` with `radius = coefficient · ‖x_l‖`: LARS, as long as `‖x_l‖` stays put.

    LARS averages after it has normalized, so with momentum it is ALMOND; its buffer is a sum, not
    an average, hence `learning_rate / α`. ([S] Alg. 1 and 4, You et al. 2017.)
    """

    def on_spheres(params):
        return {name: LENGTHS[name] * x / jnp.linalg.norm(x) for name, x in params.items()}

    norms = {name: Euclidean(radius=0.1 * length) for name, length in LENGTHS.items()}
    lars = optax.lars(0.5, trust_coefficient=0.1, momentum=1.0 - momentum)
    theirs = run(lars, after_step=on_spheres)
    ours = [almond(0.5 / momentum, norms, LABELS, momentum=momentum)]
    if momentum == 1.0:
        ours.append(unconstrained_scion(0.5, norms, LABELS, momentum=1.0))
    for optimizer in ours:
        found = run(optimizer, after_step=on_spheres)
        chex.assert_trees_all_close(found, theirs, rtol=1e-9, atol=1e-9)


OPTIONS = {"norms": mixed(), "param_labels": LABELS, "momentum": 0.3}
LIMITS = {
    # ρ → 0 in either variant of ClippedScion: Scion with the same learning rate ([C] Alg. 4);
    # started at the centres, inside of the balls.
    **{
        f"clipped_scion, {'short step, ' * short}rho {rho}": (
            clipped_scion(0.1, rho=rho, short_step=short, **OPTIONS),
            scion(0.1, **OPTIONS),
            0.0,
        )
        for short, rho in ((False, 1e-30), (True, 1e-30), (False, 0.0), (True, 0.0))
    },
    # Looking all the way ahead: no momentum.
    "optimism 1": (
        unconstrained_scion(0.1, optimism=1.0, **OPTIONS),
        unconstrained_scion(0.1, **{**OPTIONS, "momentum": 1.0}),
        1.0,
    ),
    # A constant α: `αG` is the average, ahead as well.
    "optimistic scion_light": (
        scion_light(0.1, optimism=0.4, **OPTIONS),
        scion(0.1, optimism=0.4, **OPTIONS),
        1.0,
    ),
    # ρ → 0 in GGNC: unconstrained Scion with the same learning rate ([C] Alg. 3).
    **{
        f"unconstrained_clipped_scion, rho {rho}": (
            unconstrained_clipped_scion(0.1, rho=rho, **OPTIONS),
            unconstrained_scion(0.1, **OPTIONS),
            1.0,
        )
        for rho in (1e-30, 0.0)
    },
    # μ = 1 is Scion; μ in (0, 1) is Scion with radius `r/μ` and learning rate `γμ` ([S] Sec. 3).
    **{
        f"weight decay {mu}": (
            unconstrained_scion(0.1, weight_decay=mu, **OPTIONS),
            scion(0.1 * mu, **{**OPTIONS, "norms": mixed(divisor=mu)}),
            1.0,
        )
        for mu in (1.0, 0.7, 0.25)
    },
}


@pytest.mark.parametrize(("one", "other", "start"), LIMITS.values(), ids=LIMITS)
def test_limits(x64, one, other, start):
    found, expected = run(one, start=start), run(other, start=start)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)


def test_unconstrained_clipped_scion_always_clipping_is_steepest_descent(x64):
    """ρ → ∞ in GGNC: `x ← x − γ ‖d‖_* v`, the sharp operator of the product norm ([C] Sec. 2)."""
    gamma, rho = 0.01, 1e12
    ours = run(unconstrained_clipped_scion(gamma * rho, rho=rho, **OPTIONS))
    x, gradients = jax.tree.map(np.array, gaussian(0)), gaussian(1, count=STEPS)
    d = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for k in range(STEPS):
        v, length = {}, 0.0
        for name, kind in KINDS.items():
            d[name] = 0.7 * d[name] + 0.3 * np.array(gradients[name][k])
            of = kind.__name__, d[name], "io" if d[name].ndim == 2 else "o", RADII[name]
            v[name], length = naive.lmo(*of), length + naive.dual_norm(*of)
        x = {name: x[name] - gamma * length * v[name] for name in SHAPES}
        at_k = {name: leaf[k] for name, leaf in ours.items()}
        chex.assert_trees_all_close(at_k, x, rtol=1e-9, atol=1e-9)
