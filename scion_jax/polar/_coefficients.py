"""Coefficients of the Newton–Schulz iteration, and what they guarantee.

One step maps every singular value by the odd quintic `p(σ) = aσ + bσ³ + cσ⁵`; a set is a sequence
of steps. The input is divided by a norm that bounds its singular values, so they start in [0, 1],
and all that matters about a set is its composition on that interval: how high it rises (above 1 the
result leaves the norm ball, and a constrained iterate with it) and how low it dips (below 1 the
direction is worth less). `image` computes both bounds exactly.

`minimax`, the default, was found by the greedy construction of Polar Express (Amsel et al.,
arXiv:2505.16932, Algorithm 1): step by step, the quintic closest to 1 on the interval that the
steps before have left. The published set is made for σ ≥ 1e-3; once divided by its supremum, its
five steps dip to 0.78. Made for σ ≥ 1e-2 instead, four steps dip to 0.969 only, for a fifth less
work. It is also kinder to bfloat16: the first quintic then presses large σ down to 0.08 and not to
0.008, where rounding would wipe them out. The price is a smaller slope at 0, p(0.001) = 0.15 in
place of 0.76. Most of that comes back by dividing the matrix by its Schatten-4 norm instead of its
Frobenius norm (see `_newton_schulz`), which is several times smaller unless few σ dominate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scion_jax._checks import check_number

Step = tuple[float, float, float]

# K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; five such
# steps are what the published Scion runs used. They overshoot: sup p = 1.202.
_QUINTIC = (3.4445, -4.7750, 2.0315)

# Amsel et al., arXiv:2505.16932: five greedy minimax steps for σ in [1e-3, 1].
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

# The same construction for σ in [1e-2, 1] in four steps, each but the last fitted to an interval
# 2 % longer than the one before it leaves, so that bfloat16 rounding cannot push any σ out of it.
_MINIMAX = (
    (7.942387822879971, -22.287293489435772, 15.823857209404917),
    (3.587511834648133, -2.5844606526845846, 0.4893435822285051),
    (2.6603798032594312, -1.9134394961982137, 0.41942154771679),
    (1.968844582500199, -1.3507358256284538, 0.38520753143376557),
)

# The quintic with p(1) = 1 and p'(1) = p''(1) = 0: cubic convergence to 1 from anywhere in (0, 1].
_CONVERGENT = (15 / 8, -10 / 8, 3 / 8)


def image(coefficients: Sequence[Step], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """Computes the exact range of a composition of quintics on an interval.

    A continuous function maps an interval onto an interval, whose ends are attained at the ends of
    the first or at a critical point; so the range of the composition follows step by step.

    Args:
        coefficients: The steps `(a, b, c)`, first to last.
        low: Lower end of the interval of singular values.
        high: Upper end.

    Returns:
        The smallest and the largest value on `[low, high]`.

    Example:
        >>> lowest, highest = image(steps_of("quintic", 5))
        >>> round(highest, 3)
        1.202
    """
    for a, b, c in coefficients:
        # p'(σ) = a + 3bσ² + 5cσ⁴; np.roots drops leading zeros, so b or c may vanish.
        squares = np.roots([5 * c, 3 * b, a])
        critical = [math.sqrt(s.real) for s in squares if s.imag == 0 and s.real > 0]
        inside = [sign * s for s in critical for sign in (-1, 1) if low < sign * s < high]
        values = [a * s + b * s**3 + c * s**5 for s in (low, high, *inside)]
        low, high = min(values), max(values)
    return low, high


def feasible(coefficients: Sequence[Step], highest: float = 1.0) -> tuple[Step, ...]:
    """Scales a set's last step so that `sup |p|` on [0, 1] is 1, or what is asked for.

    Args:
        coefficients: The steps `(a, b, c)`, first to last.
        highest: The supremum wanted.

    Returns:
        The same steps, the last one scaled.
    """
    scale = highest / max(map(abs, image(coefficients)))
    *first, (a, b, c) = coefficients
    return (*first, (a * scale, b * scale, c * scale))


def with_safety(coefficients: Sequence[Step], factor: float) -> tuple[Step, ...]:
    """Replaces `p(σ)` by `p(σ/factor)` in every step but the last.

    Beyond the interval that a set was made for, its quintics grow very fast. The factor keeps
    singular values inside it although rounding may lift them a little.

    Args:
        coefficients: The steps `(a, b, c)`, first to last.
        factor: Slightly more than 1.

    Returns:
        The steps `(a/s, b/s³, c/s⁵)`, the last one unchanged.
    """
    s = factor
    *first, last = coefficients
    return (*((a / s, b / s**3, c / s**5) for a, b, c in first), last)


class _Set(NamedTuple):
    """A named set.

    Attributes:
        steps: The steps, as many as there are by default.
        further: What follows after the last of them.
        schatten: Which Schatten norm matrices are divided by: 2 (Frobenius, as published) or 4.
        highest: `sup p`, to which the last step is scaled; None leaves it as it is.
    """

    steps: tuple[Step, ...]
    further: Step
    schatten: int
    highest: float | None


_SETS = {
    "minimax": _Set(_MINIMAX, _CONVERGENT, 4, 1 - 2**-15),  # float32 lifts σ by up to 2.3e-5
    "polar_express": _Set(with_safety(_POLAR_EXPRESS, 1.01), _CONVERGENT, 4, 1.0),
    "quintic": _Set((_QUINTIC,) * 5, _QUINTIC, 2, None),
}


def schatten_of(coefficients: str | Sequence[Step]) -> int:
    """Returns which Schatten norm a set divides by: its own, and 2 for a given sequence."""
    return _SETS[coefficients].schatten if isinstance(coefficients, str) else 2


def steps_of(coefficients: str | Sequence[Step], steps: int | None) -> tuple[Step, ...]:
    """Looks up or checks a set of coefficients and gives it the asked number of steps.

    `"quintic"` repeats its only row and stays raw. `"minimax"` and `"polar_express"` go on with
    the convergent quintic (15/8, −10/8, 3/8) past their last step and are `feasible` at any
    number of steps. A given sequence is used as it is; past its end its last step repeats.

    Args:
        coefficients: `"minimax"`, `"polar_express"`, `"quintic"`, or the steps `(a, b, c)`.
        steps: Number of steps, or None: 4 for `"minimax"`, 5 for the other names, the length of a
            given sequence.

    Returns:
        One `(a, b, c)` per step.

    Raises:
        TypeError: If `coefficients` is not a name or a sequence of three numbers per step.
        ValueError: If the name is unknown, the sequence is empty or not finite, or `steps` is less
            than 1.
    """
    if isinstance(coefficients, str):
        if coefficients not in _SETS:
            raise ValueError(
                f"unknown coefficients {coefficients!r}; use {', '.join(map(repr, _SETS))}, or a "
                "sequence of (a, b, c)"
            )
        rows, further, _, highest = _SETS[coefficients]
    else:
        rows, highest = _checked(coefficients), None
        further = rows[-1]
    if steps is not None:
        check_number("count", steps, "steps")
    count = len(rows) if steps is None else int(steps)
    taken = rows[:count] if highest is None else feasible(rows[:count], highest)
    return (*taken, *(further,) * (count - len(rows)))


def _checked(coefficients: Sequence[Step]) -> tuple[Step, ...]:
    try:
        given = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"coefficients are a name or a sequence of (a, b, c), one per step; got {coefficients}"
        ) from error
    if not given or not all(math.isfinite(number) for step in given for number in step):
        raise ValueError(
            f"coefficients must hold at least one step (a, b, c), all finite; got {coefficients}"
        )
    return given
