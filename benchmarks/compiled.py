"""What compilers for TPUs and GPUs make of an update; no such device is needed.

    python -m benchmarks.compiled                                # TPU v5e, one chip, 4 layers
    python -m benchmarks.compiled --topology v5e:2x4 --layers 12 # 8 chips, FSDP
    python -m benchmarks.compiled --case llama                   # a case of cases.py
    python -m benchmarks.compiled --target h100.textproto        # a GPU (jax[cuda13] is needed)
    python -m benchmarks.compiled --peer path/to/file.py:build   # build(shapes) is an optimizer

The dependency group `compiled` installs the TPU's compiler. An update with `optax.apply_updates`,
donated, is compiled for block trees (see block_trees.py). Cycles are the compiler's own estimate,
for the chip that has most to do, with loops counted by their rounds (see hlo.py); it has none for
collectives, so these are listed beside.
"""

import argparse
import math
import os
import runpy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run on one

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import scion_jax
from benchmarks.block_trees import PEER, necessary_flops
from benchmarks.busiest import on_busiest
from benchmarks.cases import CASES, Case, blocks
from benchmarks.hlo import Cost, cost
from benchmarks.reporting import markdown

OURS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "unconstrained_scion": scion_jax.unconstrained_scion,
    "scion": scion_jax.scion,
    "scion_light": scion_jax.scion_light,
    "almond": scion_jax.almond,
    "unconstrained_clipped_scion": partial(scion_jax.unconstrained_clipped_scion, rho=1.0),
    "clipped_scion": partial(scion_jax.clipped_scion, rho=1.0),
    "clipped_scion, short step": partial(scion_jax.clipped_scion, rho=1.0, short_step=True),
}


def peer(is_stacked: bool, dtype: DTypeLike | None) -> optax.GradientTransformation:
    """Makes Optax's muon."""

    def stacked(params: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda _: numbers, params)

    numbers = stacked if is_stacked else None
    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers, mu_dtype=dtype)


@dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
        cost: What one device executes.
        temporaries: Bytes beside arguments and results, on one device.
        seconds: Time to compile.
    """

    cost: Cost
    temporaries: int
    seconds: float


def load(place: str) -> Callable[[Any], optax.GradientTransformation]:
    """Loads somebody's function from `path/to/file.py:function`."""
    path, name = place.rsplit(":", 1)
    return runpy.run_path(path)[name]


def make_mesh(
    topology: str | None, target: str | None, shape: Sequence[int], names: Sequence[str], kind: str
) -> Mesh:
    """Makes a mesh of devices that are not there.

    Args:
        topology: A TPU's, such as `v5e:2x4`; None for one v5e chip.
        target: A file that describes a GPU for its compiler, or None for a TPU.
        shape: Sizes of the mesh axes; the last one may be -1, for all devices that are left.
        names: Names of the axes.
        kind: `Explicit` or `Auto`.

    Returns:
        The mesh.
    """
    if target:
        with open(target, encoding="utf-8") as file:
            described = topologies.get_topology_desc(
                platform="cuda", target_config=file.read(), topology=topology or "1x1x8"
            )
    else:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology or "v5e:2x4"
        )
    devices = np.array(described.devices[: None if topology or target else 1])
    return Mesh(devices.reshape(shape), names, axis_types=(getattr(AxisType, kind),) * len(names))


def compile_step(
    optimizer: optax.GradientTransformation,
    case: Case,
    mesh: Mesh,
    gradients_dtype: DTypeLike | None = None,
) -> Compiled:
    """Compiles an update and what follows, with parameters, gradients and state split alike.

    Args:
        optimizer: The optimizer.
        case: The parameters, and how they are split.
        mesh: The devices.
        gradients_dtype: Dtype of the gradients; None means float32, the parameters'.

    Returns:
        What the compiler says.
    """
    splits = case.splits

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        there = splits[names[-1]] if names and leaf.ndim > 1 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, there))

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = jax.tree_util.tree_map_with_path(placed, case.tree)
        state = jax.eval_shape(optimizer.init, params)
        state = jax.tree_util.tree_map_with_path(placed, state)
        results = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
        gradients = jax.tree.map(
            lambda leaf: leaf.update(dtype=gradients_dtype or leaf.dtype), params
        )
        lowered = jitted.lower(params, state, gradients)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    busiest = on_busiest(cost(compiled.as_text()), case, mesh.size)
    return Compiled(busiest, memory.temp_size_in_bytes, seconds)


def table(results: dict[str, Compiled]) -> str:
    """Formats a Markdown table."""
    titles = ["update of", "Mcycles", "in products", "GFLOP", "collectives", "MB moved"]
    titles += ["temporaries (MB)", "compile (s)", "kernels"]
    rows = []
    for name, result in results.items():
        found = result.cost
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.collectives.items())
        share = found.cycles_in_products / found.cycles if found.cycles else 0
        cells = [f"{found.cycles / 1e6:.2f}", f"{share:.0%}", f"{found.flops / 1e9:.0f}"]
        cells += [kinds or "none", f"{found.collective_bytes / 1e6:.1f}"]
        cells += [f"{result.temporaries / 1e6:.0f}", f"{result.seconds:.1f}", str(found.kernels)]
        rows.append([f"`{name}`", *cells])
    return markdown(titles, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", choices=CASES, help="a tree and its mesh, see cases.py; then only --kind counts")
    add("--topology", help="such as v5e:2x4, v5e:8x8 or v4:2x2x1 (default: one v5e chip)")
    add("--target", metavar="FILE", help="a GPU's target_config; --topology is then like 1x1x8")
    add("--mesh", default="fsdp=-1", help="axes, such as data=2,fsdp=-1 (default: fsdp=-1)")
    add("--split", default="fsdp,", help="axes that split a matrix (default: 'fsdp,', its rows)")
    add("--kind", choices=("Explicit", "Auto"), help="axes of the mesh (default: Explicit)")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=768)
    add("--told", action="store_true", help="ours know the shardings: with_shardings")
    add("--peer", action="append", default=[], metavar="FILE:FUNCTION", help="see above")
    add("--dtype", choices=("default", "bfloat16", "float32"), default="default", help="compute")
    add("--held", choices=("bfloat16",), help="dtype of averages and gradients (default: float32)")
    add("--optimizers", nargs="+", choices=[PEER, *OURS], default=[PEER, *OURS])
    options = parser.parse_args(arguments)
    axes = {name: int(size) for name, size in (a.split("=") for a in options.mesh.split(","))}
    spec = PartitionSpec(*(name or None for name in options.split.split(",")))
    own = Case(blocks(options.layers, options.width), options.topology, axes, spec)
    case = CASES[options.case] if options.case else own
    case = replace(case, kind=options.kind or case.kind)
    if options.case and options.target:
        case = replace(case, topology=f"1x1x{math.prod(case.mesh.values())}")
    dtype = None if options.dtype == "default" else jnp.dtype(options.dtype)
    method = scion_jax.NewtonSchulz(compute_dtype=dtype)
    norm = scion_jax.Spectral(layout="bio" if case.is_stacked else None, orthogonalizer=method)
    # On an accelerator the default is bfloat16.
    counted = scion_jax.NewtonSchulz(compute_dtype=dtype or jnp.bfloat16)
    ours = {
        name: OURS[name](1e-3, norm, momentum_dtype=options.held)
        for name in options.optimizers
        if name != PEER
    }
    if options.told:
        ours = {n: scion_jax.with_shardings(one, case.splits) for n, one in ours.items()}
    peers = {PEER: peer(case.is_stacked, options.held)} if PEER in options.optimizers else {}
    peers |= {path.rsplit(":", 1)[1]: load(path)(case.tree) for path in options.peer}
    results, idle = {}, {}
    for name, optimizer in (peers | ours).items():
        kind = "Auto" if name in peers else case.kind  # some cannot be traced on Explicit axes
        mesh = make_mesh(
            case.topology, options.target, [*case.mesh.values()], tuple(case.mesh), kind
        )
        results[name] = compile_step(optimizer, case, mesh, options.held)
        # The short step's bounds are work, too.
        if name in ours and "short step" not in name and results[name].cost.flops:
            work = necessary_flops(case.matrices, counted)
            idle[name] = 1 - work / (results[name].cost.flops * mesh.size)
    axes_said = ",".join(f"{axis}={size}" for axis, size in case.mesh.items())
    said = [case.topology or ("one GPU" if options.target else "one v5e chip")]
    said += [f"{axes_said} {case.kind}{', told' * options.told}"]
    said += [options.case or f"{options.layers} layers"]
    said += [f"averages and gradients in {options.held}"] if options.held else []
    print(*said, f"JAX {jax.__version__}, Optax {optax.__version__}", sep="; ")
    print(table(results), sep="\n\n")
    for name, share in idle.items():
        print(f"{name}: {share:.0%} of the products' time is idle, or spent on zeros")


if __name__ == "__main__":
    main()
