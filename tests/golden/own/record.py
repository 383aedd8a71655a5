"""Records what every optimizer does to a small tree: tests/golden/own/trajectories.npz.

    python -m tests.golden.own.record "scion, optimism"    # adds a case, and leaves the others
    python -m tests.golden.own.record                      # all, and where they start

The second only when numbers are meant to change, which is a decision: CHANGELOG.md says what
changes and why.
Everything runs in float64, where platforms and versions of JAX agree. The file holds the `start`,
the `gradients` of each step, for every case the parameters after each step, and `CASE, pairing`
where a state keeps it. Leaves stand in rows, one after the other in the order of their names.
versions.json says what the starting point was recorded with.
"""

import json
import math
import pathlib
import platform
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

import scion_jax
from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Euclidean,
    ExactPolar,
    NewtonSchulz,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
    almond,
    clipped_scion,
    init_params,
    scion,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
)

FOLDER = pathlib.Path(__file__).parent
STEPS = 5

# Values that float32 holds exactly, so that both dtypes take the same steps.
FALLING = optax.linear_schedule(0.25, 0.125, 4)
CASES = {
    "scion": (scion, {}),
    "scion, momentum 1": (scion, {"momentum": 1.0}),
    "scion, momentum scheduled": (scion, {"momentum": FALLING}),
    "unconstrained_scion": (unconstrained_scion, {}),
    "unconstrained_scion, weight_decay": (unconstrained_scion, {"weight_decay": 0.5}),
    "clipped_scion": (clipped_scion, {"rho": optax.linear_schedule(16.0, 8.0, 4)}),
    "clipped_scion, short_step": (clipped_scion, {"rho": 4.0, "short_step": True}),
    "unconstrained_clipped_scion": (unconstrained_clipped_scion, {"rho": 12.0}),
    "scion_light": (scion_light, {}),
    "scion_light, unconstrained": (scion_light, {"unconstrained": True}),
    "scion_light, every_k": (scion_light, {"every_k": 2}),
    "almond": (almond, {}),
    "scion, optimism": (scion, {"optimism": 0.25}),
    "unconstrained_scion, optimism scheduled": (unconstrained_scion, {"optimism": FALLING}),
    "clipped_scion, optimism": (clipped_scion, {"rho": 12.0, "optimism": 0.25}),
    "unconstrained_clipped_scion, optimism": (
        unconstrained_clipped_scion,
        {"rho": 12.0, "optimism": 0.25},
    ),
    "scion_light, optimism": (scion_light, {"optimism": 0.25, "every_k": 2}),
}

# Nothing is clipped: what they do, and show, is recorded as those that are not clipped at all.
UNCLIPPED = {
    "scion": (clipped_scion, {"rho": 0.0}),
    "unconstrained_scion": (unconstrained_clipped_scion, {"rho": 0.0}),
}


def leaves(dtype):
    """Makes a norm and a shape for each name; products are computed in the dtype itself.

    All matrices with the default orthogonalizer are 2 × 3, so that they compile as one stack.
    """

    def newton_schulz(*arguments):
        return NewtonSchulz(*arguments, compute_dtype=dtype)

    ours = newton_schulz()
    return {
        "auto matrix": (Auto(2.0, vector_radius=0.5, orthogonalizer=ours), (3, 2)),
        "auto scalar": (Auto(2.0, vector_radius=0.5), ()),
        "bias": (BiasRMS(), (4,)),
        "bias, batch": (BiasRMS(0.5, layout="bo"), (2, 3)),
        "bias, parts": (BiasRMS(0.5, layout="o[2]"), (4,)),
        "column": (ColNorm(), (3, 2)),
        "column, batch": (ColNorm(layout="bio", normalized=True), (2, 2, 2)),
        "convolution": (SpectralConv(4.0, orthogonalizer=ours), (3, 1, 1, 2)),
        "euclidean": (Euclidean(2.0), (2, 3)),
        "free": (BiasRMS(constrained=False), (3,)),
        "outside": (Euclidean(), (3,)),
        "row": (RowNorm(), (3, 2)),
        "row, convolution": (RowNorm(2.0, layout="sio", normalized=False), (2, 2, 2)),
        "sign": (Sign(10.0), (2, 3)),
        "sign, parts": (Sign(layout="i[2,1]o", normalized=False), (3, 2)),
        "sign, zero": (Sign(5.0, layout="oi", zero_init=True), (3, 2)),
        "spectral": (Spectral(3.0, orthogonalizer=ours), (2, 3)),
        "spectral, batch": (Spectral(3.0, layout="bio", orthogonalizer=ours), (2, 2, 3)),
        "spectral, exact": (Spectral(orthogonalizer=ExactPolar(), normalized=False), (2, 3)),
        "spectral, max": (Spectral(layout="oi", max=True, orthogonalizer=ours), (2, 3)),
        "spectral, parts": (Spectral(3.0, layout="io[3]", orthogonalizer=ours), (2, 9)),
        "spectral, polar_express": (
            Spectral(orthogonalizer=newton_schulz("polar_express")),
            (2, 8),
        ),
        "spectral, quintic": (Spectral(orthogonalizer=newton_schulz("quintic", 3)), (2, 3)),
    }


# In the order of jax.tree.leaves. Compiling takes long, so only `scion` has all of them, the others
# one with each norm, batch axes and parts among them.
NAMES = sorted(leaves("float64"))
SHAPES = {name: leaves("float64")[name][1] for name in NAMES}
COMMON = [
    "bias",
    "column, batch",
    "convolution",
    "free",
    "outside",
    "row",
    "sign",
    "spectral, parts",
]


def names_of(case):
    """Lists the leaves that a case has."""
    return NAMES if case == "scion" else COMMON


def to_rows(tree):
    """Joins leaves that may have an axis of steps in front."""
    arrays = {name: np.asarray(array, np.float64) for name, array in sorted(tree.items())}
    rows = [
        array.reshape(*array.shape[: array.ndim - len(SHAPES[name])], -1)
        for name, array in arrays.items()
    ]
    return np.concatenate(rows, axis=-1)


def from_rows(rows, names=NAMES):
    """Undoes `to_rows`."""
    ends = np.cumsum([math.prod(SHAPES[name]) for name in names])
    parts = np.split(rows, ends[:-1], axis=-1)
    return {
        name: part.reshape(rows.shape[:-1] + SHAPES[name])
        for name, part in zip(names, parts, strict=True)
    }


@jax.jit
def starting_point():
    """Draws points of the balls, and vectors that `init_params` keeps: one is outside."""
    rng = np.random.default_rng(0)
    given = {name: jnp.asarray(0.5 * rng.standard_normal(SHAPES[name])) for name in NAMES}
    norms = {name: norm for name, (norm, _) in leaves("float64").items()}
    params = init_params(jax.random.key(0), given, norms, {name: name for name in NAMES})
    return params | {"outside": jnp.asarray([2.0, -2.0, 1.0])}


def draw_gradients(start):
    """Draws gradients of all steps; one leaf's point out of the ball, one row is zero at first."""
    rng = np.random.default_rng(1)
    gradients = {name: rng.standard_normal((STEPS, *SHAPES[name])) for name in NAMES}
    gradients["outside"] -= np.asarray(start["outside"])
    gradients["column"][:2, 0] = 0
    return gradients


def trajectory(case, dtype, start, gradients, cases=CASES):
    """Makes the steps; returns the leaves and the pairing (None if not kept) after each."""
    build, options = cases[case]
    names = names_of(case)
    norms = {name: leaves(dtype)[name][0] for name in names}
    optimizer = build(FALLING, norms, {name: name for name in names}, **options)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(start[name], dtype) for name in names}
    state = optimizer.init(params)
    trajectory, pairings = [], []
    for k in range(STEPS):
        at_k = {name: jnp.asarray(gradients[name][k], dtype) for name in names}
        params, state = step(params, state, at_k)
        trajectory.append(params)
        pairings.append(optax.tree.get(state, "pairing"))
    trajectory = {name: np.stack([params[name] for params in trajectory]) for name in names}
    return trajectory, None if pairings[0] is None else np.stack(pairings)


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # as the test does; saves a minute
    chosen = sys.argv[1:]
    if chosen:
        arrays = dict(np.load(FOLDER / "trajectories.npz"))
        start, gradients = from_rows(arrays["start"]), from_rows(arrays["gradients"])
    else:
        start = starting_point()
        gradients = draw_gradients(start)
        arrays = {"start": to_rows(start), "gradients": to_rows(gradients)}
    for cases in (CASES, UNCLIPPED):
        for case in [case for case in cases if not chosen or case in chosen]:
            params, pairings = trajectory(case, "float64", start, gradients, cases)
            arrays[case] = to_rows(params)
            if pairings is not None:
                arrays[f"{case}, pairing"] = pairings
    np.savez_compressed(FOLDER / "trajectories.npz", **arrays)
    if chosen:
        return
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    versions |= {"python": platform.python_version(), "scion_jax": scion_jax.__version__}
    text = json.dumps(dict(sorted(versions.items())), indent=4)
    (FOLDER / "versions.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
