"""The fair comparison: that everybody gets as many tries, and stages do what they say."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import gpu
from benchmarks.experiments.fair import __main__ as command
from benchmarks.experiments.fair import next_steps, parts, trials
from benchmarks.experiments.fair.entrants import ENTRANTS, NORMAL, STARTS, start
from benchmarks.experiments.fair.search import RATE, Search, walk
from benchmarks.experiments.fair.trials import Ledger, Trial

pytestmark = pytest.mark.unoptimized


def first(name, **changed):
    return Trial(name, tuple(sorted((ENTRANTS[name].knobs | changed).items())))


@pytest.fixture
def landscape(monkeypatch):
    """Has training take no time: the best is 2^-6 with momentum 0.2 and, looking ahead, 0.1."""
    made = []

    def run(trial, entrant):
        made.append(trial)
        knobs = dict(trial.knobs)
        loss = 1 + 0.1 * abs(math.log2(knobs[RATE]) + 6) + 0.001 * trial.seed + 1 / trial.steps
        ahead = knobs.get("optimistic", 0.0)
        loss += abs(math.log2(knobs["momentum"] / (0.1 if ahead else 0.2))) - 0.01 * ahead
        return loss if knobs[RATE] < 0.5 else math.nan, 0.1

    monkeypatch.setattr(trials, "run", run)
    return made


def test_a_search_keeps_to_its_tries_and_tries_momentum_with_look_ahead(tmp_path, landscape):
    ledger, entrant = Ledger(tmp_path / "runs.json", ENTRANTS), ENTRANTS["unconstrained_scion"]
    begin = first("unconstrained_scion")
    best = dict(Search(ledger, entrant, 20, 1).best(begin).knobs)
    assert (best[RATE], best["momentum"], best["optimistic"]) == (2**-6, 0.1, 1.0)
    assert 20 <= len(landscape) <= 20 + 8
    assert len(set(landscape)) == len(landscape)
    again = Ledger(tmp_path / "runs.json", ENTRANTS)
    assert dict(Search(again, entrant, 20, 1).best(begin).knobs) == best
    assert len(landscape) == len(set(landscape))  # read, not made
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert kept["commit"]
    assert "JAX" in kept["machine"]
    few = [*landscape]
    Search(Ledger(tmp_path / "few.json", ENTRANTS), entrant, 5, 2).best(begin)
    assert len(landscape) - len(few) <= 2 * (5 + 8)


def test_a_radius_takes_the_learning_rate_along(tmp_path, landscape):
    ledger, entrant = Ledger(tmp_path / "runs.json", ENTRANTS), ENTRANTS["scion"]
    Search(ledger, entrant, 30, 1).best(first("scion"))
    tried = {(dict(trial.knobs)["radius"], dict(trial.knobs)[RATE]) for trial in landscape}
    assert {(4.0, 2**-6), (8.0, 2**-7), (2.0, 2**-5)} <= tried


@pytest.mark.parametrize("exponent", [-9, -6, -2])
def test_a_walk_ends_where_both_sides_are_worse(tmp_path, landscape, exponent):
    ledger = Ledger(tmp_path / "runs.json", ENTRANTS)
    best = walk(ledger, first("muon", **{RATE: 2.0**exponent}), 1)
    rates = {dict(trial.knobs)[RATE] for trial in landscape}
    assert dict(best.knobs)[RATE] == 2**-6
    assert {2**-7, 2**-6, 2**-5} <= rates


def test_all_parts_print_tables(tmp_path, landscape, capsys):
    command.main(["--out", str(tmp_path / "runs.json")])
    printed = capsys.readouterr().out
    for part in ("| muon | 512 | 2^-6 |", "AdamW ends at", "| fixed norm | 2^-6 |"):
        assert part in printed
    assert printed.count("|---") >= len(parts.PARTS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "muon" else pytest.mark.slow) for n in ENTRANTS]
    + [pytest.param(n, marks=pytest.mark.slow) for n in next_steps.NAMES],
)
def test_an_entrant_learns_and_its_knobs_do_not_recompile(name, monkeypatch):
    monkeypatch.setattr(trials, "ROUND", 64)
    entrant = (ENTRANTS | next_steps.entrants())[name]
    base = ENTRANTS.get(name, ENTRANTS["unconstrained_scion"])
    knobs = tuple(sorted((dict(base.knobs) | dict(entrant.knobs)).items()))
    trial = Trial(name, knobs, steps=40, batch=8, layers=1)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes dtypes
        loss, _ = trials.run(trial, entrant)
        before = trials.compiled.cache_info().misses
        changed = trial.turned(**{RATE: dict(knobs)[RATE] / 2, "momentum": 0.3})
        other, _ = trials.run(changed, entrant)
    assert loss < math.log(256) - 1
    assert other != loss
    assert trials.compiled.cache_info().misses == before


def test_runs_start_where_the_knobs_say():
    shapes = {"embedding": (256, 64), "hidden": (64, 64), "head": (64, 256)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    knobs = {"embedding start": 0.1, "hidden start": 0.5, "head start": 0.0}
    drawn = start(jax.random.key(0), params, knobs)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(drawn["embedding"] ** 2)), 0.1, rtol=1e-5)
    np.testing.assert_allclose(drawn["hidden"] @ drawn["hidden"].T, 0.25 * np.eye(64), atol=1e-5)
    assert not drawn["head"].any()
    normals = start(jax.random.key(0), params, dict.fromkeys(STARTS, NORMAL))
    for leaf in normals.values():
        np.testing.assert_allclose(jnp.std(leaf), 0.02, rtol=0.05)


def test_stages_of_the_next_steps():
    x, v = {"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.array([[1.0, -1.0]])}
    stage = next_steps.cautious_decay(0.5)
    decayed, _ = stage.update(v, stage.init(x), x)
    np.testing.assert_allclose(decayed["w"], [[2.5, -1.0]])
    stage = next_steps.anchor(1.0)
    state = stage.init(x)
    moved, state = stage.update(v, state, {"w": jnp.array([[1.0, 0.0]])})
    np.testing.assert_allclose(moved["w"], [[1 + 2 / 2, -1 + 4 / 2]])
    moved, state = stage.update(v, state, {"w": jnp.array([[0.0, 4.0]])})
    np.testing.assert_allclose(moved["w"], [[1 + 3 / 3, -1.0]])
    stage = optax.chain(next_steps.relative_step(0.5), optax.scale(-0.1), next_steps.keep_norm())
    updates, _ = stage.update(v, stage.init(x), x)
    there = np.array([[3.0, 4.0]]) - 0.1 * 0.5 * 5 * np.array([[1.0, -1.0]]) / np.sqrt(2)
    np.testing.assert_allclose(x["w"] + updates["w"], 5 * there / np.linalg.norm(there), rtol=1e-6)


def test_the_script_for_gpus_runs_small(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    with jax.numpy_dtype_promotion("standard"):  # Optax's Muon mixes dtypes
        gpu.main(["--small", "--json", str(path)])
    kept = json.loads(path.read_text())
    assert set(kept["training"]) == set(gpu.TRAINED)
    assert all(run["loss"] < 9 for run in kept["training"].values())
    assert kept["update, ms"]
    assert {"muon, share", "optax.sgd"} <= kept["training step, ms"].keys()
    assert "Validation loss" in capsys.readouterr().out
