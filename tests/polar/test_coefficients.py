"""Coefficients: their published values, their bounds, and where the default ones come from."""

import numpy as np
import pytest

from scion_jax import NewtonSchulz
from scion_jax.polar._coefficients import feasible, image, steps_of, with_safety

pytestmark = pytest.mark.fast

SIGMA = np.concatenate([[0.0], np.logspace(-6, 0, 200_001)])
QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (  # as published
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def compose(rows, sigma=SIGMA):
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def greedy_minimax(lowest, steps, safety):
    """Amsel et al., Algorithm 1: each step is the best quintic for what the last ones left.

    The best odd quintic on [l, u] errs by ±E at l, at two critical points, and at u; solving for
    those points in turn (Remez) converges in a few rounds.
    """
    low, high, rows = lowest, 1.0, []
    for step in range(steps):
        u = high * (safety if step < steps - 1 else 1.0)
        q, r = (3 * low + u) / 4, (low + 3 * u) / 4
        for _ in range(100):
            points = np.array([low, q, r, u])
            signs = np.array([1.0, -1.0, 1.0, -1.0])
            system = np.stack([points, points**3, points**5, signs], axis=1)
            a, b, c, error = np.linalg.solve(system, np.ones(4))
            q, r = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        rows.append((a, b, c))
        low, high = 1 - abs(error), 1 + abs(error)
    return rows


@pytest.mark.parametrize("coefficients", ["minimax", "polar_express"])
@pytest.mark.parametrize("steps", range(1, 10))
def test_named_sets_are_feasible_at_any_number_of_steps(coefficients, steps):
    values = compose(steps_of(coefficients, steps))
    assert 1 - 1e-4 <= values.max() <= 1 + 1e-12
    assert values.min() >= 0


def test_default_is_feasible_and_high():
    values = compose(steps_of(NewtonSchulz().coefficients, NewtonSchulz().steps))
    assert len(steps_of("minimax", None)) == 4
    assert values.max() <= 1 + 1e-12
    assert values[SIGMA >= 0.01].min() >= 0.969
    assert compose(steps_of("minimax", 8))[SIGMA >= 0.01].min() >= 1 - 1e-9  # more steps converge
    # Rounding in bfloat16 can lift a normalized singular value to about 1.01.
    assert compose(steps_of("minimax", None), np.linspace(1, 1.015, 1001)).max() <= 1 + 1e-12


def test_where_the_rows_come_from():
    expected = feasible(greedy_minimax(1e-2, 4, 1.02), 1 - 2**-15)
    np.testing.assert_allclose(steps_of("minimax", None), expected, rtol=1e-7)
    expected = feasible(with_safety(POLAR_EXPRESS, 1.01))
    np.testing.assert_allclose(steps_of("polar_express", None), expected)
    assert 1.1 < compose(POLAR_EXPRESS).max() < 1.15
    assert steps_of("quintic", None) == (QUINTIC,) * 5  # raw
    assert steps_of("quintic", 7) == (QUINTIC,) * 7
    assert compose(steps_of("quintic", 5)).max() == pytest.approx(1.202, abs=1e-3)


@pytest.mark.parametrize(
    "rows",
    [
        [QUINTIC] * 3,
        [(8.0, -24.0, 17.5), (1.5, -0.5, 0.0)],
        [(1.0, 0.0, 0.0)],
        [(-2.0, 1.0, 0.0), (0.5, 0.0, -3.0)],
    ],
)
def test_image_is_exact(rows):
    values = compose(rows)
    np.testing.assert_allclose(image(rows), (values.min(), values.max()), rtol=1e-6, atol=1e-9)
    assert np.abs(compose(feasible(rows))).max() <= 1 + 1e-12


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.4, 0.9), (0.2, 0.6), (-0.9, -0.1)])
@pytest.mark.parametrize("row", [QUINTIC, (-2.0, 1.0, 0.0), (1.0, -9.0, 9.0)])
def test_image_of_any_interval(row, low, high):
    values = compose([row], np.linspace(low, high, 200_001))
    np.testing.assert_allclose(image([row], low, high), (values.min(), values.max()), atol=1e-8)


def test_a_given_sequence():
    rows = [(2.0, -1.0, 0.0), (1.5, -0.5, 0.0)]
    assert steps_of(rows, None) == tuple(rows)
    assert steps_of(rows, 1) == (rows[0],)
    assert steps_of(rows, 4) == (rows[0], rows[1], rows[1], rows[1])
    assert NewtonSchulz(rows).steps is None
    assert hash(NewtonSchulz(rows)) == hash(NewtonSchulz(tuple(rows)))
    # Safety shrinks what every step but the last gets.
    rows = ((1.0, 1.0, 1.0), (2.0, 3.0, 5.0), (7.0, 8.0, 9.0))
    assert with_safety(rows, 2.0) == ((1 / 2, 1 / 8, 1 / 32), (1.0, 3 / 8, 5 / 32), rows[-1])
