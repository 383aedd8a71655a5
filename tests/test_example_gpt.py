"""The example `examples/gpt.py`: its data, its runs, and that a run resumes exactly."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


import gpt
import gpt_data
import gpt_optimizers
from gpt_mesh import make_mesh, placement, use_mesh
from gpt_settings import InputError, parse_settings

TINY = ["--width", "32", "--layers", "1", "--heads", "2", "--batch", "4", "--sequence", "32"]
SHORT = [*TINY, "--steps", "8", "--eval-every", "2", "--eval-batches", "2", "--sample-length", "9"]

DEFAULTS = {name: choice.defaults for name, choice in gpt_optimizers.OPTIMIZERS.items()}


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
    settings = parse_settings([*SHORT, *arguments], "", DEFAULTS)
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


OFTEN = ("clipped_scion", "scion_light", "muon")  # the rest now and then


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in gpt_optimizers.OPTIMIZERS
    ],
)
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


@pytest.mark.parametrize(
    "name", [pytest.param("unconstrained_clipped_scion", marks=pytest.mark.slow), "scion_light"]
)
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
    labels = gpt_optimizers.layer_labels(make_trainer(*flags)[1])(whole.params)
    leaves = map(jax.tree.leaves, (labels, split.params, whole.params))
    for label, one, other in zip(*leaves, strict=True):
        # A sign may flip where the gradient is nothing but rounding.
        flips = np.abs(one - other) > 1e-4
        assert flips.mean() <= (0 if label == "hidden" else 1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_roles(tied):
    trainer, settings = make_trainer("--tied") if tied else make_trainer()
    params = trainer.initial.params
    labels = gpt_optimizers.layer_labels(settings)(params)
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


# Meshes


@pytest.fixture
def standard_promotion():
    """For Optax's Adam and MultiSteps, which mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def on_mesh(mesh, *arguments):
    """Makes three steps, on a mesh if there is one; returns the state and the losses."""
    flags = [*SHORT, "--batch", "8", *(["--mesh", mesh] if mesh else []), *arguments]
    settings = parse_settings(flags, "", DEFAULTS)
    batches = np.random.default_rng(0).integers(256, size=(3, 8, 33), dtype=np.int32)
    mesh = make_mesh(settings.mesh)
    trainer = gpt.make_trainer(settings, vocabulary=256, mesh=mesh)
    before = pieces(trainer.initial)
    with use_mesh(mesh):
        state, progress = trainer.steps(trainer.initial, batches)
    assert pieces(state) == before
    return state, progress.loss


def pieces(state):
    """Returns by path the shape of the piece of each array that a device holds."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    shapes = [leaf.addressable_shards[0].data.shape for _, leaf in leaves]
    return dict(zip(names, shapes, strict=True))


def in_new_process(*arguments):
    """Runs the example where JAX has one CPU device, unless told otherwise."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    # In float32 on every CPU, as conftest has it for this process.
    program = (
        "import runpy, sys; sys.argv.pop(0); sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
        "from scion_jax.polar import cpu; cpu.multiplies_bfloat16 = lambda: False; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [gpt.__file__, *SHORT, *map(str, arguments)]
    command = [sys.executable, "-c", program, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("meshes", "flags"),
    [
        (["tensor=2,data=2,fsdp=2"], []),
        pytest.param(
            ["data=2,fsdp=2"],
            ["--optimizer", "scion_light", "--accumulate", "2", "--tied"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["fsdp=2,tensor=3"], ["--optimizer", "muon"], marks=pytest.mark.slow),
    ],
)
def test_mesh_changes_nothing_but_rounding(meshes, flags):
    expected, losses = on_mesh("", *flags)
    for mesh in meshes:
        state, same = on_mesh(mesh, *flags)
        np.testing.assert_allclose(same, losses, rtol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_and_optimizer_state_lie_in_pieces():
    found = pieces(on_mesh("data=2,fsdp=2,tensor=2", "--optimizer", "adamw")[0])
    for name, piece in {
        "embedding/embedding": (64, 32),  # of (256, 32)
        "head/kernel": (16, 128),
        "query/kernel": (16, 16),
        "output/kernel": (16, 16),
        "expand/kernel": (16, 64),
        "contract/kernel": (64, 16),
    }.items():
        # The parameter and Adam's two averages.
        assert [shape for path, shape in found.items() if path.endswith(name)] == [piece] * 3
    assert {shape for path, shape in found.items() if path.endswith("count")} == {()}


def test_axis_that_the_mesh_does_not_divide_stays_whole():
    shapes = {"embedding/embedding": (260, 10), "query/kernel": (10, 12), "head/kernel": (4, 9)}
    arrays = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        assert placement(arrays) == {
            "embedding/embedding": jax.P("fsdp", None),
            "query/kernel": jax.P(None, "tensor"),
            "head/kernel": jax.P("fsdp", None),
        }


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("unconstrained_scion", marks=pytest.mark.slow)]
)
def test_run_moves_from_mesh_to_mesh(run, book, tmp_path, monkeypatch, capsys, optimizer):
    def stopped(step, *arguments):
        with monkeypatch.context() as context:
            at_step(context, step - 1, lambda: signal.raise_signal(signal.SIGINT))
            run("moving", *flags, *arguments)

    flags = ["--batch", "8", "--sample-length", "0", "--optimizer", optimizer]
    expected = run("whole", *flags, "--mesh", "fsdp=8")
    assert "mesh data=1,fsdp=8,tensor=1: 8 of 8 devices (cpu)" in capsys.readouterr().out

    stopped(4, "--mesh", "fsdp=8")
    shutil.copytree(tmp_path / "moving", tmp_path / "staying")
    assert run("staying", *flags, "--resume", "--mesh", "fsdp=8") == expected

    stopped(6, "--resume", "--mesh", "data=2,tensor=2")
    assert "mesh data=2,fsdp=1,tensor=2: 4 of 8 devices (cpu)" in capsys.readouterr().out
    done = in_new_process(*flags, "--resume", "--data", book, "--out", tmp_path / "moving")
    assert done.returncode == 0, done.stderr
    whole, moved = (
        np.genfromtxt(tmp_path / out / "loss.csv", delimiter=",") for out in ("whole", "moving")
    )
    np.testing.assert_allclose(moved, whole, rtol=1e-5)
    np.testing.assert_array_equal(moved[:5], whole[:5])  # the header and the steps before moving


def test_impossible_mesh_leaves_the_run_alone(run, tmp_path):
    csv_file = tmp_path / "one" / "loss.csv"
    csv_file.parent.mkdir()
    csv_file.write_text("mine")
    with pytest.raises(InputError, match=r"fsdp=16 is of 16 devices, but here are 8.*-devices 16"):
        run("one", "--overwrite", "--batch", "16", "--mesh", "fsdp=16")
    with pytest.raises(InputError, match="--fake-devices 4 comes too late"):
        run("one", "--overwrite", "--fake-devices", "4")
    assert csv_file.read_text() == "mine"


def test_fake_devices_are_as_many_as_asked_for(tmp_path):
    done = in_new_process("--out", tmp_path / "out", "--fake-devices", "3", "--mesh", "fsdp=4")
    assert done.returncode == 1
    assert "gpt.py: --mesh fsdp=4 is of 4 devices, but here are 3" in done.stderr


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
        (["--mesh", "pipeline=2"], "'pipeline=2' is not NAME=SIZE with a name out of data, fsdp"),
        (["--mesh", "fsdp=0"], "'fsdp=0' is not NAME=SIZE"),
        (["--mesh", "fsdp=2,"], "'' is not NAME=SIZE"),
        (["--mesh", "fsdp"], "'fsdp' is not NAME=SIZE"),
        (["--mesh", "fsdp=2,data=2,fsdp=2"], "fsdp is named twice"),
        (["--mesh", "data=3"], "data × fsdp = 3 equal parts, which --batch 16"),
        (["--mesh", "fsdp=8", "--accumulate", "4"], "--batch 16 with --accumulate 4 does not"),
        (["--fake-devices", "-1"], "--fake-devices must be"),
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
