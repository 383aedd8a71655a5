"""The example `examples/gpt.py`: its data, its runs, and that a run resumes exactly."""

import csv
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax

import gpt
import gpt_data
import gpt_optimizers
from gpt_settings import InputError, parse_settings

TINY = ["--width", "32", "--layers", "1", "--heads", "2", "--batch", "4", "--sequence", "32"]
SHORT = [*TINY, "--steps", "8", "--eval-every", "2", "--eval-batches", "2", "--sample-length", "9"]


@pytest.fixture
def book(tmp_path):
    """A text of 20,000 bytes that is easy to learn."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number % 37} of the book\n" for number in range(1000)))
    return path


@pytest.fixture
def run(book, tmp_path):
    """Runs the example on the book and returns the text of its CSV file."""

    def run(out, *arguments):
        gpt.main([*SHORT, "--data", str(book), "--out", str(tmp_path / out), *arguments])
        return (tmp_path / out / "loss.csv").read_text()

    return run


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def make_trainer(*arguments):
    defaults = {name: choice.defaults for name, choice in gpt_optimizers.OPTIMIZERS.items()}
    settings = parse_settings([*SHORT, *arguments], "", defaults)
    return gpt.make_trainer(settings, vocabulary=256), settings


def at_step(monkeypatch, step, action):
    """Has ``action`` called while the batch of that step is drawn."""
    original = gpt_data.Corpus.random_windows

    def random_windows(self, seed, current, count, length):
        if current == step:
            action()
        return original(self, seed, current, count, length)

    monkeypatch.setattr(gpt_data.Corpus, "random_windows", random_windows)


# Data


def test_shard_is_read_back(tmp_path):
    tokens = gpt_data.read_shard(write_shard(tmp_path / "a.bin", [5, 50256, 7]))
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [5, 50256, 7]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"magic": 20240521}, "magic 20240521 instead of 20240520"),
        ({"version": 2}, "version 2"),
        ({"count": 4}, "truncated or damaged: the header promises 4 tokens"),
        ({"count": 2}, "truncated or damaged"),
        ({"count": -1}, "truncated or damaged"),
    ],
)
def test_damaged_shard_is_refused(tmp_path, header, message):
    path = write_shard(tmp_path / "a.bin", [1, 2, 3], **header)
    with pytest.raises(ValueError, match=message):
        gpt_data.read_shard(path)


@pytest.mark.parametrize("content", [b"", b"short"])
def test_shard_without_header_is_refused(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="too few for a shard's header"):
        gpt_data.read_shard(path)


def test_missing_and_mixed_files_are_refused(tmp_path, book):
    shard = write_shard(tmp_path / "a.bin", [1, 2, 3])
    with pytest.raises(ValueError, match="no such file"):
        gpt_data.load_corpus([str(tmp_path / "none.txt")])
    with pytest.raises(ValueError, match="not both"):
        gpt_data.load_corpus([str(book), str(shard)])


def test_windows_stay_within_a_shard_and_reach_all_of_it(tmp_path):
    first = write_shard(tmp_path / "a.bin", range(10))
    second = write_shard(tmp_path / "b.bin", range(100, 105))
    corpus = gpt_data.load_corpus([str(first), str(second)])
    windows = corpus.random_windows(0, 1, count=500, length=4)
    assert (np.diff(windows, axis=1) == 1).all()
    assert {int(start) for start in windows[:, 0]} == {*range(7), 100, 101}
    assert corpus.even_windows(9, 4)[:, 0].tolist() == [*range(7), 100, 101]


def test_token_outside_the_vocabulary_is_refused(tmp_path):
    corpus = gpt_data.load_corpus([str(write_shard(tmp_path / "a.bin", [1, 50304]))])
    with pytest.raises(ValueError, match="token 50304 is outside"):
        corpus.even_windows(1, 2)


def test_held_out_tail_is_disjoint_from_the_training_text():
    corpus = gpt_data.Corpus((np.arange(95), np.arange(95, 100)), vocabulary=100)
    train, held_out = corpus.split()
    assert [len(train), len(held_out)] == [90, 10]
    assert np.concatenate([*train.pieces, *held_out.pieces]).tolist() == list(range(100))


def test_too_short_text_is_refused():
    with pytest.raises(ValueError, match="too short"):
        gpt_data.Corpus((np.arange(5),), vocabulary=5).even_windows(1, 6)


def test_standard_library_is_the_same_text_every_time():
    one, other = gpt_data.load_corpus([]), gpt_data.load_corpus([])
    assert len(one) > 5_000_000
    assert np.array_equal(one.pieces[0], other.pieces[0])
    batch = one.random_windows(3, 7, 4, 16)
    assert np.array_equal(batch, other.random_windows(3, 7, 4, 16))
    assert not np.array_equal(batch, one.random_windows(3, 8, 4, 16))
    assert not np.array_equal(batch, one.random_windows(4, 7, 4, 16))


# Runs


@pytest.mark.parametrize("name", gpt_optimizers.OPTIMIZERS)
def test_every_optimizer_learns(run, tmp_path, name):
    # Optax's Adam divides by powers of an integer count, which strict promotion forbids.
    promotion = "standard" if name in ("adamw", "muon") else "strict"
    with jax.numpy_dtype_promotion(promotion):
        flags = ["--steps", "30", "--eval-every", "30", "--sample-length", "0"]
        text = run(name, "--optimizer", name, *flags)
    rows = list(csv.DictReader(text.split()))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    losses = [float(row["train_loss"]) for row in rows]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < losses[0] - 0.5
    assert float(rows[-1]["validation_loss"]) < losses[0] - 0.5
    assert (tmp_path / name / "loss.png").read_bytes().startswith(b"\x89PNG")
    check_pairings(name, rows)


def check_pairings(name, rows):
    """The clipped forms, as which Scion runs too, log what they clip by; the others do not."""
    if name in ("adamw", "muon", "scion_light", "almond"):
        assert set(rows[0]) == {"step", "train_loss", "validation_loss"}
        return
    pairings = np.array([float(row["pairing"]) for row in rows])
    factors = [float(row["factor"]) for row in rows]
    assert (pairings > 0).all()
    rho = gpt_optimizers.OPTIMIZERS[name].defaults.get("rho", gpt_optimizers.NEVER_CLIPS)
    np.testing.assert_allclose(factors, np.minimum(1, pairings / rho), rtol=1e-5)


@pytest.mark.parametrize("name", ["unconstrained_clipped_scion", "scion_light"])
def test_microbatches_make_the_steps_of_their_batch(name):
    batches = np.arange(2 * 4 * 33, dtype=np.int32).reshape(2, 4, 33) % 256
    flags = ["--optimizer", name]
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides floats by an integer count
        (whole, expected), (split, progress) = (
            trainer.steps(trainer.initial, batches)
            for trainer, _ in (make_trainer(*flags), make_trainer(*flags, "--accumulate", "2"))
        )
    np.testing.assert_allclose(progress.loss, expected.loss, rtol=1e-5)
    assert progress.shown.keys() == expected.shown.keys()
    for shown, values in expected.shown.items():
        np.testing.assert_allclose(progress.shown[shown], values, rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (split.params, whole.params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_roles(tied):
    trainer, settings = make_trainer("--tied") if tied else make_trainer()
    params = trainer.initial.params
    labels = gpt_optimizers.param_labels(params)
    assert labels["embedding"]["embedding"] == "embedding"
    assert set(jax.tree.leaves(labels["blocks"])) == {"hidden"}
    assert ("head" in params) is not tied
    norms = gpt_optimizers.layer_norms(settings)
    assert set(jax.tree.leaves(labels)) == set(norms)
    for leaf, label in zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True):
        assert norms[label].gauge(leaf) <= 1.001


def test_step_is_compiled_once(book):
    trainer, _ = make_trainer()
    text = gpt_data.load_corpus([str(book)])
    state = trainer.initial
    for step in range(3):
        state, _ = trainer.steps(state, text.random_windows(0, step, 4, 33)[None])
    assert trainer.steps._cache_size() == 1


def test_tied_model_learns_from_shards(tmp_path, capsys):
    shard = write_shard(tmp_path / "a.bin", np.arange(2000) % 50)
    out = tmp_path / "out"
    gpt.main([*SHORT, "--tied", "--data", str(shard), "--out", str(out)])
    rows = list(csv.DictReader((out / "loss.csv").read_text().split()))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert "token numbers" in capsys.readouterr().out


def test_stopped_run_resumes_exactly(run, monkeypatch, capsys):
    flags = ["--checkpoint-every", "4", "--sample-length", "0"]
    expected = run("whole", *flags)

    with monkeypatch.context() as context:
        at_step(context, 5, lambda: signal.raise_signal(signal.SIGINT))
        run("interrupted", *flags)
    assert "stopped after step 6" in capsys.readouterr().out
    assert run("interrupted", "--resume", *flags) == expected

    with monkeypatch.context() as context:
        at_step(context, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("crashed", *flags)
    assert run("crashed", "--resume", *flags) == expected
    # Resuming a finished run changes nothing.
    assert run("crashed", "--resume", *flags) == expected


def test_existing_run_is_neither_replaced_nor_confused(run, tmp_path, capsys):
    with pytest.raises(InputError, match="no checkpoint"):
        run("one", "--resume")
    expected = run("one", "--sample-length", "0")
    (tmp_path / "one" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds a run"):
        run("one")
    with pytest.raises(InputError, match="--width: 32 in the checkpoint, 64 now"):
        run("one", "--resume", "--width", "64")
    with pytest.raises(InputError, match="--seed: 0 in the checkpoint, 1 now"):
        run("one", "--resume", "--seed", "1")
    assert (tmp_path / "one" / "loss.csv").read_text() == expected
    assert run("one", "--overwrite") == expected
    assert "continued by the model" in capsys.readouterr().out
    assert (tmp_path / "one" / "notes.txt").read_text() == "mine"


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "30", "--heads", "4"], "whole, even number"),
        (["--steps", "0"], "--steps must be positive"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--rho", "0"], "--rho must be positive"),
        (["--accumulate", "3"], "--batch 16 cannot be split into --accumulate 3"),
        (["--resume", "--overwrite"], "choose one"),
        (["--optimizer", "sgd"], "invalid choice"),
    ],
)
def test_wrong_flags_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpt.main(arguments)
    assert message in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        gpt.main(["--help"])
    text = capsys.readouterr().out
    for name in ("--data", "--resume", "--tied", "--optimizer", "--hidden-radius", "--eval-every"):
        assert name in text
