"""`examples/nanogpt.py`: it learns, resumes exactly, and survives kills, full disks and changes."""

import contextlib
import hashlib
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from examples import nanogpt
from tests.examples.test_refusals import write_shard

pytestmark = pytest.mark.unoptimized  # these runs are about files and settings, not about time

TINY = "--width 32 --layers 1 --heads 2 --batch 4 --sequence 32 --steps 12 --save-every 4"
SHORT = [*TINY.split(), "--sample-length", "5"]
FILES = {"checkpoint.npz", "loss.csv", "loss.png"}
KILLS = 20
REFUSED = r"checkpoint\.npz: damaged or another program's, remove it"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """20,000 bytes that are easy to learn."""
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("".join(f"line {number % 37} of the book\n" for number in range(1000)))
    return path


@pytest.fixture(scope="module")
def run(book):
    """Runs the example, two steps in a call, with one optimizer for all, so compiled once."""

    def unconstrained_scion(schedule, norms):
        return optimizers.setdefault(norms, original(schedule, norms))

    def run(out, *arguments):
        nanogpt.main([*SHORT, "--data", str(book), "--out", str(out), *arguments])
        return contents(out)

    optimizers, original = {}, nanogpt.scion_jax.unconstrained_scion
    with pytest.MonkeyPatch.context() as context:
        context.setattr(nanogpt, "CHUNK", 2)
        context.setattr(nanogpt.scion_jax, "unconstrained_scion", unconstrained_scion)
        yield run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of a run that nothing happened to; tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


def contents(folder):
    """Digests, since pytest would explain for minutes how megabytes differ."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Runs


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


def test_run_learns_and_leaves_table_and_picture(whole):
    table = np.genfromtxt(whole / "loss.csv", delimiter=",", names=True)
    assert table.dtype.names == ("step", "train", "validation")
    assert table["step"].tolist() == [*range(1, 13)]
    assert table["train"][0] == pytest.approx(np.log(256), rel=1e-4)
    assert table["train"][-1] < 4.5
    assert np.flatnonzero(np.isfinite(table["validation"])).tolist() == [3, 7, 11]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert contents(whole).keys() == FILES


def test_scion_learns_with_a_tied_embedding_from_shards_in_turn(run, tmp_path, capsys, monkeypatch):
    def draw(tokens, seed, step, **sizes):
        drawn[step] = tokens[0]
        return original(tokens, seed, step, **sizes)

    drawn, original = {}, nanogpt.random_windows
    monkeypatch.setattr(nanogpt, "random_windows", draw)
    shards = [write_shard(tmp_path / f"{k}.bin", np.arange(k, 1000 + k) % 50) for k in range(3)]
    tokens, vocabulary = nanogpt.read_tokens(shards[:2])
    assert [shard[:3].tolist() for shard in tokens] == [[0, 1, 2], [1, 2, 3]]
    assert all(isinstance(shard, np.memmap) for shard in tokens)  # they stay on the disk
    assert vocabulary == 50304
    flags = ["--optimizer", "scion", "--tied", "--out", str(tmp_path / "out"), "--steps", "8"]
    nanogpt.main([*SHORT, *flags, "--data", *map(str, shards)])
    assert drawn == {step: step % 3 for step in range(8)}
    table = np.genfromtxt(tmp_path / "out" / "loss.csv", delimiter=",", names=True)
    assert table["train"][-1] < table["train"][0] - 0.2
    output = capsys.readouterr().out
    assert "last oi    Sign" in output
    assert "head" not in output


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
    assert run(out, "--resume") == before
    assert run(out, "--overwrite") == before
    assert "the book" in capsys.readouterr().out


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        nanogpt.main(["--help"])
    text = capsys.readouterr().out
    for name in (*nanogpt.NUMBERS, "data", "resume", "tied", "optimizer", "hidden-radius"):
        assert f"--{name.replace('_', '-')}" in text


# Killed, or with nowhere to write to


def start(code, book, out, *arguments, **environment):
    """Starts the example, or a program around it, in a process of its own."""
    command = [sys.executable, *code, *SHORT, "--data", book, "--out", out, *arguments]
    folders = os.pathsep.join([str(Path(nanogpt.__file__).parents[1]), *sys.path])
    return subprocess.Popen(
        [*map(str, command)],
        env=os.environ | {"PYTHONPATH": folders} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


# Kills itself in the middle of its second checkpoint and, when that is continued, between two.
KILLED = """
import os, signal, sys
import numpy as np
from examples import nanogpt

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def savez(path, *arrays, **named):
    if path.with_name("checkpoint.npz").exists() and "--resume" not in sys.argv:
        path.write_bytes(b"half of it")
        kill()
    original(path, *arrays, **named)

def random_windows(*arguments, step, **sizes):
    return kill() if step == 10 else windows(*arguments, step=step, **sizes)

original, np.savez = np.savez, savez
windows, nanogpt.random_windows = nanogpt.random_windows, random_windows
nanogpt.CHUNK = 2
nanogpt.main(sys.argv[1:])
"""


def test_run_killed_twice_ends_like_one_that_was_not(run, whole, book, tmp_path):
    out = tmp_path / "killed"
    for flags, left in ([], True), (["--resume"], False):
        process = start(["-c", KILLED], book, out, *flags, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error
        assert (out / "tmp.npz").exists() == left
    assert run(out, "--resume") == contents(whole)


def modified(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


@pytest.mark.slow
def test_run_killed_at_many_moments_ends_like_one_that_was_not(book, tmp_path):
    def begin(out):
        flags = ["--steps", 200, "--save-every", 20, "--resume"]
        return start([nanogpt.__file__], book, out, *flags, JAX_COMPILATION_CACHE_DIR=cache)

    # A cache of their own, which a kill may damage.
    cache = str(tmp_path / "compiled")
    for name in ("whole", "again"):
        began = time.monotonic()
        process = begin(tmp_path / name)
        _, error = process.communicate()
        assert process.returncode == 0, error
    life = time.monotonic() - began
    whole = (tmp_path / "whole" / "checkpoint.npz").read_bytes()
    assert (tmp_path / "again" / "checkpoint.npz").read_bytes() == whole

    rng = np.random.default_rng(0)
    kills = in_a_checkpoint = runs = 0
    while True:
        part = tmp_path / f"run {runs}" / "tmp.npz"
        left = modified(part)  # by an earlier kill
        process = begin(part.parent)
        if kills < KILLS:
            moment = time.monotonic() + rng.uniform(0, life)
            waits = kills % 2 == 0  # for a checkpoint that is being written
            while process.poll() is None and (
                time.monotonic() < moment or (waits and modified(part) in (None, left))
            ):
                time.sleep(0.0002)
            process.kill()
        _, error = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
            in_a_checkpoint += modified(part) not in (None, left)
            continue
        assert process.returncode == 0, error
        assert part.with_name("checkpoint.npz").read_bytes() == whole
        runs += 1
        if kills == KILLS:
            break
    assert in_a_checkpoint >= 3


def test_full_disk_leaves_the_last_checkpoint_whole(run, whole, tmp_path, monkeypatch):
    def save(folder, *arguments):
        full = (folder / "checkpoint.npz").exists()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else before[0], before[1]))
        try:
            original(folder, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    original, out = nanogpt.save, tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr(nanogpt, "save", save)
        with pytest.raises(OSError, match="File too large"):
            run(out)
    with np.load(out / "checkpoint.npz") as saved:
        assert saved[saved.files[-1]] == 4
    assert run(out, "--resume")["checkpoint.npz"] == contents(whole)["checkpoint.npz"]


def test_read_only_folder_is_refused(run, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(PermissionError, match=r"test_read_only_folder_is_refused\d*/runs"):
        run(tmp_path / "runs")


# Checkpoints that are not the run's own

FACTS = {"data": "9 tokens", "width": 16, "tied": False, "learning_rate": 0.5}
STATE = {"count": np.int32(7), "kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
LOSSES = np.array([[3.0, np.nan], [2.0, 2.5]], np.float32)


@pytest.fixture
def checkpoint(tmp_path):
    nanogpt.save(tmp_path, FACTS, STATE, LOSSES, 2)
    return tmp_path / "checkpoint.npz"


def restore(path, **facts):
    return nanogpt.restore(path, FACTS | facts, (STATE, LOSSES, 0))


def test_no_changed_byte_goes_unnoticed(checkpoint):
    data, refused = checkpoint.read_bytes(), 0
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        checkpoint.write_bytes(changed)
        try:
            state, losses, step = restore(checkpoint)
        except ValueError as error:
            refused += "damaged" in str(error)
        else:  # where .npz files have dates and the like
            np.testing.assert_array_equal(state["kernel"], STATE["kernel"], strict=True)
            assert (state["count"], step) == (7, 2)
            np.testing.assert_array_equal(losses, LOSSES)
    assert refused > len(data) / 7 / 2


def test_beginnings_and_files_of_other_programs_are_refused(checkpoint):
    arrays, objects, data = io.BytesIO(), io.BytesIO(), checkpoint.read_bytes()
    np.savez(arrays, **STATE)
    np.savez(objects, *STATE.values(), **FACTS | {"data": None})
    others = [b"losses: 3, 2", pickle.dumps((STATE, FACTS)), arrays.getvalue(), objects.getvalue()]
    for content in [*(data[:size] for size in range(0, len(data), 99)), *others]:
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=REFUSED):
            restore(checkpoint)


def test_checkpoint_of_another_run_is_refused_with_what_differs(checkpoint):
    with pytest.raises(ValueError, match=r"--resume needs .*npz: {'width': 16, 'tied': False}"):
        restore(checkpoint, width=32, tied=True)


def test_data_that_changed_under_its_name_is_noticed(run, whole, book, tmp_path):
    shutil.copy(whole / "checkpoint.npz", tmp_path)
    text = book.read_text()
    book.write_text(text.replace("line 3 of", "lime 3 of", 1))
    with pytest.raises(ValueError, match=r"{'data': '19729 tokens, CRC [0-9a-f]+'}"):
        run(tmp_path, "--resume")
    book.write_text(text)
