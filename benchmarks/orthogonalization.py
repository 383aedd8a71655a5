"""Accuracy, work and time of the ways to orthogonalize, on several kinds of matrices.

    python -m benchmarks.orthogonalization
    python -m benchmarks.orthogonalization --rows 128 --count 8 --rounds 15
    python -m benchmarks.momentum_matrices momentum.npz
    python -m benchmarks.orthogonalization --matrices momentum.npz    # also on real ones

For a matrix `d` with singular values σ and its approximate polar factor `v`, judged by singular
value decompositions in float64:

    alignment    ⟨d, v⟩ / (Σσ · ‖v‖), the share of the best decrease that a step as long as `v`
                 gets; 1 for the exact polar factor. The median of the matrices.
    gauge        ‖v‖, the largest singular value of `v`; above 1 the step leaves the ball. The
                 largest of the matrices.
    lowest gain  the smallest `uᵀ v w` over the pairs of singular vectors (u, w) of `d` whose σ is
                 at least 0.005 of ‖d‖_F; 1 for the exact polar factor. The lowest of the matrices.
    MFLOP        of the matrix products, for one matrix.
    time         that of all matrices as one stack, as a multiple of the peer's.

The peer is Muon's and the published Scion's method: five raw quintic steps in bfloat16. Flags: LOW
if the alignment is below the peer's by more than rounding makes, OUT if the gauge exceeds 1.01, NAN
if a result is not finite.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flops import flops
from benchmarks.reporting import (
    Record,
    alternating_times,
    make_parser,
    markdown,
    medians,
    record,
    report,
)
from scion_jax import ExactPolar, NewtonSchulz, orthogonalize
from scion_jax.polar import Orthogonalizer
from scion_jax.polar._coefficients import steps_of

Array = np.ndarray[Any, Any]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
OURS, PEER = "default", "quintic, 5 steps, bfloat16"
EXACT = "exact"
EXACT_LIMIT = 512  # rows beyond which nobody would wait for the decomposition

MATTERS = 0.005  # of the Frobenius norm: smaller singular values hardly count in ⟨d, v⟩
ROUNDING = 1e-3  # what a dtype alone may change of an alignment
LARGEST_GAUGE = 1.01


@dataclass(frozen=True)
class Quality:
    """What a method does to the matrices of a case; the module's docstring explains the figures.

    Attributes:
        alignment: The median.
        gauge: The largest.
        gain: The lowest.
        megaflops: For one matrix; None if the method is not made of matrix products.
        seconds: For all matrices.
        finite: Whether all results are; if not, the first three are zero.
    """

    alignment: float
    gauge: float
    gain: float
    megaflops: float | None
    seconds: float
    finite: bool


def methods() -> dict[str, Orthogonalizer]:
    """Returns what is compared, by name."""
    default = NewtonSchulz()
    own_steps = len(steps_of(default.coefficients, default.steps))
    named: dict[str, Orthogonalizer] = {OURS: default}
    for dtype_name, dtype in DTYPES.items():
        for steps in sorted({own_steps, 5, 6}):
            named[f"{default.coefficients}, {steps} steps, {dtype_name}"] = NewtonSchulz(
                steps=steps, compute_dtype=dtype
            )
        for coefficients in ("polar_express", "quintic"):
            named[f"{coefficients}, 5 steps, {dtype_name}"] = NewtonSchulz(
                coefficients, 5, compute_dtype=dtype
            )
    return named | {EXACT: ExactPolar()}


def _with_spectrum(generator: np.random.Generator, shape: tuple[int, ...], sigma: Array) -> Array:
    """Draws matrices with given singular values, their singular vectors uniform."""
    count, rows, columns = shape
    left, _ = np.linalg.qr(generator.standard_normal((count, rows, len(sigma))))
    right, _ = np.linalg.qr(generator.standard_normal((count, columns, len(sigma))))
    return left * sigma @ right.mT


def synthetic_cases(rows: int, count: int) -> dict[str, Array]:
    """Draws matrices that are easy and hard to orthogonalize.

    Args:
        rows: Number of rows, the smaller dimension.
        count: Number of matrices in each case.

    Returns:
        Stacks `(count, rows, columns)` in float32, by name.
    """
    generator = np.random.default_rng(0)
    decaying = 10 ** (-6 * np.arange(1, rows + 1) / rows)
    cases = {
        f"Gaussian, {rows} × {aspect * rows}": generator.standard_normal(
            (count, rows, aspect * rows)
        )
        for aspect in (1, 4, 16)
    }
    for aspect in (1, 4):
        shape = (count, rows, aspect * rows)
        name = f"σ_j = 10^(−6 j/n), {rows} × {aspect * rows}"
        cases[name] = _with_spectrum(generator, shape, decaying)
    square = (count, rows, rows)
    cases[f"rank 1, {rows} × {rows}"] = _with_spectrum(generator, square, np.ones(1))
    thin = generator.standard_normal((2, count, rows, math.ceil(rows / 2)))
    cases[f"half rank, {rows} × {rows}"] = thin[0] @ thin[1].mT
    return {name: stack.astype(np.float32) for name, stack in cases.items()}


def saved_cases(path: Path) -> dict[str, Array]:
    """Reads matrices that momentum_matrices.py saved.

    Args:
        path: The file.

    Returns:
        The matrices, transposed to `rows ≤ columns`, those of one shape as a stack; by name.
    """
    stacks: dict[tuple[int, int], list[Array]] = {}
    with np.load(path, allow_pickle=False) as matrices:
        for matrix in matrices.values():
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            stacks.setdefault(wide.shape, []).append(wide)
    return {
        f"momentum, {rows} × {columns}, {len(stack)} matrices": np.stack(stack).astype(np.float32)
        for (rows, columns), stack in stacks.items()
    }


def judge(polar: Array, decomposition: tuple[Array, Array, Array]) -> tuple[float, float, float]:
    """Judges an approximate polar factor.

    Args:
        polar: The approximation, in float64.
        decomposition: `U, σ, Vᵀ` of the matrix.

    Returns:
        Alignment, gauge and lowest gain.
    """
    u, sigma, vt = decomposition
    gains = np.sum((u.T @ polar) * vt, axis=1)
    gauge = np.linalg.svd(polar, compute_uv=False)[0]
    alignment = gains @ sigma / (sigma.sum() * gauge)
    matter = sigma >= MATTERS * np.linalg.norm(sigma)
    return float(alignment), float(gauge), float(gains[matter].min())


def evaluate(matrices: Array, named: dict[str, Orthogonalizer], rounds: int) -> dict[str, Quality]:
    """Runs methods on a stack of matrices, in turns.

    Args:
        matrices: Shape `(count, rows, columns)` with `rows ≤ columns`, float32.
        named: The methods.
        rounds: How often each is timed.

    Returns:
        What each does.
    """
    stack = jnp.asarray(matrices)
    functions = {
        name: jax.jit(lambda stack, method=method: orthogonalize(stack, method))
        for name, method in named.items()
    }
    calls = {name: lambda run=run: run(stack) for name, run in functions.items()}
    times = medians(alternating_times(calls, rounds))
    decompositions = [
        np.linalg.svd(matrix, full_matrices=False) for matrix in matrices.astype(np.float64)
    ]
    qualities = {}
    for name, method in named.items():
        polars = np.asarray(calls[name]()).astype(np.float64)
        finite = bool(np.isfinite(polars).all())
        pairs = zip(polars, decompositions, strict=True) if finite else ()
        judged = [judge(polar, decomposition) for polar, decomposition in pairs]
        alignments, gauges, gains = zip(*judged, strict=True) if finite else ([0.0],) * 3
        work = flops(method, *matrices.shape[1:]) if isinstance(method, NewtonSchulz) else None
        qualities[name] = Quality(
            float(np.median(alignments)),
            max(gauges),
            min(gains),
            None if work is None else work / 1e6,
            times[name],
            finite,
        )
    return qualities


def flags(quality: Quality, peer: Quality) -> str:
    """Says what is wrong with a method, as the module's docstring explains."""
    if not quality.finite:
        return "NAN"
    found = {
        "LOW": quality.alignment < peer.alignment - ROUNDING,
        "OUT": quality.gauge > LARGEST_GAUGE,
    }
    return " ".join(name for name, is_so in found.items() if is_so)


def table(qualities: dict[str, Quality]) -> str:
    """Formats the figures of a case."""
    titles = ("method", "flags", "alignment", "gauge", "lowest gain", "MFLOP", "time")
    peer = qualities[PEER]
    rows = [
        [
            name,
            flags(quality, peer),
            f"{quality.alignment:.4f}",
            f"{quality.gauge:.4f}",
            f"{quality.gain:.4f}",
            "–" if quality.megaflops is None else f"{quality.megaflops:.4g}",
            f"{quality.seconds / peer.seconds:.2f}",
        ]
        for name, quality in qualities.items()
    ]
    return markdown(titles, rows, texts=2)


def records(case: str, qualities: dict[str, Quality]) -> list[Record]:
    """Compares the default, in every dtype, with the peer."""
    peer = qualities[PEER]
    default = NewtonSchulz()
    own_steps = len(steps_of(default.coefficients, default.steps))
    prefix = f"{default.coefficients}, {own_steps} steps, "
    return [
        record(f"orthogonalization: {quantity}", f"{case}, {name}", ours, PEER, theirs, unit)
        for name, quality in qualities.items()
        if name == OURS or name.startswith(prefix)
        for quantity, ours, theirs, unit in (
            ("alignment", quality.alignment, peer.alignment, "of the optimum"),
            ("gauge", quality.gauge, peer.gauge, "radii"),
            ("time", 1e3 * quality.seconds, 1e3 * peer.seconds, "ms"),
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each case.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, default=256, help="of the matrices (default: 256)")
    parser.add_argument("--count", type=int, default=4, help="matrices in a case (default: 4)")
    parser.add_argument(
        "--matrices", type=Path, metavar="FILE.npz", help="also judge on these matrices"
    )
    options = parser.parse_args(arguments)
    cases = synthetic_cases(options.rows, options.count)
    if options.matrices:
        cases |= saved_cases(options.matrices)
    tables: list[str] = []
    comparisons: list[Record] = []
    for case, matrices in cases.items():
        named = methods()
        if matrices.shape[1] > EXACT_LIMIT:
            del named[EXACT]
        qualities = evaluate(matrices, named, options.rounds)
        tables += [case, table(qualities)]
        comparisons += records(case, qualities)
    report(f"Orthogonalization; peer: {PEER}", tables, comparisons, options.json)


if __name__ == "__main__":
    main()
