"""Naive float64 restatements, straight from the formulas: loops over matrices, SVDs, no reuse."""

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


def spectral_radius(d_out, d_in, k, normalized=True, at_least_one=False):
    root = np.sqrt(d_out / d_in) if normalized else np.sqrt(d_out)
    return (max(1.0, root) if at_least_one else root) / k


def polar(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    keep = s > 1e-13 * max(s.max(initial=0), 1e-300)
    return (u * keep) @ vt


def divide(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def sphere(matrix, axis=None):
    return divide(matrix, np.sqrt(np.sum(matrix**2, axis=axis, keepdims=True)) + 0 * matrix)


def unit_lmo(name, matrix, d_out, d_in, k, options):
    """The maximizer over the unit ball, for one matrix."""
    n = d_in * k
    if name in ("Spectral", "SpectralConv"):
        c = spectral_radius(
            d_out, d_in, k, options.get("normalized", True), options.get("max", False)
        )
        return c * polar(matrix)
    if name == "Sign":
        return np.sign(matrix) / (n if options.get("normalized", True) else 1)
    if name == "ColNorm":
        scale = np.sqrt(d_out) / (n if options.get("normalized", False) else 1)
        return scale * sphere(matrix, axis=0)
    if name == "RowNorm":
        scale = 1 / np.sqrt(n) if options.get("normalized", True) else 1.0
        return scale * sphere(matrix, axis=1)
    if name == "BiasRMS":
        return np.sqrt(matrix.size) * sphere(matrix)
    if name == "Euclidean":
        return sphere(matrix)
    raise KeyError(name)


def unit_norm(name, matrix, d_out, d_in, k, options):
    """The norm of one matrix."""
    n = d_in * k
    if name in ("Spectral", "SpectralConv"):
        c = spectral_radius(
            d_out, d_in, k, options.get("normalized", True), options.get("max", False)
        )
        return np.linalg.norm(matrix, 2) / c
    if name == "Sign":
        return np.abs(matrix).max() * (n if options.get("normalized", True) else 1)
    if name == "ColNorm":
        scale = np.sqrt(d_out) / (n if options.get("normalized", False) else 1)
        return np.linalg.norm(matrix, axis=0).max() / scale
    if name == "RowNorm":
        scale = 1 / np.sqrt(n) if options.get("normalized", True) else 1.0
        return np.linalg.norm(matrix, axis=1).max() / scale
    if name == "BiasRMS":
        return np.sqrt(np.mean(matrix**2))
    if name == "Euclidean":
        return np.linalg.norm(matrix)
    raise KeyError(name)


def resolve_auto(name, shape, layout):
    if name != "Auto":
        return name
    return "BiasRMS" if len([c for c in layout if c != "b"]) <= 1 or not shape else "Spectral"


def lmo(name, array, layout, radius=1.0, **options):
    """`radius · argmax_{‖x‖≤1} ⟨d, x⟩` of a whole array."""
    array = np.asarray(array, np.float64)
    name = resolve_auto(name, array.shape, layout)
    parts = to_matrices(array, layout)
    sizes = fan(array.shape, layout)
    units = {b: radius * unit_lmo(name, m, *sizes, options) for b, m in parts.items()}
    return from_matrices(units, layout, array.shape)


def gauge(name, array, layout, radius=1.0, **options):
    """`‖x‖ / radius`, the maximum over the matrices."""
    array = np.asarray(array, np.float64)
    name = resolve_auto(name, array.shape, layout)
    sizes = fan(array.shape, layout)
    parts = to_matrices(array, layout).values()
    return max(unit_norm(name, m, *sizes, options) for m in parts) / radius


def dual_norm(name, array, layout, radius=1.0, **options):
    """`radius · ‖d‖_*`: what the maximizer attains, summed over the matrices."""
    return float(
        np.sum(np.asarray(array, np.float64) * lmo(name, array, layout, radius, **options))
    )
