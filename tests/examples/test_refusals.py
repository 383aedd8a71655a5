"""What examples refuse: data that are none, files of another form, arguments that do not fit."""

import re
import runpy
import sys

import numpy as np
import pytest

from examples import cnn, finetune, mlp, nanogpt, sharded, vit

pytestmark = pytest.mark.unoptimized

X = np.random.default_rng(0).normal(size=(50, 6, 6))
Y = np.arange(50) % 3
IMAGES = np.random.default_rng(0).integers(256, size=(50, 12, 12), dtype=np.uint8)
LABELS = (np.arange(50) % 4).astype(np.uint8)
GOOD = {
    finetune: {"x": X, "y": Y},
    mlp: {"x": np.array([[0.0, 1.0]] * 8), "y": np.array([0, 1] * 4)},
    vit: {"images": IMAGES, "labels": LABELS},
}
BROKEN = np.where(np.arange(X.size).reshape(X.shape) == 0, np.nan, X)
FINITE, CLASSES = "x must be (n, …) finite numbers", "y must be at least 5 integers"


def last_words(example, capsys, *arguments):
    """What an example says, as a user sees it, when it stops."""
    with pytest.raises(SystemExit) as stopped:
        example.main([str(argument) for argument in arguments])
    said = stopped.value.code
    return said if isinstance(said, str) else capsys.readouterr().err.splitlines()[-1]


def written(path, example, **arrays):
    np.savez(path, **GOOD[example] | {name: np.asarray(array) for name, array in arrays.items()})
    return path


@pytest.mark.parametrize(
    ("example", "arrays", "message"),
    [
        (mlp, {"y": [0, 1] * 3}, "expected x"),
        (mlp, {"y": [[0, 1]] * 8}, "expected x"),
        (mlp, {"y": [0.0, 1.0] * 4}, "expected x (n, …) and integer y"),
        (mlp, {"y": ["a", "b"] * 4}, "expected x (n, …) and integer y"),
        (
            mlp,
            {"x": [[0.0, 1.0]] * 4, "y": [0, 1] * 2},
            "expected x (n, …) and integer y (n,), n at",
        ),
        (mlp, {"x": np.zeros((8, 0))}, "expected x"),
        (mlp, {"x": 3.0, "y": 1}, "expected x (n, …) and integer y (n,), n at least 5"),
        (mlp, {"x": [[0.0, np.nan]] * 8}, "expected numbers x that are finite"),
        (mlp, {"x": [[0.0, np.inf]] * 8}, "expected numbers x that are finite"),
        (mlp, {"x": np.ones((8, 2))}, "expected numbers x that are finite and not all the same"),
        (mlp, {"x": [["a", "b"]] * 8}, "expected an .npz file"),
        (mlp, {"x": np.array([[None]] * 8)}, "expected an .npz file"),
        (vit, {"images": IMAGES.astype(np.float32)}, "images must be uint8 of shape"),
        (vit, {"images": IMAGES[0]}, "images must be uint8 of shape"),
        (vit, {"images": IMAGES[:0], "labels": LABELS[:0]}, "images must be uint8 of shape"),
        (vit, {"labels": LABELS[:-1]}, "labels must be 50 integers"),
        (vit, {"labels": LABELS / 2}, "labels must be 50 integers"),
        (vit, {"labels": LABELS.astype(int) - 1}, "labels must be 50 integers from 0"),
        (finetune, {"x": BROKEN}, FINITE + ", not float64 (50, 6, 6)"),
        (finetune, {"x": X.astype(str)}, FINITE),
        (finetune, {"x": X[:, 0, 0]}, FINITE + ", not float64 (50,)"),
        (finetune, {"y": Y[:-1]}, CLASSES + " from 0, one for each of the 50 rows of x"),
        (finetune, {"y": Y / 2}, CLASSES),
        (finetune, {"y": Y - 1}, CLASSES + " from 0"),
        (finetune, {"x": X[:4], "y": Y[:4]}, CLASSES),
    ],
)
def test_data_of_another_form(example, arrays, message, tmp_path, capsys):
    path = written(tmp_path / "own.npz", example, **arrays)
    assert last_words(example, capsys, "--data", path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (mlp, "expected an .npz file with arrays x and y"),
        (vit, "expected .npz with images and labels"),
        (finetune, "expected .npz with x, y"),
    ],
)
def test_files_that_are_none(example, message, tmp_path, capsys):
    whole = written(tmp_path / "own.npz", example).read_bytes()
    contents = {"empty": b"", "short": whole[:-50], "cut": whole[:200], "text": b"no numbers"}
    contents["damaged"] = whole[:500] + bytes(100) + whole[600:]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", X)
    np.savez(tmp_path / "foreign.npz", z=X)
    for name in [*contents, "array.npy", "foreign.npz", "missing.npz"]:
        words = last_words(example, capsys, "--data", tmp_path / name)
        assert re.search(rf"{name}: {message}.+", words)


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (mlp, "--width 0", "--width"),
        (mlp, "--steps 0", "--steps"),
        (mlp, "--seed -1", "--seed"),
        (cnn, "--width 0", "--width 0.015625"),
        (cnn, "--width nan", "--width 0.015625"),
        (cnn, "--batch 0", "--batch 1"),
        (cnn, "--epochs 0", "--epochs 1"),
        (cnn, "--seed -1", "--seed 0"),
        (cnn, f"--out {__file__}/picture.png", "File exists"),
        (vit, "--patch 5", "--patch 5 does not divide images of shape (12, 12, 1)"),
        (vit, "--patch 4 --batch 41", "50 images are too few, for --batch 41"),
        (vit, "--width 64 --heads 3", "--width must be a multiple of --heads"),
        (vit, "--out picture.text", "--out end in .png"),
        (vit, "--depth 0", "must be positive"),
        (vit, "--learning-rate nan", "must be positive"),
        (vit, "--epochs many", "argument --epochs: invalid int value"),
        (finetune, "--rank 0", "--rank must be 1 to 36"),
        (finetune, "--rank 37", "--rank must be 1 to 36"),
        (finetune, "--rank 9 --width 8", "--rank must be 1 to 8"),
        (finetune, "--steps 0", "must be positive"),
        (finetune, "--width -1", "must be positive"),
        (finetune, "--learning-rate nan", "must be positive"),
        (finetune, "--save-base none/base.npz", "none/base.npz: must be an .npz file in a folder"),
        (finetune, "--save-base base.zip", "base.zip: must be an .npz file"),
        *((sharded, f"--devices {n}", f"{n} of 8 devices: needed is an even number that divides 12")
            for n in (1, 3, 10, 16)),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(example, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharded, "CLASSES", 12)
    data = []
    if example in (vit, finetune):
        data = ["--data", written(tmp_path / "own.npz", example)]
    assert message in last_words(example, capsys, *data, *arguments.split())


def test_tasks_and_bases_that_do_not_belong_together(tmp_path, capsys):
    rows = written(tmp_path / "rows.npz", finetune, x=X.reshape(50, -1))
    words = last_words(finetune, capsys, "--data", rows)
    assert "x of shape (50, 36) cannot be turned; give --new-data" in words
    for arrays in ({"x": X[:, :5]}, {"y": Y + 1}):
        new = written(tmp_path / "new.npz", finetune, **arrays)
        words = last_words(finetune, capsys, "--data", rows, "--new-data", new)
        assert f"{new}: expected 36 features and 3 classes" in words
    data, base = written(tmp_path / "own.npz", finetune), tmp_path / "base.npz"
    finetune.save(finetune.Network(36, 8, 3, finetune.nnx.Rngs(0)), base)
    words = last_words(finetune, capsys, "--data", data, "--base", base, "--width", 16)
    assert "base.npz: head/kernel has shape (8, 3), not (16, 3)" in words
    words = last_words(finetune, capsys, "--data", data, "--base", data)
    assert re.search(r"own\.npz: expected .npz with .*hidden/0/kernel", words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3.bin", None, "No such file or directory; expected CIFAR-10's binary version"),
        ("test_batch.bin", None, "No such file"),
        ("data_batch_1.bin", b"", "0 bytes, expected a multiple of 3073"),
        ("data_batch_1.bin", bytes(3072), "3072 bytes, expected a multiple of 3073"),
        ("test_batch.bin", b"\x0a" + bytes(3072), "class 10, where CIFAR-10's are 0 to 9"),
        ("", None, "data_batch_1.bin: Not a directory"),
        ("", None, "--batch must be at most 5"),
    ],
)
def test_damaged_cifar(name, content, message, tmp_path, capsys):
    for file in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        (tmp_path / file).write_bytes(bytes(3073))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name:
        (tmp_path / name).unlink()
    folder = tmp_path / ("test_batch.bin" if "directory" in message and not name else "")
    words = last_words(cnn, capsys, "--data", folder, "--out", tmp_path / "picture.png")
    assert f"{name}: {message}" in words if name else message in words


# nanoGPT's files and flags.


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def test_damaged_shards(tmp_path):
    headers = [{"magic": 20240521}, {"version": 2}, *({"count": n} for n in (4, 2, -1, 0))]
    paths = [write_shard(tmp_path / f"{n}.bin", [1, 2, 3], **h) for n, h in enumerate(headers)]
    whole = write_shard(tmp_path / "whole.bin", [1, 2, 3]).read_bytes()
    for size in (0, 7, 8, 12, 1000, 1024):
        paths.append(tmp_path / f"beginning of {size}.bin")
        paths[-1].write_bytes(whole[:size])
    paths.append(tmp_path / "book.txt")
    paths[-1].write_text("a book")
    for path in paths:
        message = rf"{path.name}: no FineWeb shard .* or a truncated one"
        with pytest.raises(ValueError, match=message):
            nanogpt.read_tokens([tmp_path / "whole.bin", path])
    with pytest.raises(OSError, match=r"none\.txt"):
        nanogpt.read_tokens([tmp_path / "none.txt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--width 30 --heads 4", "--width a multiple of two times --heads"),
        ("--steps 0", "numbers must be positive"),
        ("--layers -1", "numbers must be positive"),
        ("--sequence 3000", "18000 tokens are too few for --sequence 3000"),
        ("--out {book}", "book.txt"),
        ("--out {book}/runs", "book.txt"),
        ("--data none.txt", "none.txt"),
        ("--optimizer sgd", "invalid choice"),
        ("--steps many", "invalid int value"),
    ],
)
def test_flags_of_nanogpt(arguments, message, tmp_path, monkeypatch, capsys):
    book = tmp_path / "book.txt"
    book.write_text("a book of twenty b" * 1000)
    common = [nanogpt.__file__, "--data", str(book), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*common, *arguments.format(book=book).split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(nanogpt.__file__, run_name="__main__")
    shown = str(stopped.value) if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert message in shown.splitlines()[-1]
    assert shown.splitlines()[-1].startswith("nanogpt.py: ")
