"""The example `examples/nanogpt.py`: its data, its runs, and that a run resumes exactly."""

import os
import runpy
import shutil
import sys

import numpy as np
import pytest

from examples import nanogpt
from nanogpt_runs import one_optimizer, write_book

pytestmark = pytest.mark.unoptimized  # these runs are about files and settings, not about time

TINY = "--width 32 --layers 1 --heads 2 --batch 4 --sequence 32 --steps 8 --save-every 4"
SHORT = [*TINY.split(), "--sample-length", "5"]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return write_book(tmp_path_factory.mktemp("data") / "book.txt")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Makes two steps in a call, which is compiled once."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(nanogpt, "CHUNK", 2)
        one_optimizer(context)
        yield


@pytest.fixture(scope="module")
def run(book):
    """Runs the example on the book and returns the text of its CSV file."""

    def run(out, *arguments):
        nanogpt.main([*SHORT, "--data", str(book), "--out", str(out), *arguments])
        return (out / "loss.csv").read_text()

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of a run; tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Data


def test_shards_are_read_back(tmp_path):
    first = write_shard(tmp_path / "a.bin", [5, 50256, 7])
    second = write_shard(tmp_path / "b.bin", [9])
    shards, vocabulary = nanogpt.read_tokens([first, second])
    assert [shard.tolist() for shard in shards] == [[5, 50256, 7], [9]]
    assert all(isinstance(shard, np.memmap) for shard in shards)  # they stay on the disk
    assert vocabulary == 50304


@pytest.mark.parametrize(
    "header",
    [{"magic": 20240521}, {"version": 2}, {"count": 4}, {"count": 2}, {"count": -1}, {"count": 0}],
    ids=str,
)
def test_damaged_shard_is_refused(tmp_path, header):
    path = write_shard(tmp_path / "a.bin", [1, 2, 3], **header)
    with pytest.raises(ValueError, match=r"a\.bin: no FineWeb shard .* or a truncated one"):
        nanogpt.read_tokens([path])


@pytest.mark.parametrize("size", [0, 7, 8, 12, 1000, 1024])
def test_beginning_of_a_shard_is_refused(tmp_path, size):
    path = write_shard(tmp_path / "a.bin", [1, 2, 3])
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"a\.bin: no FineWeb shard"):
        nanogpt.read_tokens([path])


def test_missing_and_mixed_files_are_refused(tmp_path, book):
    with pytest.raises(OSError, match=r"none\.txt"):
        nanogpt.read_tokens([tmp_path / "none.txt"])
    with pytest.raises(ValueError, match=r"book\.txt: no FineWeb shard"):
        nanogpt.read_tokens([write_shard(tmp_path / "a.bin", [1]), book])


def test_standard_library_is_the_same_text_every_time():
    ((one,), vocabulary), ((other,), _) = nanogpt.read_tokens([]), nanogpt.read_tokens([])
    assert len(one) > 5_000_000
    assert vocabulary == 256
    assert np.array_equal(one, other)


def test_windows_follow_from_seed_and_step():
    tokens = np.arange(10, dtype=np.uint8)
    windows = nanogpt.random_windows(tokens, seed=3, step=7, batch=500, length=4)
    assert windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 1).all()
    assert {*windows[:, 0].tolist()} == {*range(7)}
    assert np.array_equal(windows, nanogpt.random_windows(tokens, 3, 7, 500, 4))
    assert not np.array_equal(windows, nanogpt.random_windows(tokens, 3, 8, 500, 4))
    assert not np.array_equal(windows, nanogpt.random_windows(tokens, 4, 7, 500, 4))


# Runs


def test_run_learns_and_leaves_table_and_picture(whole):
    table = np.genfromtxt(whole / "loss.csv", delimiter=",", names=True)
    assert table.dtype.names == ("step", "train", "validation")
    assert table["step"].tolist() == [*range(1, 9)]
    assert table["train"][0] == pytest.approx(np.log(256), rel=1e-4)
    assert table["train"][-1] < 4.5
    assert np.flatnonzero(np.isfinite(table["validation"])).tolist() == [3, 7]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in whole.iterdir()} == {"checkpoint.npz", "loss.csv", "loss.png"}


def test_scion_learns_with_a_tied_embedding_from_shards_in_turn(tmp_path, capsys, monkeypatch):
    def draw(tokens, seed, step, **sizes):
        drawn[step] = tokens[0]
        return original(tokens, seed, step, **sizes)

    drawn, original = {}, nanogpt.random_windows
    monkeypatch.setattr(nanogpt, "random_windows", draw)
    shards = [write_shard(tmp_path / f"{k}.bin", np.arange(k, 1000 + k) % 50) for k in range(3)]
    flags = ["--optimizer", "scion", "--tied", "--out", str(tmp_path / "out")]
    nanogpt.main([*SHORT, *flags, "--data", *map(str, shards)])
    assert drawn == {step: step % 3 for step in range(8)}
    table = np.genfromtxt(tmp_path / "out" / "loss.csv", delimiter=",", names=True)
    assert table["train"][-1] < table["train"][0] - 0.2
    output = capsys.readouterr().out
    assert "last oi    Sign" in output
    assert "head" not in output


def test_crashed_run_resumes_exactly(run, whole, tmp_path, monkeypatch):
    original = nanogpt.random_windows

    def crash(tokens, seed, step, **sizes):
        return 1 / 0 if step == 7 else original(tokens, seed, step, **sizes)

    out = tmp_path / "crashed"
    shutil.copytree(whole, out)
    with monkeypatch.context() as context:
        context.setattr(nanogpt, "random_windows", crash)
        with pytest.raises(ZeroDivisionError):
            run(out, "--overwrite")
    assert run(out, "--resume") == (whole / "loss.csv").read_text()
    names = ("checkpoint.npz", "loss.png")
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_existing_run_is_neither_replaced_nor_confused(run, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    with pytest.raises(ValueError, match="out holds a run: give --resume, --overwrite or another"):
        run(out)
    with pytest.raises(ValueError, match=r"--resume needs .* {'width': 32, 'seed': 1}"):
        run(out, "--resume", "--width", "64", "--seed", "2")
    with pytest.raises(ValueError, match=r"{'optimizer': 'unconstrained_scion'}"):
        run(out, "--resume", "--optimizer", "scion")
    run(out, "--resume")
    assert contents(out) == before
    assert "the book" in capsys.readouterr().out


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "30", "--heads", "4"], "--width a multiple of two times --heads"),
        (["--steps", "0"], "numbers must be positive"),
        (["--layers", "-1"], "numbers must be positive"),
        (["--sequence", "3000"], "19729 tokens are too few for --sequence 3000"),
        (["--out", "{book}"], "book.txt"),
        (["--out", "{book}/runs"], "book.txt"),
        (["--data", "none.txt"], "none.txt"),
        (["--optimizer", "sgd"], "invalid choice"),
        (["--steps", "many"], "invalid int value"),
    ],
)
def test_wrong_flags_are_one_line(arguments, message, book, tmp_path, monkeypatch, capsys):
    given = [argument.format(book=book) for argument in arguments]
    common = [nanogpt.__file__, "--data", str(book), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*common, *given])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(nanogpt.__file__, run_name="__main__")
    shown = str(stopped.value) if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert message in shown.splitlines()[-1]
    assert shown.splitlines()[-1].startswith("nanogpt.py: ")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        nanogpt.main(["--help"])
    text = capsys.readouterr().out
    for name in (*nanogpt.NUMBERS, "data", "resume", "tied", "optimizer", "hidden-radius"):
        assert f"--{name.replace('_', '-')}" in text
