"""The published PyTorch reference, step by step (tests/golden/published)."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scion_jax
from scion_jax import NewtonSchulz, scion, scion_light, unconstrained_scion

pytestmark = pytest.mark.unoptimized

FOLDER = pathlib.Path(__file__).parent / "published"
CASES = json.loads((FOLDER / "trajectories.json").read_text())

# How far from the reference, as a share of the largest parameter.
TOLERANCE = {"float64": 2e-5, "float32": 1e-3}


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "trajectories.npz") as file:
        return dict(file)


def norm_and_layout(parameter, dtype):
    """Translates a parameter group of the reference: our norm, without layout, and the layout."""
    options = dict(parameter["norm_kwargs"])
    steps = options.pop("steps", 5)
    transposed = options.pop("transpose", False)
    if parameter["norm"] in ("Spectral", "SpectralConv", "Auto"):
        options["orthogonalizer"] = NewtonSchulz("quintic", steps, compute_dtype=dtype)
    layout = {1: "o", 2: "io" if transposed else "oi", 3: "ois", 4: "oiss"}
    return parameter["norm"], options, layout[len(parameter["shape"])]


def flax_order(layout):
    """The permutation of axes that turns a PyTorch layout into Flax's."""
    return sorted(range(len(layout)), key=lambda axis: "sio".index(layout[axis]))


def is_quick(case, dtype, order):
    """All of them as the reference stores them; each norm once in our order, and in float32."""
    if order == "PyTorch layouts":
        return dtype == "float64"
    return dtype == "float32" and case.endswith("|constrained|0.1|Scion")


@pytest.mark.parametrize(
    ("case", "dtype", "order"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] * (not is_quick(*row)))
        for row in itertools.product(CASES, TOLERANCE, ("PyTorch layouts", "Flax layouts"))
    ],
)
def test_trajectory(x64, arrays, case, dtype, order):
    settings = CASES[case]
    norms, orders = {}, []
    for label, parameter in enumerate(settings["params"]):
        name, options, layout = norm_and_layout(parameter, dtype)
        axes = list(range(len(layout))) if order == "PyTorch layouts" else flax_order(layout)
        layout = "".join(layout[axis] for axis in axes)
        if name == "Auto":  # the reference has one radius for all ranks
            options["vector_radius"] = parameter["scale"]
        norms[label] = getattr(scion_jax, name)(parameter["scale"], layout=layout, **options)
        orders.append(axes)
    labels = list(norms)

    def read(key, label):
        return jnp.asarray(arrays[f"{case}|{key}"].transpose(orders[label]), dtype)

    if case.endswith("|ScionLight"):
        make = functools.partial(scion_light, unconstrained=settings["unconstrained"])
    else:
        make = unconstrained_scion if settings["unconstrained"] else scion
    optimizer = make(settings["lr"], norms, labels, momentum=settings["momentum"])

    @jax.jit
    def step(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [read(f"p{label}_init", label) for label in labels]
    state, total = optimizer.init(params), []
    for k in range(settings["steps"]):
        gradients = [read(f"g{label}_{k}", label) for label in labels]
        if case.endswith("1.0|ScionLight"):
            # At momentum 1 the reference leaves its buffer undecayed, the sum of all gradients;
            # ours is emptied, as (1 − α) G says, so it is given that sum.
            total = [t + g for t, g in zip(total, gradients, strict=True)] if k else gradients
            gradients = total
        params, state = step(gradients, state, params)
        for label in labels:
            expected = arrays[f"{case}|p{label}_{k}"].transpose(orders[label])
            assert params[label].dtype == dtype
            error = np.abs(np.asarray(params[label], np.float64) - expected).max()
            assert error <= TOLERANCE[dtype] * np.abs(expected).max()
