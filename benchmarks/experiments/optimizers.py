"""The optimizers that the experiments compare, on the GPT of examples/nanogpt.py.

All of them are tuned over a grid of learning rates in factors of 2, as long for each; only where it
lies is an optimizer's own, since a learning rate of 0.01 means little to one and much to another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax
from jax.typing import ArrayLike
from optax.contrib import muon

from scion_jax import (
    Assignment,
    ColNorm,
    Norm,
    Sign,
    Spectral,
    almond,
    clipped_scion,
    label_by_path,
    scion_light,
    unconstrained_clipped_scion,
)

GRID_STEPS = 7  # learning rates in a grid

LABELS = label_by_path([("^embedding", "embedding"), ("^head", "head"), ("", "hidden")])
UNCONSTRAINED: dict[str, Norm] = {
    "embedding": ColNorm(),
    "hidden": Spectral(0.5),
    "head": Sign(8.0, zero_init=True),
}
# Weights need room to grow, and γ is smaller by as much: the first steps are about as long.
CONSTRAINED: dict[str, Norm] = {
    "embedding": ColNorm(),
    "hidden": Spectral(4.0),
    "head": Sign(64.0, zero_init=True),
}

Build = Callable[[optax.Schedule, ArrayLike], optax.GradientTransformation]


@dataclass(frozen=True, eq=False)
class Contestant:
    """An optimizer in a comparison.

    Attributes:
        build: Makes it from a schedule of the learning rate and ρ, which most leave aside.
        smallest: The binary exponent of the smallest learning rate of its grid.
        norms: The balls on which parameters start; None: small normal numbers.
    """

    build: Build
    smallest: int
    norms: Mapping[str, Norm] | Assignment | None = None

    def grid(self) -> list[float]:
        """Returns the learning rates to try, in factors of 2."""
        return [2.0**exponent for exponent in range(self.smallest, self.smallest + GRID_STEPS)]


def _muon(rate: optax.Schedule, rho: ArrayLike) -> optax.GradientTransformation:
    """Muon on the hidden matrices, Adam with a smaller step on embedding and head."""
    del rho
    adam = optax.adam(lambda count: 0.15 * rate(count), nesterov=True)
    return optax.multi_transform({"embedding": adam, "hidden": muon(rate), "head": adam}, LABELS)


def clipped_and_not(
    constrained: Mapping[str, Norm] | Assignment,
    unconstrained: Mapping[str, Norm] | Assignment,
    labels: Any = None,
) -> dict[str, Contestant]:
    """Returns Scion, constrained and not, clipped and not (ρ = 0); each keeps its pairing."""
    return {
        "scion": Contestant(
            lambda rate, rho: clipped_scion(rate, constrained, labels, rho=0.0), -10, constrained
        ),
        "unconstrained_scion": Contestant(
            lambda rate, rho: unconstrained_clipped_scion(rate, unconstrained, labels, rho=0.0),
            -8,
            unconstrained,
        ),
        "clipped_scion": Contestant(
            lambda rate, rho: clipped_scion(rate, constrained, labels, rho=rho), -10, constrained
        ),
        "unconstrained_clipped_scion": Contestant(
            lambda rate, rho: unconstrained_clipped_scion(rate, unconstrained, labels, rho=rho),
            -8,
            unconstrained,
        ),
    }


CONTESTANTS: dict[str, Contestant] = {
    **clipped_and_not(CONSTRAINED, UNCONSTRAINED, LABELS),
    "scion_light": Contestant(
        lambda rate, rho: scion_light(rate, CONSTRAINED, LABELS), -10, CONSTRAINED
    ),
    "almond": Contestant(lambda rate, rho: almond(rate, UNCONSTRAINED, LABELS), -8, UNCONSTRAINED),
    "adamw": Contestant(lambda rate, rho: optax.adamw(rate, b2=0.95, weight_decay=0.1), -11),
    "muon": Contestant(_muon, -8),
}
