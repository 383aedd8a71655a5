"""Several processes: they train as one does, and go on from a checkpoint when one is killed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.examples import process_worker
from tests.examples.process_worker import EVERY, STEPS, Training, open_checkpoints, restore

pytestmark = pytest.mark.unoptimized  # the processes take as long to compile as to do the rest

LIMIT = 300.0  # seconds, for whatever processes do
GRACE = 10.0  # seconds, for a process to notice that the other one is gone


class Processes(contextlib.AbstractContextManager):
    """So many processes of `process_worker` that train together; none is left behind.

    Args:
        count: How many.
        out: Folder to make, for their results and output.
        *arguments: What follows on the command line.
    """

    def __init__(self, count, out, *arguments):
        out.mkdir()
        script = Path(process_worker.__file__)
        environment = os.environ | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(script.parents[2]),
            "XLA_FLAGS": "",
        }
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, script, "--coordinator", address, "--processes", count]
        self.out, self.running = out, []
        self.logs = [out / f"process_{index}.log" for index in range(count)]
        for index, log in enumerate(self.logs):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*map(str, [*command, "--process", index, "--out", out, *arguments])],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.running.append(process)

    def __exit__(self, *_):
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def lines(self, index):
        return self.logs[index].read_text(errors="replace").splitlines()

    def printed(self, line):
        """Tells whether every process has printed a line."""
        return all(line in self.lines(index) for index in range(len(self.logs)))

    def output(self):
        """Returns what the processes have printed, to be shown with a failure."""
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)

    def wait_for(self, index, line):
        """Waits until a process has printed a line."""
        deadline = time.monotonic() + LIMIT
        while line not in self.lines(index):
            if self.running[index].poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"process {index} did not print {line!r}{self.output()}")
            time.sleep(0.005)

    def succeed(self):
        """Waits until all have ended; returns arrays by path, by the name of the training."""
        deadline = time.monotonic() + LIMIT
        while None in (codes := [process.poll() for process in self.running]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert not any(codes), f"exit codes: {codes}{self.output()}"
        assert None not in codes, self.output()
        return {path.stem: dict(np.load(path)) for path in self.out.glob("*.npz")}


def assert_close(one, other, tolerance):
    """Compares arrays by path, relative to the largest entry of each."""
    assert one.keys() == other.keys()
    for path, array in one.items():
        largest = np.abs(other[path]).max()
        np.testing.assert_allclose(array, other[path], 0, tolerance * largest, err_msg=path)


def in_this_process(training, start=0, state=None):
    """Trains, and returns the arrays of the state."""
    *_, (_, state) = training.steps(state or training.initial(), start)
    return training.whole(state)


# One that does not coordinate, between two checkpoints; the one that does, while it writes one.
KILLS = [
    (-1, f"step {2 * EVERY + 1}", [2 * EVERY, 3 * EVERY]),
    (0, f"writing {4 * EVERY}", [3 * EVERY, 4 * EVERY]),
]


def killed(count, kills, root):
    """Kills processes that train, and lets those that follow end.

    Returns:
        The results, and a folder with the checkpoints that the first kill left.
    """
    folder, first = root / "checkpoints", root / "first"
    arguments = ["--checkpoints", folder, "Explicit-scion"]
    made = 0
    for victim, line, written in kills:
        with Processes(count, root / f"from {made}", "--pause", 0.1, *arguments) as processes:
            processes.wait_for(victim, line)
            processes.running[victim].kill()
            deadline = time.monotonic() + GRACE
            for process in processes.running:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in a collective
                    process.wait(max(0.0, deadline - time.monotonic()))
                assert process.poll() != 0
            assert not [*processes.out.glob("*.npz")], "the kill came too late"
            assert processes.printed(f"starting from {made}")
        if not first.exists():
            shutil.copytree(folder, first)
        with open_checkpoints(folder) as checkpoints:
            made = checkpoints.latest_step()
        assert made in written
    with Processes(count, root / "last", *arguments, "Auto-clipped_scion") as processes:
        results = processes.succeed()
        assert processes.printed(f"starting from {made}")
    return results, first


# Everything in one test, since starting processes is what takes the time.
@pytest.mark.parametrize(
    ("count", "kills"), [(2, KILLS[1:]), pytest.param(4, KILLS, marks=pytest.mark.slow)]
)
def test_processes_train_like_one_and_survive_kills(count, kills, tmp_path):
    results, first = killed(count, kills, tmp_path)
    assert set(results) == {"Explicit-scion-continued", "Explicit-scion", "Auto-clipped_scion"}
    assert_close(results["Explicit-scion-continued"], results["Explicit-scion"], 0.0)
    for name in ("Explicit-scion", "Auto-clipped_scion"):
        assert_close(results[name], in_this_process(Training(name, jax.devices()[:1])), 1e-5)

    # One process goes on with what they began, on another mesh.
    training = Training("Explicit-scion", jax.devices()[:8])
    with open_checkpoints(first) as checkpoints:
        made, state = restore(checkpoints, training.initial())
    assert made < STEPS
    assert_close(in_this_process(training, made, state), results["Explicit-scion"], 1e-5)

    if count == 4:  # and so do two processes
        arguments = ["--checkpoints", first, "Explicit-scion"]
        with Processes(2, tmp_path / "two", *arguments) as processes:
            moved = processes.succeed()
            assert processes.printed(f"starting from {made}")
        for result in moved.values():
            assert_close(result, results["Explicit-scion"], 1e-5)
