"""Trains a small GPT on text, and continues where it stopped. Published settings of nanoGPT (124M):

    python examples/nanogpt.py --data *.bin --optimizer scion --tied --width 768 --layers 12 \\
        --heads 6 --sequence 1024 --learning-rate 0.00024414 --hidden-radius 50 --head-radius 3000
"""

import sysconfig
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import scion_jax
from scion_jax import Sign, Spectral, infer_norms, init_params, scaled_relu_squared

NUMBERS = {"width": 128, "layers": 3, "heads": 4, "sequence": 128, "batch": 16, "steps": 600}
NUMBERS |= {"seed": 1, "save_every": 200, "sample_length": 400}
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
CHUNK = 20  # steps in one compiled call; on a CPU they take two thirds of the time
rms_norm = nnx.RMSNorm(1, use_scale=False, rngs=None)  # for any width, no parameters


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of channels by angles that grow with the position: rotary embedding."""
    angle = np.outer(range(x.shape[1]), 1e4 ** -np.linspace(0, 1, x.shape[3] // 2, False))[:, None]
    (left, right), cosine, sine = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=-1)


class Block(nnx.Module):
    """Causal attention, then a perceptron, each added to what it reads in normalized form."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads, linear = heads, partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.output = (linear(width, width) for _ in range(4))
        self.expand, self.contract = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        matrices, per_head = (self.query, self.key, self.value), (*x.shape[:2], self.heads, -1)
        query, key, value = (matrix(rms_norm(x)).reshape(per_head) for matrix in matrices)
        query, key = rotate(rms_norm(query)), rotate(rms_norm(key))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.reshape(x.shape))
        return x + self.contract(scaled_relu_squared(self.expand(rms_norm(x))))


class GPT(nnx.Module):
    """Maps tokens ``(batch, sequence)`` to logits; every parameter is a matrix."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, tied: bool, rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(width, heads, rngs) for _ in range(layers)])
        self.head = None if tied else nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.blocks(rms_norm(self.embedding(tokens)))
        return (self.head or self.embedding.attend)(rms_norm(x))


def read_tokens(files: list[str | Path]) -> tuple[list[np.ndarray], int]:
    """Reads text, or maps FineWeb shards: 256 int32 (magic, version, count), then uint16 tokens."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = (p for p in root.rglob("*.py") if LEFT_OUT.isdisjoint(p.relative_to(root).parts))
    paths = [Path(file) for file in files] or sorted(sources)
    if not any(path.suffix == ".bin" for path in paths):
        return [np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)], 256
    for path in paths:
        magic, version, count, *_ = [*np.fromfile(path, "<i4", 256).tolist(), 0, 0, 0]
        if (magic, version) != (20240520, 1) or not 0 < 2 * count == path.stat().st_size - 1024:
            raise ValueError(f"{path}: no FineWeb shard (20240520, 1, …), or a truncated one")
    return [np.memmap(path, "<u2", "r", 1024) for path in paths], 50304


def random_windows(tokens: np.ndarray, seed: int, step: int, batch: int, length: int) -> np.ndarray:
    """Cuts out what the step after ``step`` steps sees; no data position has to be saved."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - length + 1, size=batch)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int32)


def mean_loss(model: GPT, rows: jax.Array) -> jax.Array:
    """Returns nats per token."""
    return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean()


@nnx.jit(donate_argnums=0)
@nnx.scan
def train(run: tuple[GPT, nnx.Optimizer], windows: jax.Array) -> tuple[tuple, jax.Array]:
    """Makes a step with every batch."""
    model, optimizer = run
    loss, gradients = nnx.value_and_grad(mean_loss)(model, windows)
    optimizer.update(model, gradients)
    return run, loss


def save(folder: Path, facts: dict, state: nnx.State, losses: np.ndarray, step: int) -> None:
    """Replaces table and picture of the losses and the checkpoint, each by one that is complete."""
    table = np.column_stack([np.arange(1, 1 + step), losses[:step]])
    np.savetxt(folder / "tmp.csv", table, "%.9g", ",", header="step,train,validation", comments="")
    axes = Figure().subplots()
    axes.legend(axes.plot(*table.T[:2], "-", *table.T[::2], "o"), ["training", "validation"])
    axes.set(xlabel="step", ylabel="nats per token", ylim=(None, np.quantile(table[:, 1], 0.98)))
    axes.figure.savefig(folder / "tmp.png")
    np.savez(folder / "tmp.npz", *jax.tree.leaves((state, losses, step)), **facts)
    for name in ("loss.csv", "loss.png", "checkpoint.npz"):
        (folder / f"tmp.{name[-3:]}").replace(folder / name)


def restore(path: Path, facts: dict, state: tuple[nnx.State, np.ndarray, int]) -> tuple:
    """Reads a checkpoint, unless it is damaged (reading compares checksums) or of another run."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            saved = dict(arrays)
            then = {name: saved.pop(name).item() for name in facts}
    except Exception as error:  # of many types
        raise ValueError(f"{path}: damaged or another program's, remove it") from error
    if differ := {name: then[name] for name in facts if then[name] != facts[name]}:
        raise ValueError(f"--resume needs the settings of {path}: {differ}")
    return jax.tree.unflatten(jax.tree.structure(state), saved.values())


def main(arguments: list[str] | None = None) -> None:
    """Trains, or continues to train, and shows what came out."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="FILE", help="text, or FineWeb shards (.bin)")
    add("--out", type=Path, default="runs/nanogpt", help="folder (default: runs/nanogpt)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--optimizer", choices=("unconstrained_scion", "scion"), default="unconstrained_scion")
    add("--tied", action="store_true", help="use the embedding as the head, too")
    for name, default in NUMBERS.items():
        add(f"--{name}".replace("_", "-"), type=int, default=default, help=f"default: {default}")
    for name in ("--learning-rate", "--hidden-radius", "--head-radius"):
        add(name, type=float, default=0.0, help="default: what suits the optimizer")
    settings = parser.parse_args(arguments)
    if min(vars(settings)[name] for name in NUMBERS) < 1 or settings.width % (2 * settings.heads):
        raise ValueError("numbers must be positive, and --width a multiple of two times --heads")
    tokens, vocabulary = read_tokens(settings.data)
    first, held_out = np.split(tokens[-1], [len(tokens[-1]) * 9 // 10])
    text, length = [*tokens[:-1], first], settings.sequence + 1
    if min(map(len, [*text, held_out])) < length:
        raise ValueError(f"{len(tokens[-1])} tokens are too few for --sequence {settings.sequence}")
    settings.data = ", ".join(f"{len(x)} tokens, CRC {zlib.crc32(x[: 2**24]):x}" for x in tokens)
    facts = {**vars(settings), "out": "", "resume": "", "overwrite": "", "sample_length": ""}
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "checkpoint.npz"
    if settings.overwrite:
        path.unlink(missing_ok=True)
    if path.exists() and not settings.resume:
        raise ValueError(f"{settings.out} holds a run: give --resume, --overwrite or another --out")
    sizes = (settings.width, settings.layers, settings.heads, settings.tied)
    model = GPT(vocabulary, *sizes, nnx.Rngs(settings.seed))
    algorithm = scion_jax.scion if settings.optimizer == "scion" else scion_jax.unconstrained_scion
    ball = 8 if settings.optimizer == "scion" else 1  # where parameters stay in it: large
    hidden, head = settings.hidden_radius or 0.5 * ball, settings.head_radius or 8.0 * ball
    hidden, last, rows = Spectral(hidden), Sign(head, zero_init=True), np.zeros((1, length), "i")
    norms = infer_norms(mean_loss, model, rows, hidden=hidden, last=last)
    params = nnx.state(model, nnx.Param)
    print(scion_jax.describe(params, norms))
    nnx.update(model, init_params(jax.random.key(settings.seed), params, norms))
    rate, decay = settings.learning_rate or 2**-5 / ball, max(1, round(0.285 * settings.steps))
    schedule = optax.linear_schedule(rate, 0.0, decay, settings.steps - decay)
    run = model, nnx.Optimizer(model, algorithm(schedule, norms), wrt=nnx.Param)
    state = nnx.state(run), np.full((settings.steps, 2), np.nan, "f"), 0
    state, losses, start = restore(path, facts, state) if path.exists() else state
    nnx.update(run, state)
    validate, predict = nnx.jit(mean_loss), nnx.jit(GPT.__call__)
    rows = held_out[: len(held_out) // length * length].reshape(-1, length)
    even = rows[np.linspace(0, len(rows) - 1, 32 * settings.batch).astype(int)].astype(np.int32)
    draw = partial(random_windows, seed=settings.seed, batch=settings.batch, length=length)
    for step in (bar := tqdm(range(start, settings.steps, CHUNK), unit_scale=CHUNK)):
        stop = min(step + CHUNK, settings.steps)
        windows = [draw(text[k % len(text)], step=k) for k in range(step, stop)]
        losses[step:stop, 0] = train(run, np.stack(windows))[1]
        bar.set_postfix(loss=losses[stop - 1, 0])
        if stop % settings.save_every == 0 or stop == settings.steps:
            losses[stop - 1, 1] = np.mean([validate(model, batch) for batch in np.split(even, 32)])
            save(settings.out, facts, nnx.state(run), losses, stop)
    sample, generator = even[0, 1:], np.random.default_rng(settings.seed)
    for _ in range(settings.sample_length):
        scores = predict(model, sample[None, -settings.sequence :])[0, -1] / 0.7
        sample = np.append(sample, np.argmax(scores + generator.gumbel(size=vocabulary)))
    print(bytes(sample.tolist()).decode(errors="replace") if vocabulary == 256 else sample)
    print(f"validation loss {losses[-1, 1]:.4f} nats per token; see {settings.out}/loss.png")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"nanogpt.py: {error}") from error
