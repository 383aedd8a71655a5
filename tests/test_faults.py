"""`examples/nanogpt.py` killed at any moment, on a full disk, or with a checkpoint not its own."""

import contextlib
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt_runs import nanogpt, one_optimizer, write_book

pytestmark = pytest.mark.unoptimized

TINY = "--width 16 --layers 1 --heads 2 --batch 2 --sequence 16 --save-every 20"
SHORT = [*TINY.split(), "--sample-length", "1"]
STEPS = ["--steps", "60"]
KILLS = 20
REFUSED = r"checkpoint\.npz: damaged or another program's, remove it"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return write_book(tmp_path_factory.mktemp("data") / "book.txt")


@pytest.fixture(scope="module")
def run(book):
    """Runs the example in this process, and returns its checkpoint: all there is of a run."""

    def run(out, *arguments):
        nanogpt.main([*SHORT, *STEPS, "--data", str(book), "--out", str(out), *arguments])
        return (out / "checkpoint.npz").read_bytes()

    with pytest.MonkeyPatch.context() as context:
        one_optimizer(context)
        yield run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The checkpoint of a run that nothing happened to."""
    return run(tmp_path_factory.mktemp("runs") / "whole")


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


def modified(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


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
    return kill() if step == 50 else windows(*arguments, step=step, **sizes)

original, np.savez = np.savez, savez
windows, nanogpt.random_windows = nanogpt.random_windows, random_windows
nanogpt.main(sys.argv[1:])
"""


def test_run_killed_twice_ends_like_one_that_was_not(run, whole, book, tmp_path):
    out = tmp_path / "killed"
    for flags, left in ([], True), (["--resume"], False):
        code, unoptimized = ["-c", KILLED], {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        process = start(code, book, out, *STEPS, *flags, **unoptimized)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error
        assert (out / "tmp.npz").exists() == left
    assert run(out, "--resume") == whole
    assert {path.name for path in out.iterdir()} == {"checkpoint.npz", "loss.csv", "loss.png"}


@pytest.mark.slow
def test_run_killed_at_many_moments_ends_like_one_that_was_not(book, tmp_path):
    def begin(out):
        flags = ["--steps", 200, "--resume"]
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


# Nowhere to write to


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
        assert saved[saved.files[-1]] == 20
    assert run(out, "--resume") == whole


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


def test_beginning_of_a_checkpoint_is_refused(checkpoint):
    data = checkpoint.read_bytes()
    for size in range(0, len(data), 99):
        checkpoint.write_bytes(data[:size])
        with pytest.raises(ValueError, match=REFUSED):
            restore(checkpoint)


@pytest.mark.parametrize("kind", ["text", "pickle", "arrays", "objects"])
def test_file_of_another_program_is_refused(kind, tmp_path):
    file = io.BytesIO()
    if kind == "arrays":
        np.savez(file, **STATE)
    elif kind == "objects":
        np.savez(file, *STATE.values(), **FACTS | {"data": None})
    else:
        file.write(b"losses: 3, 2" if kind == "text" else pickle.dumps((STATE, FACTS)))
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=REFUSED):
        restore(path)


def test_checkpoint_of_another_run_is_refused_with_what_differs(checkpoint):
    with pytest.raises(ValueError, match=r"--resume needs .*npz: {'width': 16, 'tied': False}"):
        restore(checkpoint, width=32, tied=True)


def test_data_that_changed_under_its_name_is_noticed(run, whole, book, tmp_path):
    (tmp_path / "checkpoint.npz").write_bytes(whole)
    text = book.read_text()
    book.write_text(text.replace("line 3 of", "lime 3 of", 1))
    with pytest.raises(ValueError, match=r"{'data': '19729 tokens, CRC [0-9a-f]+'}"):
        run(tmp_path, "--resume")
    book.write_text(text)
