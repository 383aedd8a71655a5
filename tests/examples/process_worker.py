"""A small training over a mesh, and a program that makes it in one of several processes.

`test_processes` starts the program, and makes the same training in its own process.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scion_jax

STEPS = 10
EVERY = 2  # steps from one checkpoint to the next
BATCH = 32
VOCABULARY = 16
DEVICES_PER_PROCESS = 2

NORMS = {
    "embedding": scion_jax.Sign(),
    "hidden": scion_jax.Spectral(orthogonalizer=scion_jax.NewtonSchulz(compute_dtype="float32")),
    "bias": scion_jax.BiasRMS(),
}
LABELS = scion_jax.label_by_path(
    [("^embedding", "embedding"), ("^bias", "bias"), ("^(square|wide)", "hidden")]
)
RATE = optax.linear_schedule(0.05, 0.01, STEPS)  # so that the state counts
OPTIMIZERS = {
    "scion": functools.partial(scion_jax.scion, RATE, NORMS, LABELS),
    "clipped_scion": functools.partial(scion_jax.clipped_scion, RATE, NORMS, LABELS, rho=3.0),
}
SHAPES = {
    "embedding": (VOCABULARY, 8),
    "square": [(8, 8)] * 3,
    "wide": [(8, 16)] * 2,
    "bias": (16,),
}


class Training:
    """A teacher's outputs, learned by least squares, with data and parameters split over a mesh."""

    def __init__(self, axis_type, optimizer, devices):
        """Compiles nothing yet.

        Args:
            axis_type: `"Explicit"` or `"Auto"`, which has to be told what to spread over.
            optimizer: A name in `OPTIMIZERS`.
            devices: The devices of the mesh.
        """
        kind = AxisType[axis_type]
        self.mesh = jax.make_mesh((len(devices),), ("fsdp",), (kind,), devices=devices)
        explicit = kind == AxisType.Explicit
        self._gather = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        self._optimizer = OPTIMIZERS[optimizer](shard_over=None if explicit else "fsdp")
        rng = np.random.default_rng(0)
        teacher = _normal(rng, 1.0)
        self._params = _normal(rng, 0.3)
        self._inputs = np.eye(VOCABULARY, dtype=np.float32)[
            rng.integers(VOCABULARY, size=(STEPS, BATCH))
        ]
        self._outputs = np.stack([np.asarray(_predict(teacher, x)) for x in self._inputs])
        self._shardings = jax.tree.map(self._sharding, jax.eval_shape(self._start, self._params))

    def initial(self):
        """Returns parameters and optimizer state before the first step."""
        with jax.set_mesh(self.mesh):
            params = jax.tree.map(self._place, self._params)
            return jax.jit(self._start, out_shardings=self._shardings)(params)

    def steps(self, state, start=0, stop=STEPS):
        """Makes steps.

        Args:
            state: The state after `start` steps, which is given away.
            start: Number of steps made.
            stop: Number of steps to make in all.

        Yields:
            The number of steps made, and the state after them.
        """
        for k in range(start, stop):
            with jax.set_mesh(self.mesh):
                batch = self._place(self._inputs[k]), self._place(self._outputs[k])
                state = jax.block_until_ready(self._step(state, *batch))
            yield k + 1, state

    def whole(self, state):
        """Copies the arrays of a state, by path, from all devices."""
        with jax.set_mesh(self.mesh):
            replicated = NamedSharding(self.mesh, PartitionSpec())
            state = jax.jit(lambda tree: tree, out_shardings=replicated)(state)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in leaves
        }

    @functools.cached_property
    def _step(self):
        def loss(params, x, y):
            gathered = jax.tree.map(lambda leaf: self._gather(leaf, PartitionSpec()), params)
            return jnp.mean(jnp.square(_predict(gathered, x) - y))

        def step(state, x, y):
            params = state["params"]
            grads = jax.grad(loss)(params, x, y)
            updates, optimizer = self._optimizer.update(grads, state["optimizer"], params)
            return {"params": optax.apply_updates(params, updates), "optimizer": optimizer}

        return jax.jit(step, donate_argnums=0, out_shardings=self._shardings)

    def _start(self, params):
        return {"params": params, "optimizer": self._optimizer.init(params)}

    def _sharding(self, array):
        """Splits an array along its first axis."""
        return NamedSharding(self.mesh, PartitionSpec("fsdp") if array.ndim else PartitionSpec())

    def _place(self, array):
        return jax.make_array_from_callback(array.shape, self._sharding(array), array.__getitem__)


def _normal(rng, scale):
    return jax.tree.map(
        lambda shape: scale * rng.standard_normal(shape, np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _predict(params, x):
    h = x @ params["embedding"]
    square = [jnp.tanh(h @ w) for w in params["square"]]
    wide = [jnp.tanh(h @ w + params["bias"]) for w in params["wide"]]
    return jnp.concatenate([*square, *wide], axis=1)


def open_checkpoints(folder):
    """Opens a folder of checkpoints, for all processes together."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def restore(checkpoints, initial):
    """Reads the newest checkpoint onto the devices of an initial state.

    Args:
        checkpoints: An Orbax manager.
        initial: What to return if there is no checkpoint.

    Returns:
        The number of steps made, and the state after them.
    """
    made = checkpoints.latest_step()
    if made is None:
        return 0, initial
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial)
    return made, checkpoints.restore(made, args=ocp.args.StandardRestore(shapes))


def train_with_checkpoints(training, folder, pause):
    """Trains from the newest checkpoint on, if there is one, and writes further ones.

    Args:
        training: What to train.
        folder: Where the checkpoints are.
        pause: Seconds to wait after each step.

    Returns:
        The state at the end.
    """
    with open_checkpoints(folder) as checkpoints:
        start, first = restore(checkpoints, training.initial())
        print(f"starting from {start}", flush=True)
        state = first
        for made, state in training.steps(first, start):
            print(f"step {made}", flush=True)
            time.sleep(pause)
            if made % EVERY == 0:
                print(f"writing {made}", flush=True)
                checkpoints.save(made, args=ocp.args.StandardSave(state))
                print(f"written {made}", flush=True)
    return state


def main():
    """Makes trainings as one of several processes; the first of them writes the results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--coordinator", required=True, help="address and port")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder; continue the first training from the newest one"
    )
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step")
    parser.add_argument("trainings", nargs="+", help="axis type and optimizer: Auto-scion")
    arguments = parser.parse_args()

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
    jax.distributed.initialize(
        coordinator_address=arguments.coordinator,
        num_processes=arguments.processes,
        process_id=arguments.process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=10,
    )
    assert jax.local_device_count() == DEVICES_PER_PROCESS
    assert jax.device_count() == DEVICES_PER_PROCESS * arguments.processes

    def write(name, training, state):
        arrays = training.whole(state)
        if not arguments.process:
            np.savez(arguments.out / f"{name}.npz", **arrays)
        print(f"finished {name}", flush=True)

    for name in arguments.trainings:
        training = Training(*name.split("-"), jax.devices())
        if arguments.checkpoints and name == arguments.trainings[0]:
            state = train_with_checkpoints(training, arguments.checkpoints, arguments.pause)
            write(f"{name}-continued", training, state)
        *_, (_, state) = training.steps(training.initial())
        write(name, training, state)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
