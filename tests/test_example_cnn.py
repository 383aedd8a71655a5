"""The example `examples/cnn.py`: its data, its whitening, that it learns, and what it refuses."""

import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from examples import cnn

pytestmark = pytest.mark.unoptimized
SMALL = ["--width", "0.125", "--batch", "80", "--epochs", "4"]


@pytest.fixture
def small_digits(monkeypatch):
    """Has scikit-learn's digits, enlarged, take the place of MNIST's, which take long to read."""
    images, classes = load_digits(return_X_y=True)
    images = np.kron(images[:800].reshape(-1, 8, 8), np.full((3, 3), 15.0))
    rows = np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 28 * 28)
    monkeypatch.setattr(cnn, "mnist_data", lambda: (rows, classes[:800]))


@pytest.fixture
def cifar(tmp_path):
    """A folder in the format of CIFAR-10's binary version, of four images a file."""
    chance = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        records = chance.integers(256, size=(4, cnn.CIFAR_RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


def test_reads_mnist():
    train, test = cnn.load_digits(seed=0)
    assert train.pixels.shape == (4000, 28, 28, 1)
    assert test.pixels.shape == (1000, 28, 28, 1)
    assert train.pixels.max() == 255
    assert set(train.classes.tolist()) == set(range(10))


def test_reads_cifar(cifar):
    train, test = cnn.load_cifar(cifar)
    assert train.pixels.shape == (20, 32, 32, 3)
    assert test.pixels.shape == (4, 32, 32, 3)
    record = np.frombuffer((cifar / "data_batch_2.bin").read_bytes(), np.uint8)[: cnn.CIFAR_RECORD]
    assert train.classes[4] == record[0]
    row, column, colour = 3, 5, 2
    assert train.pixels[4, row, column, colour] == record[1 + 1024 * colour + 32 * row + column]


def test_learns_digits(small_digits, tmp_path, capsys):
    """In four epochs of eight steps."""
    picture = tmp_path / "new" / "picture.png"
    cnn.main([*SMALL, "--out", str(picture)])
    said = capsys.readouterr().out
    assert float(said.rpartition("test accuracy: ")[2].partition(";")[0]) >= 0.85
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "whitening" not in said  # no parameter of the optimizer's


def test_trains_on_cifar(cifar, tmp_path, capsys, monkeypatch):
    """All but the step, which would have to be compiled."""
    seen = []
    monkeypatch.setattr(cnn, "step", lambda model, optimizer, x, y: seen.append((x, y)) or 1.0)
    picture = tmp_path / "picture.png"
    cnn.main(["--data", str(cifar), *SMALL, "--batch", "8", "--out", str(picture)])
    assert [x.shape for x, _ in seen] == [(8, 32, 32, 3)] * 4 * 2
    assert [y.shape for _, y in seen] == [(8,)] * 4 * 2
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


def test_augmentation_moves_by_up_to_two_pixels():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 3] = 1
    moved = cnn.augment(np.repeat(image, 500, axis=0), np.random.default_rng(0), mirror=False)
    places = {tuple(map(int, place)) for place in np.argwhere(moved)[:, 1:3]}
    assert places == {(row, column) for row in range(2, 7) for column in range(1, 6)}
    assert moved.sum() == 500


def test_augmentation_mirrors_half():
    image = np.arange(9, dtype=np.uint8)[None, None, :, None].repeat(9, axis=1)
    seen = cnn.augment(np.repeat(image, 500, axis=0), np.random.default_rng(0), mirror=True)
    rising = seen[:, 0, 4, 0].astype(int) < seen[:, 0, 5, 0]
    assert 0.4 < rising.mean() < 0.6
    assert not cnn.augment(image, np.random.default_rng(0), mirror=False)[0, 0, 4] > 7


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3.bin", None, "No such file or directory; expected CIFAR-10's binary version"),
        ("test_batch.bin", None, "No such file"),
        ("data_batch_1.bin", b"", "0 bytes, expected a multiple of 3073"),
        ("data_batch_1.bin", bytes(3072), "3072 bytes, expected a multiple of 3073"),
        ("test_batch.bin", b"\x0a" + bytes(3072), "class 10, where CIFAR-10's are 0 to 9"),
    ],
)
def test_damaged_cifar_is_refused(cifar, name, content, message):
    if content is None:
        (cifar / name).unlink()
    else:
        (cifar / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name}: {message}"):
        cnn.main(["--data", str(cifar), "--out", str(cifar / "picture.png")])


def test_a_file_is_no_folder(cifar):
    with pytest.raises(SystemExit, match=r"data_batch_1.bin: Not a directory"):
        cnn.main(["--data", str(cifar / "test_batch.bin"), "--out", str(cifar / "picture.png")])


def test_a_batch_beyond_the_data_is_refused(cifar):
    with pytest.raises(SystemExit, match="--batch must be at most 20"):
        cnn.main(["--data", str(cifar), "--out", str(cifar / "picture.png")])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (("--width", "0"), "--width 0.015625"),
        (("--width", "nan"), "--width 0.015625"),
        (("--batch", "0"), "--batch 1"),
        (("--epochs", "0"), "--epochs 1"),
        (("--seed", "-1"), "--seed 0"),
        (("--out", f"{__file__}/picture.png"), "File exists"),
    ],
)
def test_unfit_arguments_are_refused(capsys, argument, message):
    with pytest.raises(SystemExit):
        cnn.main(list(argument))
    assert message in capsys.readouterr().err.splitlines()[-1]
