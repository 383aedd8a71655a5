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
BATCH, VOCABULARY = 32, 16
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


def normal(rng, scale):
    draw = lambda *shape: scale * rng.standard_normal(shape, np.float32)  # noqa: E731
    square, wide = [draw(8, 8) for _ in range(3)], [draw(8, 16) for _ in range(2)]
    return {"embedding": draw(VOCABULARY, 8), "square": square, "wide": wide, "bias": draw(16)}


def predict(params, x):
    h = x @ params["embedding"]
    square = [jnp.tanh(h @ w) for w in params["square"]]
    wide = [jnp.tanh(h @ w + params["bias"]) for w in params["wide"]]
    return jnp.concatenate([*square, *wide], axis=1)


class Training:
    """A teacher's outputs, learned by least squares, with data and parameters split over a mesh."""

    def __init__(self, name, devices):
        """Compiles nothing yet.

        Args:
            name: The kind of the mesh's axes and the optimizer: `"Explicit-scion"`. Those of kind
                `"Auto"` have to be told what to spread over.
            devices: The devices of the mesh.
        """
        kind, optimizer = name.split("-")
        explicit = kind == "Explicit"
        self.mesh = jax.make_mesh((len(devices),), ("fsdp",), (AxisType[kind],), devices=devices)
        self._gather = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        self._optimizer = OPTIMIZERS[optimizer](shard_over=None if explicit else "fsdp")
        rng = np.random.default_rng(0)
        teacher, self._params = normal(rng, 1.0), normal(rng, 0.3)
        words = rng.integers(VOCABULARY, size=(STEPS, BATCH))
        self._inputs = np.eye(VOCABULARY, dtype=np.float32)[words]
        self._outputs = np.stack([np.asarray(predict(teacher, x)) for x in self._inputs])
        self._shardings = jax.tree.map(self._sharding, jax.eval_shape(self._start, self._params))

    def initial(self):
        """Returns parameters and optimizer state before the first step."""
        with jax.set_mesh(self.mesh):
            params = jax.tree.map(self._place, self._params)
            return jax.jit(self._start, out_shardings=self._shardings)(params)

    def steps(self, state, start=0):
        """Makes steps after the first `start`; yields how many are made, and the state.

        The state that comes in is given away.
        """
        for k in range(start, STEPS):
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
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    @functools.cached_property
    def _step(self):
        def loss(params, x, y):
            gathered = jax.tree.map(lambda leaf: self._gather(leaf, PartitionSpec()), params)
            return jnp.mean(jnp.square(predict(gathered, x) - y))

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


def open_checkpoints(folder):
    """Opens a folder of checkpoints, for all processes together."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def restore(checkpoints, initial):
    """Reads the newest checkpoint onto the devices of an initial state, or returns that.

    The number of steps made comes with it.
    """
    made = checkpoints.latest_step()
    if made is None:
        return 0, initial
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial)
    return made, checkpoints.restore(made, args=ocp.args.StandardRestore(shapes))


def train_with_checkpoints(training, folder, pause):
    """Trains from the newest checkpoint on, if there is one, and writes further ones."""
    with open_checkpoints(folder) as checkpoints:
        start, state = restore(checkpoints, training.initial())
        print(f"starting from {start}", flush=True)
        for made, state in training.steps(state, start):  # noqa: B020
            print(f"step {made}", flush=True)
            time.sleep(pause)
            if made % EVERY == 0:
                print(f"writing {made}", flush=True)
                checkpoints.save(made, args=ocp.args.StandardSave(state))
    return state


def main():
    """Makes trainings as one of several processes; the first of them writes the results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--coordinator", help="address and port")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--checkpoints", type=Path, help="from which the first training goes on")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step")
    parser.add_argument("trainings", nargs="+")
    options = parser.parse_args()

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
    jax.distributed.initialize(
        coordinator_address=options.coordinator,
        num_processes=options.processes,
        process_id=options.process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=10,
    )
    assert jax.local_device_count() == DEVICES_PER_PROCESS
    assert jax.device_count() == DEVICES_PER_PROCESS * options.processes

    def write(name, training, state):
        arrays = training.whole(state)
        if not options.process:
            np.savez(options.out / f"{name}.npz", **arrays)

    for name in options.trainings:
        training = Training(name, jax.devices())
        if options.checkpoints and name == options.trainings[0]:
            state = train_with_checkpoints(training, options.checkpoints, options.pause)
            write(f"{name}-continued", training, state)
        *_, (_, state) = training.steps(training.initial())
        write(name, training, state)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
