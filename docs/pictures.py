"""Draws the documentation's pictures, each for light and for dark pages.

python docs/pictures.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Polygon, Rectangle

from scion_jax import (
    Euclidean,
    ExactPolar,
    NewtonSchulz,
    Norm,
    Sign,
    Spectral,
    scion,
    unconstrained_scion,
)

FOLDER = Path(__file__).parent / "pages" / "pictures"
SCHEMES = {  # text, blue, orange, green, a filling
    "light": ("#333333", "#3355bb", "#d2601a", "#2f8f4e", "#dfe5f7"),
    "dark": ("#d5d7de", "#8fa8ff", "#ff9f5e", "#7bd196", "#333a55"),
}

Colours = tuple[str, str, str, str, str]


def arrow(axes: Axes, end: np.ndarray, colour: str, name: str, start: Any = (0, 0)) -> None:
    """Draws an arrow with its name at the tip."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    axes.annotate(name, end, xytext=(6, 5), textcoords="offset points", color=colour, size=13)


def plane(axes: Axes, title: str, reach: float) -> None:
    """Makes an empty plane with its two axes."""
    axes.set(title=title, aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    axes.axhline(0, lw=0.5, color="grey")
    axes.axvline(0, lw=0.5, color="grey")
    axes.axis("off")


def balls(colours: Colours) -> None:
    """Three balls, a gradient, and the point of each ball that is furthest along it."""
    _, blue, orange, _, filling = colours
    d = np.array([1.5, 0.75])
    corner = {"facecolor": filling, "edgecolor": blue, "lw": 1.5}
    unit = d / np.linalg.norm(d)
    panels: dict[str, tuple[Any, np.ndarray]] = {
        "Euclidean: a direction": (Circle((0, 0), 1, **corner), unit),
        "Sign: a corner": (Rectangle((-1, -1), 2, 2, **corner), np.array([1.0, 1.0])),
        "sum of entries: one entry": (
            Polygon([(1, 0), (0, 1), (-1, 0), (0, -1)], **corner),
            np.array([1.0, 0.0]),
        ),
    }
    _, row = plt.subplots(1, 3, figsize=(9, 3.2))
    for axes, (title, (ball, v)) in zip(row, panels.items(), strict=True):
        plane(axes, title, 1.75)
        axes.add_patch(ball)
        along = np.array([-d[1], d[0]])
        line = np.stack([v - 2 * along, v + 2 * along]).T
        axes.plot(*line, "--", lw=1, color="grey")
        arrow(axes, d, orange, "d")
        arrow(axes, v, blue, "")
        axes.plot(*v, "o", color=blue)
        axes.annotate(
            "v",
            v,
            xytext=(-4, 8) if v[1] == 1 else (2, -18),
            textcoords="offset points",
            color=blue,
            size=13,
        )


def singular_values(colours: Colours) -> None:
    """A gradient's singular values, and those of its LMO: exact and by the default."""
    _, blue, orange, green, _ = colours
    low_rank = jax.random.normal(jax.random.key(0), (2, 32, 4))
    d = low_rank[0] @ low_rank[1].T + 0.3 * jax.random.normal(jax.random.key(1), (32, 32))
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    number = np.arange(1, 33)
    left.bar(number, jnp.linalg.svd(d, compute_uv=False), color=orange)
    left.set(title="singular values of d", xlabel="number")
    methods = {"exact": (ExactPolar(), blue), "NewtonSchulz()": (NewtonSchulz(), green)}
    for name, (method, colour) in methods.items():
        values = jnp.linalg.svd(Spectral(orthogonalizer=method).lmo(d), compute_uv=False)
        right.plot(number, values, ".-", color=colour, label=name)
    right.set(title="singular values of lmo(d)", xlabel="number", ylim=(0, 1.3))
    right.legend()


def newton_schulz(colours: Colours) -> None:
    """What each set of coefficients makes of one singular value."""
    _, blue, orange, green, _ = colours
    sigma = jnp.logspace(-3.5, 0, 300)
    _, axes = plt.subplots(figsize=(7, 3.2))
    sets = {"minimax": blue, "polar_express": green, "quintic": orange}
    for name, colour in sets.items():
        # In a diagonal matrix with a 1, divided by the Frobenius norm that it is given.
        method = NewtonSchulz(name, compute_dtype=jnp.float32, schatten=2)
        values = [at(s, method) for s in sigma]
        steps = 4 if name == "minimax" else 5
        axes.semilogx(sigma, values, color=colour, label=f'"{name}", {steps} steps')
    axes.axhline(1, lw=0.8, ls="--", color="grey")
    axes.set(xlabel="singular value σ of the normalized matrix", ylabel="after the steps")
    axes.legend()


def at(sigma: jax.Array, method: NewtonSchulz) -> float:
    """Returns what the steps make of a singular value, in a 2 × 2 matrix of Frobenius norm 1."""
    diagonal = jnp.diag(jnp.stack([sigma, jnp.sqrt(1 - sigma**2)]))
    return float(method.polar(diagonal[None])[0, 0, 0])


def steps(colours: Colours) -> None:
    """Paths of both optimizers towards a target outside of the ball."""
    _, blue, orange, green, filling = colours
    _, row = plt.subplots(1, 2, figsize=(8, 3.6))
    target, start = jnp.array([1.6, 0.5]), jnp.array([-0.5, -0.7])
    schedule = optax.linear_schedule(0.25, 0.0, 30)
    kinds = {"scion": (scion, blue), "unconstrained_scion": (unconstrained_scion, green)}
    for axes, (name, (build, colour)) in zip(row, kinds.items(), strict=True):
        plane(axes, name, 1.9)
        axes.add_patch(Circle((0, 0), 1, facecolor=filling, edgecolor=colour, lw=1.5))
        optimizer = build(schedule, Euclidean(), momentum=1.0)
        x, state, path = start, optimizer.init(start), [start]
        for _ in range(30):
            updates, state = optimizer.update(x - target, state, x)
            x = optax.apply_updates(x, updates)
            path.append(x)
        axes.plot(*np.stack(path).T, ".-", color=colour)
        axes.plot(*target, "*", color=orange, ms=12)
        axes.annotate("minimum", target, (-20, 10), textcoords="offset points", color=orange)


def transfer(colours: Colours) -> None:
    """By how much a step of one example's gradient changes what the layer makes of that example."""
    _, blue, orange, green, _ = colours
    rules: dict[str, tuple[Norm, str, str]] = {
        "entries of one size (Adam, sign descent)": (Sign(1 / 64, normalized=False), orange, "o-"),
        "Spectral()": (Spectral(orthogonalizer=ExactPolar()), blue, "o-"),
        "Sign(), as for the last layer": (Sign(), green, "s--"),
    }
    widths = 2 ** np.arange(4, 12)
    generator = np.random.default_rng(0)
    _, axes = plt.subplots(figsize=(7, 3.4))
    for name, (norm, colour, marker) in rules.items():
        changes = []
        for width in widths:
            x, error = generator.normal(size=(2, width)).astype(np.float32)
            # A rank-one gradient has the LMO u vᵀ: no singular value decomposition of 2,048 rows.
            exact = np.outer(x / np.linalg.norm(x), error / np.linalg.norm(error))
            step = exact if isinstance(norm, Spectral) else norm.lmo(jnp.outer(x, error))
            changes.append(rms(x @ np.asarray(step)) / rms(x))
        axes.loglog(widths, changes, marker, color=colour, label=name, base=2)
    axes.set(xlabel="width", ylabel="change of the output\nfor inputs of RMS 1")
    axes.legend()


def rms(x: np.ndarray) -> float:
    """Computes the root mean square."""
    return float(np.sqrt(np.mean(x**2)))


def layouts(colours: Colours) -> None:
    """Arrays as they lie, and which of their axes and parts are what."""
    text, blue, orange, green, filling = colours
    _, row = plt.subplots(1, 5, figsize=(11, 2.9))
    names = {"i": ("input", blue), "o": ("output", orange), "b": ("layers", green)}

    def box(axes: Axes, x: float, y: float, width: float, height: float) -> None:
        axes.add_patch(Rectangle((x, y), width, height, fc=filling, ec=text, lw=1))

    def name(axes: Axes, letter: str, x: float, y: float, turn: float = 0) -> None:
        word, colour = names[letter]
        axes.text(x, y, word, color=colour, rotation=turn, ha="center", va="center", size=12)

    for axes, title in zip(
        row,
        ["io\nFlax", "oi\nPyTorch, Equinox", "bio\nscanned", "io[3]\nfused", "ioo\nheads"],
        strict=True,
    ):
        axes.set(xlim=(-0.45, 2.3), ylim=(-0.3, 2.1), aspect="equal", title=title)
        axes.axis("off")
    io, oi, bio, fused, heads = row
    box(io, 0, 0.2, 1.8, 1.1)
    name(io, "o", 0.9, 1.5)
    name(io, "i", -0.2, 0.75, 90)
    box(oi, 0, 0, 1, 1.6)
    name(oi, "i", 0.5, 1.8)
    name(oi, "o", -0.2, 0.8, 90)
    for shift in (0.6, 0.3, 0):
        box(bio, shift, shift, 1.4, 0.9)
    name(bio, "o", 0.7, -0.2)
    name(bio, "i", -0.2, 0.45, 90)
    name(bio, "b", 0.15, 1.5, 45)
    for number, letter in enumerate("qkv"):
        box(fused, 0.7 * number, 0.2, 0.7, 1.1)
        fused.text(0.7 * number + 0.35, 0.75, letter, color=text, ha="center", va="center")
    name(fused, "o", 1.05, 1.5)
    name(fused, "i", -0.2, 0.75, 90)
    for shift in (0.5, 0.25, 0):
        box(heads, shift, shift, 1.4, 0.9)
    name(heads, "o", 0.7, -0.2)
    name(heads, "i", -0.2, 0.45, 90)
    heads.text(0.1, 1.4, "output", color=orange, rotation=45, ha="center", va="center", size=12)


def draw(picture: Callable[[Colours], None]) -> None:
    """Writes one picture in both schemes."""
    name = picture.__name__.replace("_", "-")
    for scheme, colours in SCHEMES.items():
        text = colours[0]
        coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        settings = dict.fromkeys(coloured, text) | {
            "axes.facecolor": "none",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.facecolor": "none",
            "font.size": 11,
            "legend.framealpha": 0,
            "svg.fonttype": "none",  # letters stay text, in the reader's sans serif
            "svg.hashsalt": name,  # the same file from the same program
        }
        with plt.rc_context(settings):
            picture(colours)
            plt.tight_layout()
            file = FOLDER / f"{name}-{scheme}.svg"
            plt.savefig(file, bbox_inches="tight", metadata={"Date": None})
            plt.close()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for picture in (balls, singular_values, newton_schulz, steps, transfer, layouts):
        draw(picture)
