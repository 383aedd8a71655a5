"""Time to trace and to compile an optimizer's update, and how much code that gives, by depth.

    python -m benchmarks.compile_time                            # 12 and 48 layers of width 128
    python -m benchmarks.compile_time --width 64 --depths 2 8 --rounds 3
    python -m benchmarks.compile_time --matrices                 # without biases and gains

The update of the layers of a GPT-2 (block_trees.py) is compiled afresh every time: JAX's caches are
emptied before, the one on disk is off, and the function is a new one. The optimizers take turns.
Nothing is run.

Columns: the time to trace and lower, the time to compile, the equations of the jaxpr (what is
called several times counted once), the length of the StableHLO text that the compiler is given and
of the HLO text after its passes; below, how many times larger each is for the deepest tree than for
the shallowest. What grows less than the depth was done once for several layers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import jax
import optax
import optax.contrib

from benchmarks.block_trees import LEARNING_RATE, OURS, PEER, block_shapes
from benchmarks.reporting import Record, alternate, make_parser, markdown, record, report
from scion_jax import scion, unconstrained_scion

UNITS = {"lower": "s", "compile": "s", "equations": "", "stablehlo": "kB", "hlo": "kB"}
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    OURS: unconstrained_scion(LEARNING_RATE),
    "scion": scion(LEARNING_RATE),
    "optax.lion": optax.lion(LEARNING_RATE),
    PEER: optax.contrib.muon(LEARNING_RATE),
}


@dataclass(frozen=True)
class Cost:
    """What a fresh compilation takes and gives.

    Attributes:
        lower: Seconds to trace and lower.
        compile: Seconds to compile.
        equations: Of the jaxpr and of all those in it, each counted once.
        stablehlo: Length of the text before the compiler, in kB.
        hlo: Length of the text after it, in kB.
    """

    lower: float
    compile: float
    equations: float
    stablehlo: float
    hlo: float


Costs = dict[tuple[int, str], Cost]  # by number of layers and optimizer


def compile_afresh(optimizer: optax.GradientTransformation, shapes: Any) -> Cost:
    """Compiles an optimizer's update as if for the first time.

    Args:
        optimizer: The optimizer.
        shapes: The shapes of the parameters.

    Returns:
        What it took and gave.
    """
    state = jax.eval_shape(optimizer.init, shapes)
    jax.clear_caches()
    start = time.perf_counter()
    # A new function each time: the one jitted before would be found again.
    update = jax.jit(lambda gradient, state, params: optimizer.update(gradient, state, params))
    traced = update.trace(shapes, state, shapes)
    lowered = traced.lower()
    between = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return Cost(
        between - start,
        end - between,
        count_equations(traced.jaxpr),
        len(lowered.as_text()) / 1e3,
        len(compiled.as_text() or "") / 1e3,
    )


def count_equations(jaxpr: Any) -> int:
    """Counts the equations of a jaxpr and of all jaxprs in it; each jaxpr counts once."""
    found: dict[int, int] = {}
    ahead = [jaxpr]
    while ahead:
        jaxpr = ahead.pop()
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # closed or not
        if id(jaxpr) not in found and hasattr(jaxpr, "eqns"):
            found[id(jaxpr)] = len(jaxpr.eqns)
            ahead += [leaf for equation in jaxpr.eqns for leaf in jax.tree.leaves(equation.params)]
    return sum(found.values())


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Returns the median of each quantity."""
    return Cost(*(statistics.median(numbers) for numbers in zip(*map(astuple, costs), strict=True)))


def measure(depths: Sequence[int], width: int, rounds: int, vectors: bool) -> Costs:
    """Compiles every optimizer's update for every depth, in turns.

    Args:
        depths: The numbers of layers.
        width: The width of the block trees.
        rounds: How often.
        vectors: Whether layers have their biases and gains.

    Returns:
        The medians.
    """
    calls: dict[tuple[int, str], Callable[[], Cost]] = {
        (layers, name): lambda layers=layers, optimizer=optimizer: compile_afresh(
            optimizer, block_shapes(layers, width, vectors)
        )
        for layers in depths
        for name, optimizer in OPTIMIZERS.items()
    }
    compile_afresh(OPTIMIZERS[OURS], block_shapes(1, 8))  # the compiler itself starts up once
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return {key: median_cost(costs) for key, costs in alternate(calls, rounds).items()}
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def growth(costs: Costs, name: str) -> Cost:
    """Returns how many times larger each quantity is for the deepest tree than the shallowest."""
    depths = [layers for layers, _ in costs]
    deep, shallow = costs[max(depths), name], costs[min(depths), name]
    ratios = (a / b for a, b in zip(astuple(deep), astuple(shallow), strict=True))
    return Cost(*ratios)


def table(costs: Costs) -> str:
    """Formats the medians and their growth, each with its ratio to the peer's."""
    quantities = [field.name for field in fields(Cost)]
    titles = ["update of", "layers"]
    for quantity in quantities:
        titles += [f"{quantity} ({UNITS[quantity]})" if UNITS[quantity] else quantity, "ratio"]
    depths = sorted({layers for layers, _ in costs})
    named = {(str(layers), name): cost for (layers, name), cost in costs.items()}
    if len(depths) > 1:
        named |= {(f"{depths[-1]} / {depths[0]}", name): growth(costs, name) for name in OPTIMIZERS}
    rows = []
    for (case, name), cost in named.items():
        cells = [f"`{name}`", case]
        for ours, peer in zip(astuple(cost), astuple(named[case, PEER]), strict=True):
            cells += [f"{ours:.3g}", f"{ours / peer:.2f}"]
        rows.append(cells)
    return markdown(titles, rows)


def records(costs: Costs) -> list[Record]:
    """Compares our medians, and how they grow, with the peer's."""
    depths = sorted({layers for layers, _ in costs})
    compared = [
        (f"{layers} layers", "compile time", costs[layers, OURS], costs[layers, PEER])
        for layers in depths
    ]
    if len(depths) > 1:
        case = f"{depths[0]} to {depths[-1]} layers"
        compared.append((case, "compile time: growth", growth(costs, OURS), growth(costs, PEER)))
    return [
        record(
            f"{benchmark}, {quantity}",
            f"{case}, {OURS}",
            getattr(ours, quantity),
            PEER,
            getattr(peer, quantity),
            "times" if benchmark.endswith("growth") else unit,
        )
        for case, benchmark, ours, peer in compared
        for quantity, unit in UNITS.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--width", type=int, default=128, help="of the trees (default: 128)")
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[12, 48],
        metavar="LAYERS",
        help="numbers of layers (default: 12 48)",
    )
    parser.add_argument("--matrices", action="store_true", help="leave out biases and gains")
    options = parser.parse_args(arguments)
    costs = measure(options.depths, options.width, options.rounds, not options.matrices)
    heading = (
        f"Compiling an update{' of matrices alone' if options.matrices else ''}, width "
        f"{options.width}, median of {options.rounds} rounds; ratios to `{PEER}`"
    )
    report(heading, [table(costs)], records(costs), options.json)


if __name__ == "__main__":
    main()
