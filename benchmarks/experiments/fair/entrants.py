"""Who takes part in the fair comparison: optimizers whose every hyperparameter is a knob.

A knob is a number that the compiled program receives, so that a sweep compiles once. Three knobs
say where parameters start, and are everybody's: a fraction of the unit balls of `START`, or
`NORMAL` for normal numbers of deviation 0.02, as in nanoGPT.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.experiments.optimizers import LABELS
from scion_jax import ColNorm, Norm, Sign, Spectral, init_params, scion, unconstrained_scion

Knobs = Mapping[str, Any]  # numbers, or traced ones
Build = Callable[[optax.Schedule, Knobs], optax.GradientTransformation]

NORMAL = -1.0  # in place of a fraction: normal numbers
DEVIATION = 0.02
START: dict[str, Norm] = {"embedding": ColNorm(), "hidden": Spectral(), "head": Sign()}
FIXED = frozenset({"nesterov"})  # knobs that Optax wants to know when it compiles

MOMENTA = (0.05, 0.1, 0.2, 0.4)
STARTS: dict[str, tuple[float, ...]] = {
    "embedding start": (0.02, 0.1, 0.3, 1.0),
    "hidden start": (NORMAL, 0.25, 0.5, 1.0, 2.0),
    "head start": (NORMAL, 0.0, 1.0, 4.0),
}
BALLS = {"embedding start": 1.0, "hidden start": 1.0, "head start": 0.0}  # as published for Scion
NORMALS = {"embedding start": DEVIATION, "hidden start": NORMAL, "head start": NORMAL}


@dataclass(frozen=True, eq=False)
class Entrant:
    """An optimizer in the comparison.

    Attributes:
        build: Makes it from a schedule of the learning rate and the knobs.
        knobs: Where the search begins; all of them, `learning rate` included.
        moves: What it tries, knob by knob: values in order. The learning rate goes in factors of 2.
        follows: A knob that the learning rate follows inversely, so that first steps keep their
            length.
    """

    build: Build
    knobs: Mapping[str, float]
    moves: Mapping[str, tuple[float, ...]]
    follows: str | None = None


def start(key: jax.Array, params: Any, knobs: Knobs) -> Any:
    """Draws the parameters that a run starts from.

    Args:
        key: PRNG key.
        params: The model's.
        knobs: Say where.

    Returns:
        Parameters of these shapes.
    """
    balls = init_params(key, params, START, LABELS)
    normals = optax.tree.random_like(key, params, jax.random.normal)

    def draw(label: str, ball: jax.Array, normal: jax.Array) -> jax.Array:
        fraction = knobs[f"{label} start"]
        return jnp.where(fraction == NORMAL, DEVIATION * normal, fraction * ball)

    return jax.tree.map(draw, LABELS(params), balls, normals)


def balls(knobs: Knobs) -> dict[str, Norm]:
    """Returns the norms of Scion, with their radii as knobs, in multiples of the hidden one's."""
    hidden = knobs["radius"]
    return {
        "embedding": ColNorm(hidden * knobs["embedding radius"]),
        "hidden": Spectral(hidden),
        "head": Sign(hidden * knobs["head radius"]),
    }


def averaging(knobs: Knobs) -> dict[str, Any]:
    """Returns momentum and optimism, which is 0 or the momentum."""
    momentum = knobs["momentum"]
    return {"momentum": momentum, "optimism": momentum * knobs["optimistic"]}


def _unconstrained_scion(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    decay = knobs["decay"]
    return unconstrained_scion(rate, balls(knobs), LABELS, weight_decay=decay, **averaging(knobs))


def _scion(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    return scion(rate, balls(knobs), LABELS, **averaging(knobs))


def _muon(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    """Muon on the hidden matrices, Adam with another step on embedding and head."""
    nesterov = bool(knobs["nesterov"])
    ratio = knobs["Adam's ratio"]
    adam = optax.adam(lambda count: ratio * rate(count), b2=knobs["b2"], nesterov=True)
    hidden = optax.contrib.muon(rate, beta=1 - knobs["momentum"], nesterov=nesterov)
    return optax.multi_transform({"embedding": adam, "hidden": hidden, "head": adam}, LABELS)


def _adamw(rate: optax.Schedule, knobs: Knobs) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=1 - knobs["momentum"],
        b2=knobs["b2"],
        weight_decay=knobs["decay"],
        nesterov=bool(knobs["nesterov"]),
    )


_SCION = {"momentum": 0.1, "optimistic": 0.0, "embedding radius": 2.0, "head radius": 16.0}
_SCION_MOVES = {
    "momentum": MOMENTA,
    "optimistic": (0.0, 1.0),
    **STARTS,
    "head radius": (1.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    "embedding radius": (0.5, 2.0, 8.0),
}

ENTRANTS: dict[str, Entrant] = {
    "unconstrained_scion": Entrant(
        _unconstrained_scion,
        {"learning rate": 2**-4, "radius": 0.5, "decay": 0.0, **_SCION, **BALLS},
        _SCION_MOVES,
    ),
    "scion": Entrant(
        _scion,
        {"learning rate": 2**-7, "radius": 4.0, **_SCION, **BALLS},
        {"radius": (0.5, 1.0, 2.0, 4.0, 8.0), **_SCION_MOVES},
        follows="radius",
    ),
    "muon": Entrant(
        _muon,
        {
            "learning rate": 2**-5, "momentum": 0.05, "nesterov": 1.0,
            "Adam's ratio": 0.15, "b2": 0.999, **NORMALS,
        },
        {
            "momentum": MOMENTA,
            "nesterov": (0.0, 1.0),
            **STARTS,
            "Adam's ratio": (0.05, 0.15, 0.5),
            "b2": (0.95, 0.99, 0.999),
        },
    ),
    "adamw": Entrant(
        _adamw,
        {
            "learning rate": 2**-7, "momentum": 0.1, "b2": 0.95, "decay": 0.1, "nesterov": 0.0,
            **NORMALS,
        },
        {
            "momentum": MOMENTA,
            "nesterov": (0.0, 1.0),
            **STARTS,
            "b2": (0.9, 0.95, 0.99, 0.999),
            "decay": (0.0, 0.1, 1.0),
        },
    ),
}  # fmt: skip


def _carried(name: str, **found: float) -> dict[str, float]:
    return {**ENTRANTS[name].knobs, **found}


# What tuning came to at width 64, for programs that make no search.
CARRIED: dict[str, dict[str, float]] = {
    "unconstrained_scion": _carried("unconstrained_scion"),
    "muon": _carried("muon"),
}
