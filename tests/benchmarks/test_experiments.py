"""The experiments, and all else that trains: that they try, keep, judge and draw what they say."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import momentum_matrices, orthogonalization
from benchmarks.experiments import (
    batch_size,
    boundedness,
    clipping,
    clipping_digits,
    coordinate_check,
    output_layers,
    precision,
    records,
    steps_to_loss,
    training,
    transfer,
)
from benchmarks.experiments.optimizers import CONTESTANTS, GRID_STEPS, Contestant
from benchmarks.experiments.text import TEXT
from benchmarks.experiments.training import Outcome, Setting
from scion_jax import ExactPolar

pytestmark = pytest.mark.unoptimized

TINY = Setting("scion", 2**-8, width=64, layers=1, batch=2, sequence=8, steps=4, evaluate_every=2)


@pytest.fixture
def landscape(monkeypatch):
    """Has training take no time: the loss is lowest at a learning rate of 2^-5."""
    made = []

    def train(setting, contestant, task):
        assert isinstance(contestant, Contestant)
        assert isinstance(task, training.Task)
        made.append(setting)
        distance = abs(math.log2(setting.learning_rate) + 5)
        loss = 1 + 0.1 * distance + 0.001 * setting.seed + 1 / setting.steps
        count = setting.steps // setting.evaluate_every
        validation = [loss + 1 / (1 + index) for index in range(count)]
        validation[-1] = loss if setting.learning_rate < 0.25 else math.nan
        return Outcome(validation, [2.0] * count, 0.1)

    monkeypatch.setattr(records, "train", train)
    return made


def test_a_run_is_made_once_and_kept(tmp_path, landscape):
    path = tmp_path / "new" / "runs.json"
    first = records.Records(path).run([TINY])
    assert records.Records(path).run([TINY]) == first
    assert landscape == [TINY]
    kept = json.loads(path.read_text())
    assert kept["runs"][0]["setting"] == dataclasses.asdict(TINY)
    assert "JAX" in kept["machine"]
    assert kept["commit"]
    assert not list(path.parent.glob("*.tmp"))
    assert Outcome([1.0, math.nan], [], 0.0).loss == math.inf  # a diverged run loses


def test_tuning(tmp_path, landscape):
    """It tries the whole grid, and seeds at its best; a walk ends where both sides are worse."""
    setting = dataclasses.replace(TINY, contestant="muon")
    tuned = records.tune(records.Records(tmp_path / "runs.json"), setting)
    assert list(tuned.grid) == CONTESTANTS["muon"].grid()
    assert len(tuned.grid) == GRID_STEPS
    assert tuned.best.learning_rate == 2**-5
    assert tuned.losses == pytest.approx([1.25, 1.251, 1.252])
    assert tuned.summary() == ["2^-5", "1.2510 ± 0.0010"]
    assert len(landscape) == GRID_STEPS + 2
    for exponent in (-9, -5, -3):
        path = tmp_path / f"{exponent}.json"
        tuned = records.tune(records.Records(path), TINY, 1, 2.0**exponent)
        assert tuned.best.learning_rate == 2**-5
        assert {2**-6, 2**-4} <= tuned.grid.keys()
        assert set(tuned.grid) <= {2.0**exponent for exponent in range(-10, 0)}
    setting = dataclasses.replace(TINY, contestant="adamw")  # its grid ends at 2^-5
    tuned = records.tune(records.Records(tmp_path / "runs.json"), setting, 1)
    assert tuned.summary()[0] == "2^-5 (an end of the grid)"


def outcomes(losses):
    return {count: [Outcome([loss], [], 0.0)] for count, loss in losses.items()}


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ({50: 3.0, 75: 2.0, 100: 1.0}, 87.5),
        ({50: 1.4, 75: 1.2, 100: 1.0}, 50),
        ({50: 3.0, 75: 2.0, 100: 1.6}, None),
        ({50: 1.4, 75: 1.6, 100: 1.4}, 87.5),  # what a short run reached by luck does not count
    ],
)
def test_steps_to_a_loss_are_read_off(losses, steps):
    assert steps_to_loss.steps_needed(outcomes(losses), 1.5) == steps


def test_steps_on_a_curve_are_read_off(monkeypatch):
    monkeypatch.setattr(clipping, "SMOOTHING", 1)
    runs = [Outcome([4.0, 3.0, 2.0], [1.0] * 3, 0.0), Outcome([2.0, 1.0, 0.0], [1.0] * 3, 0.0)]
    tuned = records.Tuned(dataclasses.replace(TINY, evaluate_every=10), {}, runs)
    assert clipping.steps_to(tuned, 1.5) == 25
    assert clipping.steps_to(tuned, 5.0) == 10
    assert clipping.steps_to(tuned, 0.5) == math.inf


@pytest.mark.parametrize(
    ("experiment", "flags", "pictures", "printed"),
    [
        (transfer, "--sizes 64 512", "runs", "moves by a factor of 2^+0"),
        (transfer, "--depth", "depth", "| muon | 16 | 2^-5 | 1.0"),
        (steps_to_loss, "", "runs", "steps to adamw's loss"),
        (batch_size, "", "runs", "| muon | 512 |"),
        (output_layers, "", "runs", "| RowNorm | 512 | 2^-5 |"),
        (precision, "", "runs", "| SVD, float32 | 2^-5 |"),
        (clipping, "", "runs_scion runs_unconstrained_scion",
            "| unconstrained_clipped_scion | 8 | 2^-5 |"),
        (clipping_digits, "--optimizers scion", "runs_scion", "| clipped_scion | 4 | 2^-5 |"),
    ],
)  # fmt: skip
def test_an_experiment_prints_a_table_and_draws(
    tmp_path, landscape, capsys, experiment, flags, pictures, printed
):
    experiment.main(["--out", str(tmp_path / "runs.json"), *flags.split()])
    for picture in pictures.split():
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "scion" else pytest.mark.slow) for name in CONTESTANTS],
)
def test_every_contestant_learns(name):
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes dtypes
        rate = CONTESTANTS[name].grid()[-3]
        setting = dataclasses.replace(TINY, contestant=name, learning_rate=rate, rho=1.0, steps=40)
        setting = dataclasses.replace(setting, sequence=32, batch=8, evaluate_every=20)
        outcome = training.train(setting, CONTESTANTS[name], TEXT)
        again = training.train(setting, CONTESTANTS[name], TEXT)
    assert outcome.loss < math.log(256) - 1
    assert len(outcome.validation) == 2
    assert len(outcome.pairing) == (2 if "scion" in name and name != "scion_light" else 0)
    assert again == dataclasses.replace(outcome, seconds=again.seconds)


def test_a_network_learns_digits():
    task, contestant = clipping_digits.task(), clipping_digits.contestants()["clipped_scion"]
    setting = Setting("clipped_scion", 2**-6, batch=64, steps=40, evaluate_every=20)
    outcome = training.train(setting, contestant, task)
    assert outcome.loss < math.log(10) - 1
    assert len(outcome.pairing) == 2


@pytest.mark.slow
def test_norms_are_followed(tmp_path, capsys):
    boundedness.main(["--out", str(tmp_path / "runs.json"), "--steps", "60"])
    kept = json.loads((tmp_path / "runs.json").read_text())["gauges"]
    assert max(max(numbers) for numbers in kept["scion"].values()) < 1.02
    head = np.array(kept["unconstrained_scion"]["head"])
    assert head[0] == 0
    assert (np.diff(head[:10]) > 0).all()
    assert (tmp_path / "runs.png").is_file()
    assert "unconstrained_scion" in capsys.readouterr().out


@pytest.mark.slow
def test_activations_are_measured(tmp_path, capsys):
    flags = ["--widths", "64", "128", "--seeds", "1"]
    coordinate_check.main(["--out", str(tmp_path / "runs.json"), *flags])
    kept = json.loads((tmp_path / "runs.json").read_text())["root mean squares"]
    sizes = kept["√(d_out/d_in)"]
    assert sizes["64"]["logits, start"] == 0
    assert 0.5 < sizes["64"]["block 1, change"] / sizes["128"]["block 1, change"] < 2
    assert (tmp_path / "runs.png").is_file()
    assert "block 1, start" in capsys.readouterr().out


def test_momentum_matrices_are_saved_and_judged(tmp_path, capsys, monkeypatch):
    path = tmp_path / "matrices" / "momentum.npz"
    small = "--steps 2 --width 32 --layers 1 --sequence 16"
    momentum_matrices.main([str(path), *small.split()])
    with np.load(path) as saved:
        matrices = dict(saved)
    assert sorted(matrix.shape for matrix in matrices.values()) == [(32, 32)] * 4 + [
        (32, 128),
        (128, 32),
    ]
    assert all(matrix.dtype == np.float32 and matrix.any() for matrix in matrices.values())
    assert "6 matrices after 2 steps" in capsys.readouterr().out
    cases = orthogonalization.saved_cases(path)
    assert {name: stack.shape for name, stack in cases.items()} == {
        "momentum, 32 × 32, 4 matrices": (4, 32, 32),
        "momentum, 32 × 128, 2 matrices": (2, 32, 128),
    }

    every = orthogonalization.methods()
    few = {name: every[name] for name in (orthogonalization.OURS, orthogonalization.PEER)}
    monkeypatch.setattr(orthogonalization, "methods", lambda: few | {"exact": ExactPolar()})
    monkeypatch.setattr(orthogonalization, "synthetic_cases", lambda rows, count: {})
    monkeypatch.setattr(orthogonalization, "EXACT_LIMIT", 16)
    written = tmp_path / "orthogonalization.json"
    options = ["--rounds", "3", "--matrices", str(path), "--json", str(written)]
    orthogonalization.main(options)
    assert len(json.loads(written.read_text())) == 2 * 3
    assert "momentum, 32 × 128, 2 matrices" in capsys.readouterr().out
