"""What compilers for TPUs and GPUs make of an update; no such device is needed.

    python -m benchmarks.compiled                                # TPU v5e, one chip, 4 layers
    python -m benchmarks.compiled --topology v5e:2x4 --layers 12 # 8 chips, FSDP
    python -m benchmarks.compiled --target h100.textproto        # a GPU (jax[cuda13] is needed)

The dependency group `compiled` installs the TPU's compiler. An update with `optax.apply_updates`,
donated, is compiled for block trees (see block_trees.py). Cycles are the compiler's own estimate,
with loops counted by their rounds (see hlo.py); it has none for collectives, so these are listed
beside.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

import scion_jax
from benchmarks.block_trees import PEER, block_shapes
from benchmarks.hlo import Cost, cost
from benchmarks.reporting import markdown

Build = Callable[[scion_jax.Spectral], optax.GradientTransformation]

OPTIMIZERS: dict[str, Build] = {
    PEER: lambda norm: optax.contrib.muon(1e-3),
    "unconstrained_scion": lambda norm: scion_jax.unconstrained_scion(1e-3, norm),
    "scion": lambda norm: scion_jax.scion(1e-3, norm),
    "scion_light": lambda norm: scion_jax.scion_light(1e-3, norm),
    "almond": lambda norm: scion_jax.almond(1e-3, norm),
    "unconstrained_clipped_scion": lambda norm: scion_jax.unconstrained_clipped_scion(
        1e-3, norm, rho=1.0
    ),
    "clipped_scion": lambda norm: scion_jax.clipped_scion(1e-3, norm, rho=1.0),
    "clipped_scion, short step": lambda norm: scion_jax.clipped_scion(
        1e-3, norm, rho=1.0, short_step=True
    ),
}


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
    layers: int,
    width: int,
    mesh: Mesh,
    spec: PartitionSpec,
) -> Compiled:
    """Compiles an update and what follows, with parameters, gradients and state split alike.

    Args:
        optimizer: The optimizer.
        layers: Layers of the block tree.
        width: Its width.
        mesh: The devices.
        spec: How matrices are split.

    Returns:
        What the compiler says.
    """
    rank = len(spec)
    spec = spec if mesh.size > 1 else PartitionSpec()

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        there = spec if leaf.ndim == rank else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, there))

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = jax.tree.map(placed, block_shapes(layers, width))
        state = jax.tree.map(placed, jax.eval_shape(optimizer.init, params))
        results = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
        lowered = jitted.lower(params, state, params)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(cost(compiled.as_text()), memory.temp_size_in_bytes, seconds)


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
    add("--topology", help="such as v5e:2x4, v5e:8x8 or v4:2x2x1 (default: one v5e chip)")
    add("--target", metavar="FILE", help="a GPU's target_config; --topology is then like 1x1x8")
    add("--mesh", default="fsdp=-1", help="axes, such as data=2,fsdp=-1 (default: fsdp=-1)")
    add("--split", default="fsdp,", help="axes that split a matrix (default: 'fsdp,', its rows)")
    add("--kind", choices=("Explicit", "Auto"), default="Explicit", help="axes of the mesh")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=768)
    add("--dtype", choices=("default", "bfloat16", "float32"), default="default", help="compute")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    options = parser.parse_args(arguments)
    axes = dict(axis.split("=") for axis in options.mesh.split(","))
    sizes = [int(size) for size in axes.values()]
    spec = PartitionSpec(*(name or None for name in options.split.split(",")))
    dtype = None if options.dtype == "default" else jnp.dtype(options.dtype)
    norm = scion_jax.Spectral(orthogonalizer=scion_jax.NewtonSchulz(compute_dtype=dtype))
    results = {}
    for name in options.optimizers:
        # Optax's muon cannot be traced on Explicit axes.
        kind = "Auto" if name == PEER else options.kind
        mesh = make_mesh(options.topology, options.target, sizes, tuple(axes), kind)
        results[name] = compile_step(
            OPTIMIZERS[name](norm), options.layers, options.width, mesh, spec
        )
    place = options.topology or ("one GPU" if options.target else "one v5e chip")
    print(
        f"{place}, {options.mesh}, {options.kind}; {options.layers} layers, JAX {jax.__version__}"
    )
    print(table(results), sep="\n\n")


if __name__ == "__main__":
    main()
