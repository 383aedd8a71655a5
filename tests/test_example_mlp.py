"""The example `examples/mlp.py`: it learns, reads arrays of any shape, and refuses what is none."""

import numpy as np
import pytest

from examples import mlp

pytestmark = pytest.mark.unoptimized


def write(path, x=((0.0, 1.0),) * 8, y=(0, 1) * 4, **more):
    np.savez(path, x=np.asarray(x), y=np.asarray(y), **more)
    return path


def test_learns_digits_and_shows_how_layers_are_read(capsys):
    mlp.main(["--steps", "100"])
    *table, result = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in table if line.startswith("layers")}
    assert "Spectral" in rows["layers/0/kernel"]
    assert "Spectral" in rows["layers/2/kernel"]
    assert "Sign" in rows["layers/4/kernel"]
    assert "1024" in rows["layers/4/kernel"]
    assert float(result.removeprefix("test accuracy: ")) >= 0.95


def test_reads_a_file(tmp_path):
    """Rows may have any shape, and classes may be any integers."""
    x = np.arange(36, dtype=np.uint8).reshape(6, 2, 3)
    path = write(tmp_path / "data.npz", x, [7, -3, 10**12, 7, 7, -3])
    numbers, classes = mlp.load(str(path))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, x.reshape(6, 6))
    assert classes.tolist() == [1, 0, 2, 1, 1, 0]


def test_trains_on_a_file(tmp_path, monkeypatch):
    """All but the step, which would have to be compiled."""
    seen = []
    monkeypatch.setattr(mlp, "step", lambda model, optimizer, x, y: seen.append((x, y)) or 1.0)
    x = np.random.default_rng(0).normal(3, 5, size=(1000, 2, 3))
    path = write(tmp_path / "data.npz", x, np.arange(1000) % 3)
    mlp.main(["--data", str(path), "--steps", "20"])
    numbers, classes = map(np.concatenate, zip(*seen, strict=True))
    assert numbers.shape == (20 * 128, 6)
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
    assert set(classes.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": [0, 1] * 3}, "expected x"),
        ({"y": [[0, 1]] * 8}, "expected x"),
        ({"y": [0.0, 1.0] * 4}, "integer y"),
        ({"y": ["a", "b"] * 4}, "integer y"),
        ({"x": [[0.0, 1.0]] * 4, "y": [0, 1] * 2}, "at least 5"),
        ({"x": np.zeros((8, 0))}, "expected x"),
        ({"x": 3.0, "y": 1}, "at least 5"),
        ({"x": [[0.0, np.nan]] * 8}, "finite"),
        ({"x": [[0.0, np.inf]] * 8}, "finite"),
        ({"x": np.ones((8, 2))}, "not all the same"),
        ({"x": [["a", "b"]] * 8}, "expected an .npz file"),
        ({"x": np.array([[None]] * 8)}, "expected an .npz file"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, arrays, message):
    path = write(tmp_path / "data.npz", **arrays)
    with pytest.raises(SystemExit, match=f"data.npz: .*{message}"):
        mlp.main(["--data", str(path)])


@pytest.mark.parametrize("damage", ["missing", "empty", "foreign", "truncated", "npy", "no y"])
def test_unfit_files_are_refused(tmp_path, damage):
    path = tmp_path / "data.npz"
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path.write_text("some text")
        case "truncated":
            write(path)
            path.write_bytes(path.read_bytes()[:-100])
        case "npy":
            np.save(path.with_suffix(".npy"), np.ones((8, 2)))
            path.with_suffix(".npy").rename(path)
        case "no y":
            np.savez(path, x=np.ones((8, 2)))
    with pytest.raises(SystemExit, match=r"data.npz: expected an .npz file with arrays x and y"):
        mlp.main(["--data", str(path)])


@pytest.mark.parametrize("argument", [("--width", "0"), ("--steps", "0"), ("--seed", "-1")])
def test_unfit_arguments_are_refused(capsys, argument):
    with pytest.raises(SystemExit):
        mlp.main(list(argument))
    assert f"{argument[0]}" in capsys.readouterr().err.splitlines()[-1]
