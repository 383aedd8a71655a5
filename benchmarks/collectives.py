"""Communication of an update on many devices: collectives, bytes, FLOPs and temporaries of each.

    python benchmarks/collectives.py                         # 1 to 64 devices
    python benchmarks/collectives.py --devices 8 --meshes fsdp --json collectives.json
    python benchmarks/collectives.py --plot collectives.png  # needs matplotlib

Nothing is run: `jax.jit(optimizer.update)` on block trees (see block_trees.py) is compiled for
devices that a CPU pretends to be, and the text of the compiled program is read. Gradients,
momentum and updates are split alike: along their rows over all devices (mesh `fsdp`), or rows over
half of them and columns over two (`fsdp×tensor`). Compilers for other devices may plan otherwise.

What counts for a device and an update:

- collectives: how many are executed; those in the body of a loop once for each time around, and
  the column "in loops" says how many these are
- MB: what they bring to the device: the size of the result, but of the operand of a
  reduce-scatter. The ideal is that every matrix moves there and back once: 2 × all matrices /
  devices, in the dtype in which they travel
- MFLOP: of the matrix products in the program, those in loops once for each time around; with the
  padding of stacks that do not divide by the number of devices, and with every product that is
  made on several devices. The ideal is `NewtonSchulz.flops` of all matrices / devices
"""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # JAX reads this when it starts
    flags = (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=64")
    os.environ.update(XLA_FLAGS=" ".join(flags), JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from block_trees import LEARNING_RATE, OURS, PEER, array_bytes, block_shapes, necessary_flops
from reporting import Record, make_parser, markdown, record, report
from scion_jax import NewtonSchulz, Spectral, unconstrained_scion

DEVICES = (1, 2, 4, 8, 16, 32, 64)
MESHES = ("fsdp", "fsdp×tensor")
MODES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
LONG, SHORT = f"{OURS}, float32", f"{OURS}, bfloat16"
METHODS = {
    LONG: NewtonSchulz(compute_dtype=jnp.float32),
    SHORT: NewtonSchulz(compute_dtype=jnp.bfloat16),
}
TRAVELS = {LONG: 4, SHORT: 2}  # bytes of an entry
MEGA = 1e6
FAST: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0"
}  # what is counted is settled before machine code

COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|\w+_computations?)=\{?(%[\w.-]+(?:, %[\w.-]+)*)"
)
ITEM = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Cost:
    """What an update costs a device.

    Attributes:
        counts: The number of collectives by kind.
        moved: Bytes that they bring.
        looped: How many of them are in loops.
        flops: Of all matrix products.
        temporaries: Bytes beside arguments and results.
    """

    counts: dict[str, int]
    moved: int
    looped: int
    flops: int
    temporaries: int = 0


@dataclass(frozen=True)
class Case:
    """What is compiled: on a mesh of so many devices, with axes of this type, whose update."""

    mesh: str
    mode: str
    devices: int
    name: str


Costs = dict[Case, Cost | None]  # None: it cannot be compiled


def read_cost(program: str) -> Cost:
    """Counts what a compiled program does.

    Args:
        program: Its text, for one of the devices.

    Returns:
        The cost, without temporaries.

    Raises:
        ValueError: If it has a loop that does not say how often it goes around, or a collective in
            two parts, as compilers for other devices write them.
    """
    bodies: dict[str, list[re.Match]] = {}
    types: dict[tuple[str, str], str] = {}
    name = entry = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif found := INSTRUCTION.match(line):
            bodies[name].append(found)
            types[name, found[1]] = found[2]

    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()

    def visit(name: str, times: int, looped: bool) -> None:
        for found in bodies[name]:
            _, result, kind, rest = found.groups()
            operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
            if re.fullmatch(COLLECTIVES, kind):
                measured = types[name, operands[0]] if kind == "reduce-scatter" else result
                counts[kind] += times
                total["moved"] += times * type_bytes(measured)
                total["looped"] += times * looped
            elif re.fullmatch(f"({COLLECTIVES})-start", kind):
                raise ValueError(f"collectives in two parts are not counted: {kind}")
            elif kind == "dot":
                total["flops"] += times * _dot_flops(result, types[name, operands[0]], rest)
            rounds = times
            if kind == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                if not trips:
                    raise ValueError(f"a loop does not say how often it goes around: {found[0]}")
                rounds = times * int(trips[1])
            for called in ", ".join(CALLED.findall(rest)).replace("%", "").split(", "):
                if called:
                    visit(called, rounds, looped or kind == "while")

    visit(entry, 1, False)
    return Cost(dict(counts), total["moved"], total["looped"], total["flops"])


def type_bytes(text: str) -> int:
    """Returns the size of arrays from their types, such as ``(f32[8,2]{1,0}, u16[4]{0})``."""
    return sum(math.prod(dims) * _item_bytes(item) for item, dims in _arrays(text))


def _arrays(text: str) -> list[tuple[str, list[int]]]:
    return [(item, [int(n) for n in dims.split(",") if n]) for item, dims in ITEM.findall(text)]


def _item_bytes(item: str) -> int:
    bits = re.search(r"\d+", item)  # bf16, f8e4m3fn, s32; pred and token have none
    return max(1, int(bits[0]) // 8) if bits else 1


def _dot_flops(result: str, left: str, rest: str) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    dims = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    (_, made), (_, sizes) = _arrays(result)[0], _arrays(left)[0]
    return 2 * math.prod(made) * math.prod(sizes[n] for n in dims)


def make_mesh(case: Case) -> jax.sharding.Mesh:
    """Makes the mesh of a case from the first devices."""
    pair = min(2, case.devices)
    shape = (case.devices // pair, pair) if "×" in case.mesh else (case.devices,)
    names = tuple(case.mesh.split("×"))
    types = (MODES[case.mode],) * len(names)
    return jax.make_mesh(shape, names, types, devices=jax.devices()[: case.devices])


def make_optimizer(case: Case) -> optax.GradientTransformation:
    """Makes the optimizer of a case."""
    if case.name == PEER:
        return optax.contrib.muon(LEARNING_RATE)
    names = tuple(case.mesh.split("×")) if case.mode == "Auto" else None
    return unconstrained_scion(
        LEARNING_RATE, Spectral(orthogonalizer=METHODS[case.name]), shard_over=names
    )


def compiled_update(case: Case, layers: int, width: int) -> Any:
    """Compiles an update of split block trees."""
    mesh = make_mesh(case)
    shapes = block_shapes(layers, width)
    split = {leaf.shape for leaf in jax.tree.leaves(shapes)}

    def sharding(leaf: Any) -> NamedSharding:
        names = mesh.axis_names if leaf.shape in split else ()
        return NamedSharding(mesh, PartitionSpec(*names))

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), tree
        )

    optimizer = make_optimizer(case)
    with jax.set_mesh(mesh):
        params = placed(shapes)
        state = placed(jax.eval_shape(optimizer.init, params))
        results = jax.tree.map(sharding, (params, state))
        update = jax.jit(optimizer.update, out_shardings=results)
        return update.lower(params, state, params).compile(compiler_options=FAST)


def measure(case: Case, layers: int, width: int) -> Cost | None:
    """Compiles an update and reads its cost; None if types forbid it."""
    try:
        program = compiled_update(case, layers, width)
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # JAX does not export it
            raise
        return None
    cost = read_cost(program.as_text())
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Cost(cost.counts, cost.moved, cost.looped, cost.flops, temporaries)


def needed_bytes(name: str, layers: int, width: int) -> int:
    """Returns the bytes that all devices together receive if each matrix moves there and back."""
    entries = array_bytes(block_shapes(layers, width)) // 4
    return 2 * entries * TRAVELS.get(name, 4)


def cost_table(costs: Costs, mesh: str, mode: str, layers: int, width: int) -> str:
    """Formats a table of one mesh with axes of one type; all ratios are to the peer on Auto."""
    rows = []
    shapes = block_shapes(layers, width)
    for case, cost in costs.items():
        if (case.mesh, case.mode) != (mesh, mode):
            continue
        optimizer, comma, dtype = case.name.partition(",")
        cells = [str(case.devices), f"`{optimizer}`{comma}{dtype}"]
        peer = costs.get(peer_of(case))
        if cost is None:
            cells += ["raises ShardingTypeError", *["–"] * 9]
        else:
            counts = [f"{count} {kind}" for kind, count in sorted(cost.counts.items())]
            received, flops, temporaries = (
                (f"{ours / MEGA:.2f}", f"{ours / theirs:.3f}" if theirs else "–")
                for ours, theirs in zip(figures(cost)[1:], figures(peer)[1:], strict=True)
            )
            ideal = ("–", "–")
            if case.name != PEER:
                work = necessary_flops(shapes, METHODS[case.name]) / case.devices
                moved = needed_bytes(case.name, layers, width) / case.devices
                ideal = (f"{moved * (case.devices > 1) / MEGA:.2f}", f"{work / MEGA:.2f}")
            cells += [" + ".join(counts) or "none", str(cost.looped), received[0], ideal[0]]
            cells += [received[1], flops[0], ideal[1], flops[1], *temporaries]
        rows.append(cells)
    titles = ["devices", "update of", "collectives", "in loops", "MB", "ideal", "to muon", "MFLOP"]
    return markdown([*titles, "ideal", "to muon", "temporaries (MB)", "to muon"], rows, texts=3)


def peer_of(case: Case) -> Case:
    """Returns the case of the peer on the same mesh, whose axes have to be Auto."""
    return Case(case.mesh, "Auto", case.devices, PEER)


def figures(cost: Cost | None) -> tuple[int, ...]:
    """Lists the number of collectives, bytes received, FLOPs and temporaries; 0 for no cost."""
    if cost is None:
        return 0, 0, 0, 0
    return sum(cost.counts.values()), cost.moved, cost.flops, cost.temporaries


def records(costs: Costs) -> list[Record]:
    """Compares each of our updates with the peer's on the same mesh."""
    quantities = ("collectives", "received", "FLOPs of products", "temporaries")
    scales = ((1, "per update"), (MEGA, "MB"), (MEGA, "MFLOP"), (MEGA, "MB"))
    lines = []
    for case, cost in costs.items():
        peer = costs.get(peer_of(case))
        if case.name == PEER or cost is None or peer is None:
            continue
        label = f"{case.name}, {case.mesh}, {case.mode}, {case.devices} devices"
        compared = zip(quantities, scales, figures(cost), figures(peer), strict=True)
        for quantity, (scale, unit), ours, theirs in compared:
            title = f"many devices: {quantity}"
            name = PEER if case.mode == "Auto" else f"{PEER}, Auto"
            lines.append(record(title, label, ours / scale, name, theirs / scale, unit))
    return lines


def plot(costs: Costs, layers: int, width: int, path: Path) -> None:
    """Draws what grows with the number of devices: collectives, and bytes for each device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    lines = dict.fromkeys((case.mesh, case.name) for case in costs if case.mode == "Auto")
    for mesh, name in lines:
        found = [
            (case.devices, *figures(cost)[:2])
            for case, cost in costs.items()
            if cost and cost.moved and (case.mesh, case.mode, case.name) == (mesh, "Auto", name)
        ]
        for panel, column in zip(panels, (1, 2), strict=True):
            values = [row[column] for row in found]
            panel.plot([row[0] for row in found], values, "o-", label=f"{name}, {mesh}")
    counts = sorted({case.devices for case in costs if case.devices > 1})
    ideal = [needed_bytes(LONG, layers, width) / devices for devices in counts]
    panels[1].plot(counts, ideal, "k--", label="each matrix there and back, float32")
    for panel, title in zip(panels, ("collectives", "bytes per device"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="devices", title=title)
        panel.set_xticks(counts, labels=[str(count) for count in counts])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, metavar="N")
    parser.add_argument("--meshes", nargs="+", default=MESHES, choices=MESHES)
    parser.add_argument("--layers", type=int, default=8, help="default: 8")
    parser.add_argument("--width", type=int, default=256, help="default: 256")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a figure there")
    options = parser.parse_args(arguments)
    costs = {
        case: measure(case, options.layers, options.width)
        for mesh in options.meshes
        for mode in MODES
        for devices in options.devices
        if devices > 1 or "×" not in mesh  # one device makes the same mesh either way
        for name in (*METHODS, PEER)
        for case in [Case(mesh, mode, devices, name)]
    }
    tables = []
    for mesh in options.meshes:
        for mode in MODES:
            tables.append(f"Mesh {mesh}, {mode} axes; for each device and update")
            tables.append(cost_table(costs, mesh, mode, options.layers, options.width))
    heading = (
        f"Block trees of width {options.width}, {options.layers} layers; stacks are padded to a "
        "multiple of the devices"
    )
    report(heading, tables, records(costs), options.json)
    if options.plot:
        plot(costs, options.layers, options.width, options.plot)


if __name__ == "__main__":
    main()
