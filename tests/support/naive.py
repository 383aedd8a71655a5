"""Naive float64 restatements, straight from the formulas: loops over matrices, SVDs, no reuse."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def to_matrices(array, layout):
    """Takes an array apart, entry by entry, into {batch index: matrix (d_out, k·d_in)}."""
    array = np.asarray(array, np.float64)
    roles = {role: [a for a, letter in enumerate(layout) if letter in role] for role in "bo"}
    roles["c"] = [a for a, letter in enumerate(layout) if letter in "is"]
    if array.ndim == 0:
        return {0: array.reshape(1, 1)}
    sizes = {role: [array.shape[a] for a in axes] for role, axes in roles.items()}
    shape = {role: int(np.prod(size)) for role, size in sizes.items()}
    matrices = {b: np.zeros((shape["o"], shape["c"])) for b in range(shape["b"])}
    for index, value in np.ndenumerate(array):
        b, o, c = (
            int(np.ravel_multi_index([index[a] for a in roles[r]], sizes[r])) if roles[r] else 0
            for r in "boc"
        )
        matrices[b][o, c] = value
    return matrices


def from_matrices(matrices, layout, shape):
    """Puts an array together again from its matrices."""
    array = np.zeros(shape)
    positions = to_matrices(np.arange(array.size).reshape(shape), layout)
    for b, matrix in matrices.items():
        for (o, c), position in np.ndenumerate(positions[b]):
            array.reshape(-1)[int(position)] = matrix[o, c]
    return array


def fan(shape, layout):
    """Returns (d_out, d_in, k)."""
    if not shape:
        return 1, 1, 1
    return tuple(
        int(np.prod([n for n, letter in zip(shape, layout, strict=True) if letter == role]))
        for role in "ois"
    )


def polar(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    keep = s > 1e-13 * max(s.max(initial=0), 1e-300)
    return (u * keep) @ vt


def sphere(matrix, axis=None):
    length = np.sqrt(np.sum(matrix**2, axis=axis, keepdims=True)) + 0 * matrix
    return np.divide(matrix, length, out=np.zeros_like(matrix), where=length != 0)


def spectral_scale(o, i, k, normalized=True, max=False, rms=False):
    if rms:
        return np.sqrt(np.maximum(o, k * i))
    root = np.sqrt(o / i) if normalized else np.sqrt(o)
    return (np.maximum(1.0, root) if max else root) / k


class Ball(NamedTuple):
    """The unit ball of a norm, for one matrix.

    Attributes:
        lmo: The maximizer over the ball of size 1.
        norm: Whose size is 1.
        scale: The size, of `(d_out, d_in, k)` and the norm's options.
    """

    lmo: Callable[[np.ndarray], np.ndarray]
    norm: Callable[[np.ndarray], float]
    scale: Callable[..., float]


_spectral = Ball(polar, lambda m: np.linalg.norm(m, 2), spectral_scale)
BALLS = {
    "Spectral": _spectral,
    "SpectralConv": _spectral,
    "Sign": Ball(
        np.sign,
        lambda m: np.abs(m).max(),
        lambda o, i, k, normalized=True: 1 / (i * k) if normalized else 1.0,
    ),
    "ColNorm": Ball(
        functools.partial(sphere, axis=0),
        lambda m: np.linalg.norm(m, axis=0).max(),
        lambda o, i, k, normalized=False: np.sqrt(o) / (i * k if normalized else 1),
    ),
    "RowNorm": Ball(
        functools.partial(sphere, axis=1),
        lambda m: np.linalg.norm(m, axis=1).max(),
        lambda o, i, k, normalized=True: 1 / np.sqrt(i * k) if normalized else 1.0,
    ),
    "BiasRMS": Ball(sphere, np.linalg.norm, lambda o, i, k: np.sqrt(o * i * k)),
    "Euclidean": Ball(sphere, np.linalg.norm, lambda o, i, k: 1.0),
}


def _read(name, array, layout, options):
    """Finds the ball, its size, and the matrices."""
    if name == "Auto":
        name = "BiasRMS" if len(layout.replace("b", "")) <= 1 or not array.shape else "Spectral"
    ball = BALLS[name]
    return ball, ball.scale(*fan(array.shape, layout), **options), to_matrices(array, layout)


def lmo(name, array, layout, radius=1.0, **options):
    """`radius · argmax_{‖x‖≤1} ⟨d, x⟩` of a whole array."""
    ball, scale, matrices = _read(name, np.asarray(array, np.float64), layout, options)
    units = {b: radius * scale * ball.lmo(m) for b, m in matrices.items()}
    return from_matrices(units, layout, np.shape(array))


def gauge(name, array, layout, radius=1.0, **options):
    """`‖x‖ / radius`, the maximum over the matrices."""
    ball, scale, matrices = _read(name, np.asarray(array, np.float64), layout, options)
    return max(ball.norm(m) for m in matrices.values()) / scale / radius


def gauge_bound(name, array, layout, radius=1.0, **options):
    """`gauge` by the Schatten-256 norm in place of the spectral norm, as the short step has it."""
    if not name.startswith("Spectral"):
        return gauge(name, array, layout, radius, **options)
    _, scale, matrices = _read(name, np.asarray(array, np.float64), layout, options)
    sigma = [np.linalg.svd(m, compute_uv=False) for m in matrices.values()]
    return max(s[0] * np.linalg.norm(s / s[0], 256) for s in sigma) / scale / radius


def dual_norm(name, array, layout, radius=1.0, **options):
    """`radius · ‖d‖_*`: what the maximizer attains, summed over the matrices."""
    maximizer = lmo(name, array, layout, radius, **options)
    return float(np.sum(np.asarray(array, np.float64) * maximizer))
