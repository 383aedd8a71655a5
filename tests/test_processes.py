"""Several processes: they train as one does, and go on from a checkpoint when one is killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import process_worker
from process_worker import EVERY, OPTIMIZERS, STEPS, Training, open_checkpoints, restore

PROCESSES = 2
LIMIT = 120.0  # seconds, for whatever processes do
GRACE = 10.0  # seconds, for a process to notice that the other one is gone


class Processes:
    """Processes that train together.

    Attributes:
        running: The processes.
        logs: The file of each process' output.
    """

    def __init__(self, out, *arguments):
        """Starts them; see `started`."""
        out.mkdir()
        script = Path(process_worker.__file__)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(script.parents[1]),
            "XLA_FLAGS": "",
        }
        command = [sys.executable, script, "--coordinator", f"127.0.0.1:{free_port()}"]
        command += ["--processes", PROCESSES, "--out", out, *arguments]
        self.out = out
        self.logs = [out / f"process_{index}.log" for index in range(PROCESSES)]
        self.running = []
        for index, log in enumerate(self.logs):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*map(str, command), "--process", str(index)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.running.append(process)

    def wait_for(self, index, line):
        """Waits until a process has printed a line."""
        deadline = time.monotonic() + LIMIT
        while line not in self._lines(index):
            if self.running[index].poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"process {index} did not print {line!r}{self.output()}")
            time.sleep(0.005)

    def succeed(self):
        """Waits until all have ended, and returns the results by name."""
        deadline = time.monotonic() + LIMIT
        while any(process.poll() is None for process in self.running):
            failed = any(process.poll() for process in self.running)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in self.running]
        assert codes == [0] * PROCESSES, f"exit codes: {codes}{self.output()}"
        return self.results()

    def results(self):
        """Reads the results there are: by the name of the training, arrays by path."""
        results = {}
        for path in self.out.glob("*.npz"):
            with np.load(path) as arrays:
                results[path.stem] = dict(arrays)
        return results

    def printed(self, line):
        """Tells whether every process has printed a line."""
        return all(line in self._lines(index) for index in range(PROCESSES))

    def output(self):
        """Returns what the processes have printed, to be shown with a failure."""
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)

    def _lines(self, index):
        return self.logs[index].read_text(errors="replace").splitlines()

    def kill(self):
        """Kills what is left of them."""
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def started(out, *arguments):
    """Starts processes of `process_worker`, and leaves none behind.

    Args:
        out: Folder to make, for their results and output.
        *arguments: What follows on the command line.

    Yields:
        A `Processes`.
    """
    processes = Processes(out, *arguments)
    try:
        yield processes
    finally:
        processes.kill()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def assert_close(one, other, tolerance):
    """Compares arrays by path, relative to the largest entry of each."""
    assert one.keys() == other.keys()
    for path, array in one.items():
        largest = np.abs(other[path]).max()
        np.testing.assert_allclose(array, other[path], 0, tolerance * largest, err_msg=path)


def in_this_process(training, stop=STEPS):
    """Trains, and returns the arrays of the state."""
    *_, (_, state) = training.steps(training.initial(), stop=stop)
    return training.whole(state)


def test_two_processes_train_like_one(tmp_path):
    names = [f"{kind}-{name}" for name in OPTIMIZERS for kind in ("Explicit", "Auto")]
    with started(tmp_path / "out", *names) as processes:
        results = processes.succeed()
    assert set(results) == set(names)
    for name in OPTIMIZERS:
        for devices in (jax.devices(), jax.devices()[:1]):
            expected = in_this_process(Training("Explicit", name, devices))
            for kind in ("Explicit", "Auto"):
                assert_close(results[f"{kind}-{name}"], expected, 1e-5)


def test_training_survives_killed_processes(tmp_path):
    folder = tmp_path / "checkpoints"
    arguments = ["--checkpoints", folder, "Explicit-scion"]
    training = Training("Explicit", "scion", jax.devices())
    made = 0
    # First the one that does not coordinate, between two checkpoints, then the one that does, while
    # it writes one.
    for victim, line, written in [
        (1, f"step {2 * EVERY + 2}", [2 * EVERY]),
        (0, f"writing {4 * EVERY}", [3 * EVERY, 4 * EVERY]),
    ]:
        with started(tmp_path / f"after {made}", "--pause", 0.1, *arguments) as processes:
            processes.wait_for(victim, line)
            processes.running[victim].kill()
            processes.running[victim].wait()
            survivor = processes.running[1 - victim]
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in a collective
                survivor.wait(GRACE)
            assert survivor.poll() != 0
            assert not processes.results(), "the kill came too late"
            assert processes.printed(f"starting from {made}")
        with open_checkpoints(folder) as checkpoints:
            made, state = restore(checkpoints, training.initial())
        assert made in written
        assert_close(training.whole(state), in_this_process(training, made), 1e-5)

    with started(tmp_path / "last", *arguments) as processes:
        results = processes.succeed()
        assert processes.printed(f"starting from {made}")
    assert_close(results["Explicit-scion-continued"], results["Explicit-scion"], 0.0)
