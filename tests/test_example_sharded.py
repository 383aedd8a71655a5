"""The example `examples/sharded.py`: everything in pieces, and a run that moves between meshes."""

import re
import subprocess
import sys

import numpy as np
import pytest

from examples import sharded


def test_run_moves_to_another_mesh(capsys, monkeypatch):
    monkeypatch.setattr(sharded, "STEPS", 10)
    sharded.main([])
    *described, last = capsys.readouterr().out.splitlines()
    # Per layer 128 × 128 + 128 numbers, and 128 × 16 + 16 of the head; the state also counts.
    size = 4 * (4 * 16512 + 2064)
    for parts, line in zip((8, 4), described, strict=True):
        held = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", line)]
        assert held == [size // parts]
        assert f"{size // parts + 12:,} of state" in line
        assert "'all-to-all': 2" in line
    stayed, moved, least, most = map(float, re.findall(r"\d+\.\d+|\de[+-]\d+", last))
    assert max(stayed, moved) < np.log(16) - 0.1
    assert abs(stayed - moved) < 0.01
    assert least < 1e-5
    assert most < 0.01


@pytest.mark.parametrize("count", [1, 3, 10, 16])
def test_impossible_number_of_devices_is_refused(count, capsys, monkeypatch):
    monkeypatch.setattr(sharded, "CLASSES", 12)
    with pytest.raises(SystemExit):
        sharded.main(["--devices", str(count)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{count} of 8 devices: needed is an even number that divides 12" in error


def test_fake_devices_are_made():
    command = [sys.executable, sharded.__file__, "--fake-devices", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "3 of 3 devices: needed is an even number" in done.stderr
    assert done.returncode == 2
