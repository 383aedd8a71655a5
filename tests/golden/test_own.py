"""Numbers that do not drift: every optimizer does what was recorded (tests/golden/own)."""

import inspect
import json

import numpy as np
import pytest

import scion_jax
from scion_jax import Norm, optimizers
from tests.golden.own import record

pytestmark = pytest.mark.unoptimized

# How far from what was recorded, as a share of the leaf's largest entry.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


@pytest.fixture(scope="module")
def recorded():
    with np.load(record.FOLDER / "trajectories.npz") as file:
        return dict(file)


def compare(found, expected, dtype, what):
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    versions = json.loads((record.FOLDER / "versions.json").read_text())
    assert error <= TOLERANCE[dtype] * np.abs(expected).max(), (
        f"{what}: {error:.1e} off what was recorded with {versions}. To change numbers that users "
        "have seen is a decision: write into CHANGELOG.md what changes and why, then record them "
        "anew, python -m tests.golden.own.record"
    )


# In float32 the quick tests run all norms, and the optimizer that computes most of its own.
QUICK = ("scion", "clipped_scion, short_step")


@pytest.mark.parametrize(
    ("case", "dtype", "cases"),
    [
        *(
            pytest.param(
                *(case, dtype, record.CASES),
                marks=[pytest.mark.slow] * (dtype == "float32" and case not in QUICK),
            )
            for case in record.CASES
            for dtype in TOLERANCE
        ),
        *((case, "float64", record.UNCLIPPED) for case in record.UNCLIPPED),
    ],
)
def test_trajectory(x64, recorded, case, dtype, cases):
    start = record.from_rows(recorded["start"])
    gradients = record.from_rows(recorded["gradients"])
    params, pairings = record.trajectory(case, dtype, start, gradients, cases)
    names = record.names_of(case)
    expected = record.from_rows(recorded[case], names)
    for step in range(record.STEPS):
        for name in names:
            assert params[name].dtype == dtype
            what = f"{case}, {dtype}, {name!r} after step {step}"
            compare(params[name][step], expected[name][step], dtype, what)
    assert (pairings is None) == ("rho" not in cases[case][1])
    if pairings is not None:
        compare(pairings, recorded[f"{case}, pairing"], dtype, f"{case}, {dtype}, pairing")


def test_starting_point(x64, recorded):
    expected = record.from_rows(recorded["start"])
    for name, array in record.starting_point().items():
        compare(array, expected[name], "float64", f"init_params of {name!r}")


def test_every_optimizer_and_norm_is_recorded():
    public = {f for _, f in inspect.getmembers(optimizers, inspect.isfunction)}
    assert {build for build, _ in record.CASES.values()} == public
    classes = {value for _, value in inspect.getmembers(scion_jax, inspect.isclass)}
    norms = {type(norm) for norm, _ in record.leaves("float64").values()}
    assert norms == {norm for norm in classes if issubclass(norm, Norm)} - {Norm}
