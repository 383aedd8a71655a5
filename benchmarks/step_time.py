"""Time of one optimizer update on the hidden matrices of a GPT-2, by optimizer.

    python -m benchmarks.step_time                              # a Markdown table
    python -m benchmarks.step_time --cases 2x768 --rounds 15    # layers x width
    python -m benchmarks.step_time --reference scion.py         # also the published PyTorch code

Measured is the compiled `jax.jit(optimizer.update)`, nothing donated, until its results are there.
All optimizers run in one process, in turns: one call of each per round, in an order drawn anew for
each round, and the medians are compared.

``--reference`` names scion.py of the authors' repository, and needs PyTorch; reference.py says how
it is run. One `Scion.step()` with the `Spectral` norm is timed on the same matrices, once with the
iteration in bfloat16 as published and once in float32 (``--reference-dtypes``: where bfloat16 is
emulated, a published step at width 768 takes minutes). That step also adds the updates to the
parameters.

Below the table stands how much of the machine the default uses: the floating-point operations of
its matrix products, by the second, and to compare with them those of a plain product of as many
square matrices as the tree has, of the default's compute dtype, compiled by JAX and timed in the
same rounds.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks.block_trees import SQUARE_PER_LAYER, block_shapes, gaussian_like, necessary_flops
from benchmarks.reference import DTYPES, reference_call
from benchmarks.reporting import (
    Record,
    alternating_times,
    make_parser,
    markdown,
    medians,
    record,
    report,
)
from scion_jax import NewtonSchulz, Spectral, scion, unconstrained_scion

Call = Callable[[], Any]
Times = dict[str, list[float]]  # in seconds, by optimizer

LEARNING_RATE = 1e-3
DEFAULT = "unconstrained_scion"
COMPUTED_IN = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
OURS: dict[str, optax.GradientTransformation] = {
    DEFAULT: unconstrained_scion(LEARNING_RATE, Spectral()),
    "scion": scion(LEARNING_RATE, Spectral()),
} | {
    f"{DEFAULT}, {name}": unconstrained_scion(
        LEARNING_RATE, Spectral(orthogonalizer=NewtonSchulz(compute_dtype=dtype))
    )
    for name, dtype in COMPUTED_IN.items()
}
PEERS: dict[str, optax.GradientTransformation] = {
    "optax.contrib.muon": optax.contrib.muon(LEARNING_RATE),
    "optax.adamw": optax.adamw(LEARNING_RATE),
}
PRODUCT = "product"


def update_call(optimizer: optax.GradientTransformation, params: Any, gradient: Any) -> Call:
    """Compiles an optimizer's update.

    Args:
        optimizer: The optimizer.
        params: The parameters.
        gradient: Their gradient.

    Returns:
        A function that makes one update from the state after the first.
    """
    update = jax.jit(optimizer.update)
    _, state = update(gradient, optimizer.init(params), params)
    return lambda: update(gradient, state, params)


def product_call(layers: int, width: int) -> Call:
    """Compiles a product of as many square matrices as the tree has, `product_flops` of work."""
    shape = jax.ShapeDtypeStruct((SQUARE_PER_LAYER * layers, width, width), jnp.float32)
    left, right = gaussian_like((shape, shape), seed=2)
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(left, right)


def product_flops(layers: int, width: int) -> int:
    """Returns the floating-point operations of `product_call`."""
    return SQUARE_PER_LAYER * layers * 2 * width**3


def measure(
    layers: int,
    width: int,
    rounds: int,
    reference: Path | None = None,
    dtypes: Sequence[str] = DTYPES,
) -> Times:
    """Times an update of every optimizer, and the product.

    Args:
        layers: The number of layers of the block tree.
        width: Its width.
        rounds: How often.
        reference: The published code's file, or None to leave it out.
        dtypes: What its iteration is run in.

    Returns:
        The seconds of each, one number per round.
    """
    shapes = block_shapes(layers, width)
    params, gradient = gaussian_like(shapes, seed=0), gaussian_like(shapes, seed=1)
    calls: dict[str, Call] = {
        name: update_call(optimizer, params, gradient) for name, optimizer in (OURS | PEERS).items()
    }
    if reference:
        for dtype in dtypes:
            name, call = reference_call(reference, shapes, LEARNING_RATE, dtype)
            calls[name] = call
    calls[PRODUCT] = product_call(layers, width)
    return alternating_times(calls, rounds)


def rates(layers: int, width: int, times: Times) -> tuple[int, float, float]:
    """Compares the default's rate with that of the product.

    Args:
        layers: The number of layers of the block tree.
        width: Its width.
        times: What `measure` returned.

    Returns:
        The default's floating-point operations, those by the second, and the product's by the
        second.
    """
    median = medians(times)
    flops = necessary_flops(block_shapes(layers, width), NewtonSchulz())
    return flops, flops / median[DEFAULT], product_flops(layers, width) / median[PRODUCT]


def table(times: Times) -> str:
    """Formats the medians in milliseconds, with the ratio of each to each peer."""
    median = medians(times)
    peers = [name for name in times if name not in OURS and name != PRODUCT]
    titles = ["optimizer", "ms", "fastest", "slowest", *(f"to `{peer}`" for peer in peers)]
    rows = []
    for name in (*OURS, *peers):
        optimizer, comma, dtype = name.partition(",")
        figures = (median[name], min(times[name]), max(times[name]))
        cells = [f"{1e3 * figure:.2f}" for figure in figures]
        ratios = [f"{median[name] / median[peer]:.2f}" for peer in peers]
        rows.append([f"`{optimizer}`{comma}{dtype}", *cells, *ratios])
    return markdown(titles, rows)


def share_of_rate(layers: int, width: int, times: Times) -> str:
    """Says how much of the product's rate the default reaches."""
    flops, rate, product_rate = rates(layers, width, times)
    return (
        f"`{DEFAULT}`: {flops / 1e9:.3g} GFLOP in products, {rate / 1e9:.3g} GFLOP/s; a float32 "
        f"product of {SQUARE_PER_LAYER * layers} matrices {width} × {width}: "
        f"{product_rate / 1e9:.3g} GFLOP/s; share of the product rate {rate / product_rate:.2f}"
    )


def records(layers: int, width: int, times: Times) -> list[Record]:
    """Compares each of ours with each peer, and the default's rate with the product's."""
    median = medians(times)
    case = f"{layers} layers of width {width}"
    peers = [name for name in times if name not in OURS and name != PRODUCT]
    _, rate, product_rate = rates(layers, width, times)
    return [
        record("step time", f"{case}, {name}", 1e3 * median[name], peer, 1e3 * median[peer], "ms")
        for name in OURS
        for peer in peers
    ] + [
        record(
            "step time: rate of products",
            f"{case}, {DEFAULT}",
            rate / 1e9,
            PRODUCT,
            product_rate / 1e9,
            "GFLOP/s",
        )
    ]


def parse_case(text: str) -> tuple[int, int]:
    """Reads layers and width, such as ``2x768``."""
    layers, width = (int(number) for number in text.split("x"))
    if math.prod((layers, width)) < 1:
        raise argparse.ArgumentTypeError(f"layers and width must be positive; got {text}")
    return layers, width


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each case.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument(
        "--cases",
        type=parse_case,
        nargs="+",
        default=[(2, 768), (12, 128)],
        metavar="LAYERSxWIDTH",
        help="the block trees (default: 2x768 12x128)",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="scion.py of the authors' repository"
    )
    parser.add_argument(
        "--reference-dtypes",
        nargs="+",
        choices=DTYPES,
        default=DTYPES,
        help="what its iteration is run in (default: both)",
    )
    options = parser.parse_args(arguments)
    tables: list[str] = []
    comparisons: list[Record] = []
    for layers, width in options.cases:
        times = measure(layers, width, options.rounds, options.reference, options.reference_dtypes)
        tables += [f"{layers} layers of width {width}", table(times)]
        tables.append(share_of_rate(layers, width, times))
        comparisons += records(layers, width, times)
    heading = f"Time of one update, median of {options.rounds} rounds"
    report(heading, tables, comparisons, options.json)


if __name__ == "__main__":
    main()
