"""What the papers prove, on small problems with exact gradients: bounds, descent, convergence."""

import functools
import math

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
    Sign,
    Spectral,
    clipped_scion,
    frank_wolfe_gap,
    gauges,
    scion,
    unconstrained_clipped_scion,
    unconstrained_scion,
)

pytestmark = pytest.mark.unoptimized

SHAPES = {"embedding": (3, 2), "hidden": (3, 4), "head": (2, 3), "bias": (4,)}
LABELS = {name: name for name in SHAPES}
NORMS = {
    "embedding": ColNorm(radius=2.0),
    "hidden": Spectral(radius=3.0, orthogonalizer=ExactPolar()),
    "head": Sign(radius=4.0),
    "bias": BiasRMS(radius=0.5),
}
PRODUCT = (NORMS, LABELS)  # ‖x‖ = max_l gauge_l(x_l)


def gaussian(seed, shapes=SHAPES, leading=()):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(leading + s)) for name, s in shapes.items()}


def product_norm(x, norms=PRODUCT):
    return functools.reduce(jnp.maximum, jax.tree.leaves(gauges(x, *norms)))


def inner(x, y):
    return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def run(optimizer, params, gradient, observe, steps, noise=None):
    """Observes `(x_k, ∇f(x_k), update, state)` at every step; returns what was seen, stacked."""

    def step(carry, shift):
        params, state = carry
        slope = gradient(params)
        noisy = slope if shift is None else jax.tree.map(jnp.add, slope, shift)
        updates, state = optimizer.update(noisy, state, params)
        seen = observe(params, slope, updates, state)
        return (optax.apply_updates(params, updates), state), seen

    carry = params, optimizer.init(params)
    return jax.jit(lambda c, n: jax.lax.scan(step, c, n, length=steps)[1])(carry, noise)


def at_boundary(seed):
    """A point of gauge 1 in every leaf."""
    return {name: NORMS[name].lmo(d) for name, d in gaussian(seed).items()}


# Norm bounds.


def gauges_along(optimizer, start, steps=60, turns=True):
    """The product norm before every step, on gradients that never vanish but turn, or do not."""
    noise = jax.tree.map(lambda n: 3 * n, gaussian(1, leading=(steps,))) if turns else None
    slope = (lambda x: x) if turns else lambda _: jax.tree.map(jnp.negative, gaussian(0))
    return np.asarray(run(optimizer, start, slope, lambda x, *_: product_norm(x), steps, noise))


def test_scion_stays_in_its_ball(x64):
    """[S] Insight 3.1: Scion that starts in its ball keeps `‖x‖ ≤ 1`."""
    seen = gauges_along(scion(0.3, *PRODUCT), at_boundary(0))
    assert seen.max() <= 1 + 1e-12
    assert seen.max() >= 0.9  # the ball is used


def test_unconstrained_scion_grows_by_its_steps(x64):
    """[S] Insight 3.1: `‖x_k‖ ≤ ‖x_0‖ + Σ γ_i`, and equal if the gradient never turns."""

    def rates(count):
        return 0.3 / jnp.sqrt(jnp.asarray(count, float) + 1)

    steps = 40
    bound = 1 + np.cumsum(np.array([0.0, *(float(rates(k)) for k in range(steps - 1))]))
    start = at_boundary(0)
    optimizer = unconstrained_scion(rates, *PRODUCT)
    assert (gauges_along(optimizer, start, steps) <= bound * (1 + 1e-12)).all()
    outward = gauges_along(optimizer, start, steps, turns=False)
    np.testing.assert_allclose(outward, bound, rtol=1e-9)


@pytest.mark.parametrize("start", [1.0, 5.0])
def test_weight_decay_bounds_the_norm(x64, start):
    """[S] Insight 3.1: with weight decay `μ ≤ 1/γ`, `‖x_k‖ ≤ max(‖x_0‖, 1/μ)`; 1/μ is reached."""
    mu, steps = 0.5, 60
    optimizer = unconstrained_scion(0.3, *PRODUCT, weight_decay=mu)
    first = jax.tree.map(lambda x: start * x, at_boundary(0))
    assert gauges_along(optimizer, first).max() <= max(start, 1 / mu) * (1 + 1e-12)
    outward = gauges_along(optimizer, first, steps, turns=False)
    # The recursion of a gradient that never turns: ‖x_k‖ − 1/μ shrinks by 1 − γμ per step.
    exact = 1 / mu + (start - 1 / mu) * (1 - 0.3 * mu) ** np.arange(steps)
    np.testing.assert_allclose(outward, exact, rtol=1e-9)


# (L0, L1)-smoothness.


def cosh_of_leaves(slopes):
    """`f(x) = Σ_l cosh⟨a_l, x_l⟩`."""
    return lambda x: sum(jnp.cosh(jnp.sum(slopes[name] * x[name])) for name in slopes)


def cosh_of_entries(slopes):
    """`f(x) = Σ_i cosh(a_i x_i)`."""
    return lambda x: sum(jnp.sum(jnp.cosh(slopes[name] * x[name])) for name in slopes)


def generalized_smoothness(pieces):
    """L0 and L1 of `f(x) = Σ_j cosh t_j`, `t_j = ⟨a_j, x_j⟩` over disjoint parts `x_j` of `x`.

    Let `A_j` be the dual norm of `a_j`, radius included. The product norm's dual is a sum, so
    `‖∇f(x)‖_* = Σ_j A_j |sinh t_j|`. If `‖x − y‖ ≤ 1/L1` then `|t_j − s_j| ≤ A_j ‖x − y‖ ≤ 1`, and
    for `|u| ≤ 1`, as `sinh` and `cosh − 1` are convex on [0, 1] and vanish at 0,

        |sinh(t + u) − sinh t| ≤ |sinh t| (cosh u − 1) + cosh t · |sinh u|
                               ≤ |u| ((cosh 1 − 1) |sinh t| + sinh 1 · (1 + |sinh t|))
                               = |u| (sinh 1 + (e − 1) |sinh t|).

    Summed with weights `A_j`: `‖∇f(x) − ∇f(y)‖_* ≤ (L0 + L1 ‖∇f(x)‖_*) ‖x − y‖` with
    `L0 = sinh 1 · Σ A_j²` and `L1 = (e − 1) max_j A_j`.
    """
    pieces = np.asarray(pieces)
    return math.sinh(1) * np.sum(pieces**2), (math.e - 1) * np.max(pieces)


VECTOR = {"x": np.array([[0.8, -0.5, 0.3, 1.2]])}


def smooth_problem(kind):
    """Returns (norms, labels), f, a start, and the dual norms of the pieces."""
    slopes = {name: jnp.asarray(a, float) for name, a in VECTOR.items()}
    if kind == "euclidean":
        start = jax.tree.map(lambda a: 5 * a, slopes)
        norm = Euclidean(radius=2.0)
        return (norm,), cosh_of_leaves(slopes), start, [norm.dual_norm(slopes["x"])]
    if kind == "sign":  # the max norm is a product norm of its entries
        start = {"x": jnp.array([[6.0, 9.0, -20.0, 3.0]])}
        norm = Sign(radius=0.5, normalized=False)
        return (norm,), cosh_of_entries(slopes), start, 0.5 * np.abs(VECTOR["x"]).ravel()
    slopes = {name: 0.3 * a for name, a in gaussian(2).items()}
    start = {name: 6 * a / jnp.sum(a * a) for name, a in slopes.items()}
    pieces = [NORMS[name].dual_norm(a) for name, a in slopes.items()]
    return PRODUCT, cosh_of_leaves(slopes), start, pieces


@pytest.mark.parametrize("kind", ["euclidean", "sign", "product"])
def test_clipping_never_increases_a_generalized_smooth_function(x64, kind):
    """[C] Thm. 4.3: GGNC with α = 1 and `γ ≤ 1/(L0 + ρ L1)` decreases f at every step.

    Each step of length `τ = γ min(ρ, ‖∇f‖_*)` gains at least `τ ‖∇f‖_* / 2`. Without clipping, the
    same largest step γρ increases f again and again.
    """
    norms, f, start, pieces = smooth_problem(kind)
    smooth, generalized = generalized_smoothness(pieces)
    rho = 2 * smooth / generalized
    gamma = 1 / (smooth + rho * generalized)

    def observe(x, slope, updates, state):
        pairing = optax.tree.get(state, "pairing", default=jnp.zeros([]))
        return f(x), inner(slope, updates), pairing

    def values(build, **options):
        optimizer = build(gamma * rho, *norms, momentum=1.0, **options)
        return map(np.asarray, run(optimizer, start, jax.grad(f), observe, 600))

    value, slope, pairing = values(unconstrained_clipped_scion, rho=rho)
    change = np.diff(value)
    assert (change <= slope[:-1] / 2 + 1e-12 * value[:-1]).all()
    assert value[0] > 10 * value[-1]
    assert pairing[0] > rho > pairing[-1]  # both regimes are met
    assert value[-1] - len(pieces) < 1e-2  # the least value: every cosh is 1
    constant, *_ = values(unconstrained_scion)
    assert np.diff(constant).max() > 1e-3
    assert constant[-20:].min() > value[-1] + 1e-3


# The short step, and the Frank–Wolfe gap.


def maps(seed, rows=5):
    return {
        name: 0.3 * m
        for name, m in gaussian(seed, {n: (rows, *s) for n, s in SHAPES.items()}).items()
    }


def residual(x, linear, target):
    return sum(jnp.tensordot(linear[name], x[name], x[name].ndim) for name in x) - target


def smoothness(linear):
    """Bounds `L = max ‖Σ_l M_l x_l‖²` over `‖x_l‖ ≤ r_l`, for `f(x) = Σ φ(M x − b)`, `|φ''| ≤ 1`.

    `‖M_l x_l‖ ≤ σ_max(M_l) ‖x_l‖_F`, and no point of a ball is longer than a vertex, an LMO of a
    direction without zeros. `⟨∇²f(x) u, u⟩ = Σ φ'' (M u)² ≤ ‖M u‖² ≤ L ‖u‖²`.
    """
    largest = 0.0
    for name, matrix in linear.items():
        vertex = NORMS[name].lmo(gaussian(0)[name])
        flat = np.asarray(matrix).reshape(matrix.shape[0], -1)
        largest += np.linalg.norm(flat, 2) * float(jnp.linalg.norm(vertex))
    return largest**2


variants = pytest.mark.parametrize("short_step", [True, False], ids=["variant 1", "variant 2"])
CURVES = {"convex": lambda t: t * t / 2, "not convex": lambda t: 1 - jnp.cos(t)}


@variants
@pytest.mark.parametrize(
    ("curve", "largest_step"), [("convex", 1.0), ("not convex", 1.0), ("convex", 0.1)]
)
def test_clipped_scion_never_increases_a_smooth_function(x64, curve, short_step, largest_step):
    """[C] Thm. 4.7: with `γ ≤ 1/L` the short step decreases f at every step, and stays in the ball.

    The step is `x ← x − τ w` with `τ = min(γρ, γ⟨d,w⟩/‖w‖²)`, so `τ L ‖w‖² ≤ ⟨d,w⟩` and
    `f(x − τ w) ≤ f(x) − τ⟨d,w⟩ + L τ² ‖w‖²/2 ≤ f(x) − τ⟨d,w⟩/2`. A bound above `‖w‖` only shortens
    τ. Variant 2 puts the diameter there, `‖w‖ ≤ 2`; its ρ absorbs the square, so `ρ = 4 L γρ`.
    """
    linear = maps(3)
    target = 3 * jnp.asarray(np.random.default_rng(4).standard_normal(5))
    lipschitz = smoothness(linear)
    rho = largest_step * lipschitz * (1 if short_step else 4)
    optimizer = clipped_scion(largest_step, *PRODUCT, rho=rho, short_step=short_step, momentum=1.0)

    def f(x):
        return jnp.sum(CURVES[curve](residual(x, linear, target)))

    def observe(x, slope, updates, state):
        factor = optax.tree.get(state, "factor")
        return f(x), inner(slope, updates), product_norm(x), product_norm(updates), factor

    start = at_boundary(5)
    value, slope, size, step, factor = map(
        np.asarray, run(optimizer, start, jax.grad(f), observe, 60)
    )
    assert (np.diff(value) <= slope[:-1] / 2 + 1e-12).all()
    assert size.max() <= 1 + 1e-12
    assert value[-1] < value[0] - 0.1
    tau = largest_step * factor
    if short_step:  # the exact step, or at most 5 % above ‖w‖, so 10 % shorter
        exact = np.minimum(largest_step, -slope * tau / (lipschitz * step**2))
        assert (tau <= exact * (1 + 1e-9)).all()
        assert (tau >= 0.9 * exact).all()
    else:
        exact = largest_step * np.minimum(1, -slope / (tau * rho))
        np.testing.assert_allclose(tau, exact, rtol=1e-9)


@pytest.mark.parametrize(("gamma", "decreases"), [(1.0, True), (1.9, True), (2.1, False)])
def test_the_bound_on_the_short_step_is_sharp(x64, gamma, decreases):
    """`f(x) = ‖x − c‖²/2`, L = 1: below `γ = 2/L` every short step decreases f, above none does."""
    center = jnp.array([0.2, -0.1, 0.3])
    rho = 1.0 / gamma  # learning rate 1, which τ stays below
    optimizer = clipped_scion(1.0, Euclidean(), rho=rho, short_step=True, momentum=1.0)

    def f(x):
        return jnp.sum((x - center) ** 2) / 2

    def observe(x, slope, updates, state):
        return f(x), optax.tree.get(state, "factor")

    start = jnp.array([0.3, 0.1, 0.2])
    value, factor = map(np.asarray, run(optimizer, start, jax.grad(f), observe, 12))
    short = factor[:-1] < 1
    assert short.sum() >= 5
    assert ((np.diff(value) < 0) == decreases)[short].all()


BALLS = {
    "spectral": Spectral(radius=1.5, orthogonalizer=ExactPolar()),
    "sign": Sign(radius=3.0),
}


def least_squares(kind):
    """`‖x − c‖²/2` over a ball; the projection of c clips singular values, or entries."""
    norm = BALLS[kind]
    rng = np.random.default_rng(6)
    u, _, vt = np.linalg.svd(rng.standard_normal((4, 4)))
    if kind == "spectral":
        sigma = np.array([4.0, 2.0, 0.9, 0.3])
        target, solution = (u * sigma) @ vt, (u * np.minimum(sigma, 1.5)) @ vt
    else:
        target = 1.2 * u
        solution = np.clip(target, -3 / 4, 3 / 4)
    return norm, jnp.asarray(target), jnp.asarray(solution)


def converge(build, kind, steps, *arguments, **options):
    """Returns the gaps, f − f*, and the distances to the solution, along a run."""
    norm, target, solution = least_squares(kind)
    assert np.sum((target - solution) ** 2) > 0.1  # the ball matters

    def f(x):
        return jnp.sum((x - target) ** 2) / 2

    def observe(x, slope, updates, state):
        distance = jnp.linalg.norm(x - solution)
        return frank_wolfe_gap(x, slope, norm), f(x) - f(solution), distance

    optimizer = build(*arguments, norm, momentum=1.0, **options)
    seen = run(optimizer, jnp.zeros((4, 4)), jax.grad(f), observe, steps)
    gap, excess, distance = map(np.asarray, seen)
    assert (gap >= excess - 1e-12).all()  # f is convex
    assert (excess >= -1e-12).all()  # and x in the ball
    return gap, excess, distance


def curvature(kind):
    """L of `‖x − c‖²/2` in the norm: the squared length of a vertex."""
    norm, target, _ = least_squares(kind)
    return float(jnp.sum(norm.lmo(target) ** 2))


@pytest.mark.parametrize("kind", BALLS)
def test_the_gap_vanishes_with_vanishing_steps(x64, kind):
    """Jaggi 2013, Thm. 1 and 2 (cited in [S]): `γ_k = 2/(k + 2)` gives `f − f* ≤ 2C/(k + 2)`.

    Here `C ≤ 4L`, and the least gap of K steps is at most `27C/(4(K + 2))`.
    """
    steps = 400
    gap, excess, distance = converge(
        scion, kind, steps, lambda count: 2 / (jnp.asarray(count, float) + 2)
    )
    bound = 4 * curvature(kind)
    k = np.arange(1, steps)
    assert (excess[1:] <= 2 * bound / (k + 2)).all()
    assert (np.minimum.accumulate(gap)[1:] <= 27 / 4 * bound / (k + 2)).all()
    assert distance[-1] < 0.05


@pytest.mark.parametrize("kind", BALLS)
@variants
def test_the_gap_vanishes_with_constant_parameters(x64, kind, short_step):
    """[C] Thm. 4.7: ClippedScion converges without a schedule, where constant Scion does not."""
    steps, rate = 1500, 0.5
    bound = 4 * curvature(kind)
    rho = rate * curvature(kind) * (1 if short_step else 4)
    gap, excess, distance = converge(
        clipped_scion, kind, steps, rate, rho=rho, short_step=short_step
    )
    k = np.arange(steps)
    assert (excess <= 2 * bound / (k + 2)).all()
    assert np.min(gap) <= 27 / 4 * bound / (steps + 2)
    assert distance[-1] < 0.1
    constant_gap, constant_excess, _ = converge(scion, kind, steps, rate)
    assert np.mean(constant_gap[-50:]) > 5 * np.max(gap[-50:])
    assert np.mean(constant_excess[-50:]) > 5 * np.max(excess[-50:])


# Noise.


def test_vanishing_momentum_averages_the_noise_away(x64):
    """[S] Thm. 5.5: `α_k = 1/√k` with `γ_k ∝ k^(−3/4)` lets `‖d_k − ∇f(x_k)‖` go to zero.

    The noise is skewed, mean 0 and median −0.31 of its deviation, so with α = 1 the sign of a
    gradient has the wrong mean: the run settles where the medians vanish, 0.92 off per entry.
    """
    steps, size, deviation = 2000, 20, 3.0
    rng = np.random.default_rng(7)
    noise = {"x": jnp.asarray(deviation * (rng.exponential(size=(steps, 1, size)) - 1))}
    target = jnp.asarray(rng.standard_normal((1, size)))

    def f(x):
        return jnp.sum((x["x"] - target) ** 2) / 2

    def observe(x, slope, updates, state):
        average = optax.tree.get(state, "average")
        return f(x), jnp.linalg.norm(average["x"] - slope["x"])

    def rate(count):
        return 0.3 * (jnp.asarray(count, float) + 1) ** -0.75

    def values(momentum):
        optimizer = unconstrained_scion(rate, Sign(normalized=False), momentum=momentum)
        start = {"x": jnp.zeros((1, size))}
        return map(np.asarray, run(optimizer, start, jax.grad(f), observe, steps, noise))

    value, error = values(lambda count: (jnp.asarray(count, float) + 1) ** -0.5)
    plain, noisy = values(1.0)
    level = deviation * math.sqrt(size)  # of the noise: E ‖noise‖² = level²
    assert abs(noisy[-500:].mean() - level) < 0.1 * level
    # The average keeps about α/2 = 1/(2√k) of the variance, whose root falls as k^(−1/4).
    for first, last in [(20, 100), (100, 500), (500, 2000)]:
        window = np.arange(first, last)
        expected = level * np.mean(np.sqrt(1 / (2 * np.sqrt(window))))
        assert 0.7 * expected < error[first:last].mean() < 1.3 * expected
    biased = size * (deviation * (1 - math.log(2))) ** 2 / 2
    assert abs(plain[-1] - biased) < 0.3 * biased
    assert value[-1] < 0.1 * plain[-1]


# Parameters outside their balls.


@variants
def test_leaves_come_back_from_outside_the_ball(x64, short_step):
    """Gradients turn at random, and half of the time the pull towards zero climbs, and counts.

    (If the gradient never turns, a leaf comes no closer than its part along it.)
    """
    steps, outside = 300, ("embedding", "hidden")
    start = {name: (20.0 if name in outside else 0.5) * x for name, x in at_boundary(9).items()}
    optimizer = clipped_scion(0.1, *PRODUCT, rho=1.0, short_step=short_step, momentum=1.0)

    def observe(x, slope, updates, state):
        noisy = optax.tree.get(state, "average")
        pull = jax.tree.map(lambda d, x: jnp.sum(d * x), noisy, x)
        return pull, jax.tree.map(jnp.linalg.norm, updates), gauges(x, *PRODUCT)

    noise = gaussian(10, leading=(steps,))
    pull, length, size = jax.tree.map(
        np.asarray,
        run(optimizer, start, lambda x: jax.tree.map(jnp.zeros_like, x), observe, steps, noise),
    )
    for name in SHAPES:
        assert length[name].min() > 1e-3, name  # nothing stalls
        assert size[name][-1] <= (1.1 if name in outside else 1 + 1e-12), name
    for name in outside:
        assert (pull[name][:20] < 0).any()
        assert size[name].max() == size[name][0]
