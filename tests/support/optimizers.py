"""Every optimizer, and a small tree of parameters for it.

To add an optimizer, add a row to `OPTIMIZERS`. Where it has several, one looks ahead (`optimism`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    BiasRMS,
    ColNorm,
    Sign,
    Spectral,
    almond,
    clipped_scion,
    label_by_path,
    scion,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, and what sets it apart.

    Attributes:
        build: Called as `build(learning_rate, norms, param_labels, **options)`.
        options: Keyword arguments, every numeric one of which can be injected.
        needs_params: Whether `update` needs the parameters.
        calls_per_step: How many gradients a step takes.
        scale_free: Whether the scale of the gradients makes no difference.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, Any]
    needs_params: bool
    calls_per_step: int = 1
    scale_free: bool = True


def _clipped(build, needs_params, **options):
    return Case(build, {"momentum": 0.3, "rho": 3.0, **options}, needs_params, scale_free=False)


OPTIMIZERS = {
    "scion": Case(scion, {"momentum": 0.3}, True),
    "unconstrained_scion": Case(unconstrained_scion, {"momentum": 0.3}, False),
    "unconstrained_scion with decay": Case(
        unconstrained_scion, {"momentum": 0.3, "weight_decay": 0.1, "optimism": 0.2}, True
    ),
    "clipped_scion": _clipped(clipped_scion, True),
    "clipped_scion with short step": _clipped(
        clipped_scion, True, short_step=True, per_leaf=True, optimism=0.2
    ),
    "unconstrained_clipped_scion": _clipped(unconstrained_clipped_scion, False),
    "scion_light": Case(scion_light, {"momentum": 0.3}, True),
    "unconstrained scion_light": Case(
        scion_light, {"momentum": 0.3, "unconstrained": True, "optimism": 0.2}, False
    ),
    "scion_light every 2": Case(
        scion_light, {"momentum": 0.3, "every_k": 2}, True, calls_per_step=2
    ),
    "almond": Case(almond, {"momentum": 0.3}, False),
}
every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)

NORMS = {"embedding": ColNorm(), "hidden": Spectral(3.0), "head": Sign(30.0), "bias": BiasRMS()}
LABELS = label_by_path([(f"^{label}", label) for label in NORMS])


def gaussian_tree(seed, dtype="float32"):
    shapes = {
        "embedding": (6, 4),
        "hidden": [(4, 6), (6, 4)],
        "head": (4, 6),
        "bias": (6,),
        "none": None,
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def build(case, learning_rate=0.05, norms=NORMS, labels=LABELS, **options):
    return case.build(learning_rate, norms, labels, **{**case.options, **options})


@functools.cache
def compiled(name):
    """The optimizer of a row with its update compiled, once for all tests of a process."""
    optimizer = build(OPTIMIZERS[name])
    return optax.GradientTransformationExtraArgs(optimizer.init, jax.jit(optimizer.update))


def run(optimizer, params, steps=3):
    """Makes a few steps on fixed gradients; returns the last updates, parameters and state."""
    dtype = optax.tree.dtype(params, "highest")
    state, updates = optimizer.init(params), None
    for k in range(steps):
        updates, state = optimizer.update(gaussian_tree(100 + k, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return updates, params, state
