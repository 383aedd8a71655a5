"""Trains on many devices with everything split (FSDP), then moves to another mesh by a checkpoint.

python examples/sharded.py --fake-devices 8
"""

import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from tqdm import trange

from scion_jax import Sign, infer_norms, init_params, scaled_relu, unconstrained_scion

WIDTH, LAYERS, CLASSES, BATCH, STEPS = 128, 4, 16, 128, 20


def mean_loss(model: nnx.Sequential, x: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns nats per row; nothing in it knows of devices."""
    return cross_entropy(model(x), classes).mean()


@nnx.jit
def create() -> tuple[nnx.Sequential, nnx.Optimizer]:
    """Makes model and optimizer in pieces: compiled, so that no device has to hold the whole."""
    rngs, x, classes = nnx.Rngs(0), np.zeros((1, WIDTH), np.float32), np.zeros(1, np.int32)
    hidden = [(nnx.Linear(WIDTH, WIDTH, rngs=rngs), scaled_relu) for _ in range(LAYERS)]
    model = nnx.Sequential(*sum(hidden, ()), nnx.Linear(WIDTH, CLASSES, rngs=rngs))
    norms = infer_norms(mean_loss, model, x, classes, last=Sign(16.0, zero_init=True))
    nnx.update(model, init_params(jax.random.key(0), nnx.state(model, nnx.Param), norms))
    run = model, nnx.Optimizer(model, unconstrained_scion(2**-6, norms), wrt=nnx.Param)
    specs = jax.tree.map(lambda x: PartitionSpec(*["fsdp"][: x.ndim]), state := nnx.state(run))
    nnx.update(run, jax.lax.with_sharding_constraint(state, specs))  # all but counts in pieces
    return run


@nnx.jit(donate_argnums=(0, 1))
def step(model: nnx.Sequential, optimizer: nnx.Optimizer, x: jax.Array, classes: jax.Array):
    """Makes a step and returns the loss before it."""
    loss, gradients = nnx.value_and_grad(mean_loss)(model, x, classes)
    optimizer.update(model, gradients)
    return loss


def train(run: tuple, first: int) -> list[float]:
    """Makes `STEPS` steps on random inputs; which of the first entries is largest is the class."""
    losses = []
    for number in trange(first, first + STEPS):
        x = np.random.default_rng(number).normal(size=(BATCH, WIDTH)).astype(np.float32)
        batch = jax.device_put((x, x[:, :CLASSES].argmax(1)), PartitionSpec(("data", "fsdp")))
        losses.append(float(step(*run, *batch)))
    return losses


def describe(run: tuple) -> str:
    """Counts what a device holds, and the collectives that an update compiles to."""
    parts = [jax.tree.leaves(nnx.state(part)) for part in run]
    params, state = (sum(x.addressable_shards[0].data.nbytes for x in part) for part in parts)
    update = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))
    hlo = update.lower(*run).compile().as_text()
    found = {kind: hlo.count(f" {kind}(") for kind in ("all-to-all", "all-reduce", "all-gather")}
    return f"a device: {params:,} bytes of parameters, {state:,} of state; update: {found}"


def main(arguments: list[str] | None = None) -> None:
    """Trains on one mesh, and from the middle on again on another."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="how many to use (default: all)")
    parser.add_argument("--fake-devices", type=int, help="have the CPU act as so many, such as 8")
    settings = parser.parse_args(arguments)
    if settings.fake_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.fake_devices)
    count, there = settings.devices or jax.device_count(), jax.device_count()
    if not 2 <= count <= there or count % 2 or CLASSES % count:
        parser.error(f"{count} of {there} devices: needed is an even number that divides {CLASSES}")
    axes, kinds, devices = ("data", "fsdp"), (AxisType.Auto,) * 2, jax.devices()[:count]
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        with jax.set_mesh(jax.make_mesh((1, count), axes, kinds, devices=devices)):
            run = create()
            print(describe(run))
            train(run, 0)
            checkpointer.save(f"{folder}/run", nnx.state(run))
            checkpointer.wait_until_finished()  # before the state's memory is given away
            stayed = train(run, STEPS)
        with jax.set_mesh(jax.make_mesh((2, count // 2), axes, kinds, devices=devices)):
            run = create()
            nnx.update(run, checkpointer.restore(f"{folder}/run", nnx.state(run)))
            print(describe(run))
            moved = train(run, STEPS)
    gaps = np.abs(np.subtract(moved, stayed))
    print(f"loss {stayed[-1]:.4f}, moved {moved[-1]:.4f}: {gaps[0]:.0e} to {gaps.max():.0e} apart")


if __name__ == "__main__":
    main()
