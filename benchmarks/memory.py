"""Memory of a training step of a small GPT, by optimizer.

    python -m benchmarks.memory                      # a Markdown table
    python -m benchmarks.memory --json memory.json   # also records for other programs

Nothing is run: the compiler says what the compiled, donated step needs, from forward pass to new
parameters. With four microbatches the same batch is split into four, whose gradients are added up
for one step, by `scion_light(every_k=4)` itself and for all others by `optax.MultiSteps(4)`.

What `scion_light` saves: its one buffer is also the accumulator, so with microbatches it needs one
array of the parameters' size less than `scion` under `MultiSteps`. That is all. In the PyTorch
reference the buffer is moreover the gradient itself, which saves one without microbatches too. Not
in JAX: `jax.grad` returns new arrays, which are among the temporaries here whatever the optimizer.
A bfloat16 buffer is half as large, but sums are taken in float32, and where the compiler keeps them
for all matrices at once, temporaries take back a part of what the buffer saves.

Parameters and states follow from the shapes alone. The temporaries are those of the compiler for
the device named above the tables; another's plans differ.

The second table is about the update alone, `jax.jit(optimizer.update)`, on block trees (see
block_trees.py) of more and more layers: its temporaries, and how many times the size of a layer's
updates they grow by with each layer.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.block_trees import COMPARED, OURS, PEER, array_bytes, block_shapes
from benchmarks.experiments.optimizers import CONSTRAINED, CONTESTANTS, LABELS
from benchmarks.experiments.text import TEXT
from benchmarks.experiments.training import Setting, loss_of
from benchmarks.reporting import Record, make_parser, markdown, record, report
from scion_jax import scion, scion_light

MICROBATCHES = 4
MEBIBYTE = 2**20
MEASURED = Setting("", 2**-8, width=256, layers=4, batch=8, sequence=128)

Optimizer = Callable[[int], optax.GradientTransformation]  # of the microbatches per step


@dataclass(frozen=True)
class Usage:
    """What a step needs, in bytes.

    Attributes:
        params: The parameters.
        state: The optimizer's state.
        temporaries: The rest while the step runs: activations, gradients, updates.
        step: All of it at once, with the batch: arguments and results, where they do not share
            memory, and temporaries.
    """

    params: int
    state: int
    temporaries: int
    step: int


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        params: The model's matrices.
        optimizer: The optimizer's state.
    """

    params: Any
    optimizer: optax.OptState


def _rate(count: jax.Array) -> float:
    """The learning rate: a schedule, as in training, though its values do not matter here."""
    del count
    return MEASURED.learning_rate


def _with_accumulator(optimizer: optax.GradientTransformation) -> Optimizer:
    def built(microbatches: int) -> optax.GradientTransformation:
        if microbatches == 1:
            return optimizer
        return optax.MultiSteps(optimizer, microbatches).gradient_transformation()

    return built


def _scion(dtype: Any) -> Optimizer:
    return _with_accumulator(scion(_rate, CONSTRAINED, LABELS, momentum_dtype=dtype))


def _scion_light(dtype: Any) -> Optimizer:
    return lambda microbatches: scion_light(
        _rate, CONSTRAINED, LABELS, momentum_dtype=dtype, every_k=microbatches
    )


CASES: dict[str, Optimizer] = {
    "adamw": _with_accumulator(CONTESTANTS["adamw"].build(_rate, 0.0)),
    "muon": _with_accumulator(CONTESTANTS["muon"].build(_rate, 0.0)),
    "scion": _scion(None),
    "scion, bfloat16": _scion(jnp.bfloat16),
    "scion_light": _scion_light(None),
    "scion_light, bfloat16": _scion_light(jnp.bfloat16),
}
PEERS = ("adamw", "muon", "scion")

UPDATE_WIDTH = 768
UPDATE_DEPTHS = (2, 4, 8)


def make_step(setting: Setting, name: str, microbatches: int) -> tuple[Callable, TrainState]:
    """Makes the step and the shapes of its state.

    Args:
        setting: The model and the batch.
        name: One of `CASES`.
        microbatches: The number of parts of the batch.

    Returns:
        A function of a state and the windows of a batch, and the state's shapes.
    """
    optimizer, loss = CASES[name](microbatches), loss_of(setting, TEXT)

    def call(state: TrainState, windows: jax.Array) -> tuple[TrainState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state.params, windows)
        updates, memory = optimizer.update(gradients, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), memory), value

    def step(state: TrainState, windows: jax.Array) -> tuple[TrainState, jax.Array]:
        parts = windows.reshape(microbatches, -1, windows.shape[-1])
        return jax.lax.scan(call, state, parts)

    def start() -> TrainState:
        params = nnx.state(TEXT.make_model(setting, nnx.Rngs(0)), nnx.Param)
        return TrainState(params, optimizer.init(params))

    return step, nnx.eval_shape(start)


def measure(setting: Setting, name: str, microbatches: int) -> Usage:
    """Compiles a step and asks what it needs.

    Args:
        setting: The model and the batch.
        name: One of `CASES`.
        microbatches: The number of parts of the batch.

    Returns:
        The bytes.
    """
    step, state = make_step(setting, name, microbatches)
    windows = jax.ShapeDtypeStruct((setting.batch, setting.sequence + 1), jnp.int32)
    plan = jax.jit(step, donate_argnums=0).lower(state, windows).compile().memory_analysis()
    temporaries = plan.temp_size_in_bytes
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Usage(
        array_bytes(state.params), array_bytes(state.optimizer), temporaries, kept + temporaries
    )


def case_name(name: str, microbatches: int) -> str:
    """Returns how a case is called in the records."""
    return name if microbatches == 1 else f"{name}, {microbatches} microbatches"


def table(usages: dict[tuple[str, int], Usage]) -> str:
    """Formats a Markdown table in MiB, with the whole step's ratio to that of ``scion``."""
    quantities = ["parameters", "optimizer state", "temporaries", "whole step"]
    titles = ["optimizer", "microbatches", *quantities, "to `scion`"]
    rows = []
    for (name, microbatches), usage in usages.items():
        sizes = (usage.params, usage.state, usage.temporaries, usage.step)
        ratio = usage.step / usages["scion", microbatches].step
        cells = [*(f"{size / MEBIBYTE:.1f}" for size in sizes), f"{ratio:.2f}"]
        optimizer, comma, dtype = name.partition(",")
        rows.append([f"`{optimizer}`{comma}{dtype}", str(microbatches), *cells])
    return markdown(titles, rows)


def records(usages: dict[tuple[str, int], Usage]) -> list[Record]:
    """Compares each of our optimizers with its peers under the same number of microbatches."""
    return [
        record(
            f"memory: {quantity}",
            case_name(name, microbatches),
            ours / MEBIBYTE,
            peer_name,
            peer / MEBIBYTE,
            "MiB",
        )
        for (name, microbatches), usage in usages.items()
        if name.startswith("scion")
        for peer_name in PEERS
        if peer_name != name
        for quantity, ours, peer in (
            ("optimizer state", usage.state, usages[peer_name, microbatches].state),
            ("whole step", usage.step, usages[peer_name, microbatches].step),
        )
    ]


def update_temporaries(
    optimizer: optax.GradientTransformation, width: int, depths: Sequence[int]
) -> dict[int, int]:
    """Compiles the update alone and asks what it needs beside arguments and results.

    Args:
        optimizer: The optimizer.
        width: The width of the block trees.
        depths: Their numbers of layers.

    Returns:
        The bytes of the temporaries by number of layers.
    """
    temporaries = {}
    for layers in depths:
        params = block_shapes(layers, width)
        state = jax.eval_shape(optimizer.init, params)
        plan = jax.jit(optimizer.update).lower(params, state, params).compile().memory_analysis()
        temporaries[layers] = plan.temp_size_in_bytes
    return temporaries


def growth(temporaries: dict[int, int], width: int) -> float:
    """Returns by how many times the size of a layer's updates temporaries grow with each layer."""
    slope = statistics.linear_regression(list(temporaries), list(temporaries.values())).slope
    return slope / array_bytes(block_shapes(1, width))


def update_table(temporaries: dict[str, dict[int, int]], width: int) -> str:
    """Formats a Markdown table in MiB, with the ratio of each to the peer in the last column."""
    depths = list(temporaries[PEER])
    rows = [
        [
            f"`{name}`",
            *(f"{sizes[layers] / MEBIBYTE:.1f}" for layers in depths),
            f"{growth(sizes, width):.2f}",
            f"{sizes[depths[0]] / temporaries[PEER][depths[0]]:.2f}",
        ]
        for name, sizes in temporaries.items()
    ]
    titles = [f"{layers} layers" for layers in depths]
    return markdown(["update of", *titles, "growth / updates", f"to `{PEER}`, {titles[0]}"], rows)


def update_records(temporaries: dict[str, dict[int, int]], width: int) -> list[Record]:
    """Compares our update's temporaries and their growth with the peer's."""
    ours, peer = temporaries[OURS], temporaries[PEER]
    case = f"{OURS}, width {width}"
    return [
        record(
            "memory: temporaries of an update",
            f"{case}, {layers} layers",
            size / MEBIBYTE,
            PEER,
            peer[layers] / MEBIBYTE,
            "MiB",
        )
        for layers, size in ours.items()
    ] + [
        record(
            "memory: growth of an update's temporaries per layer",
            case,
            growth(ours, width),
            PEER,
            growth(peer, width),
            "sizes of a layer's updates",
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    path = make_parser(__doc__).parse_args(arguments).json
    usages = {
        (name, microbatches): measure(MEASURED, name, microbatches)
        for microbatches in (1, MICROBATCHES)
        for name in CASES
    }
    temporaries = {
        name: update_temporaries(optimizer, UPDATE_WIDTH, UPDATE_DEPTHS)
        for name, optimizer in COMPARED.items()
    }
    heading = (
        f"MiB; width {MEASURED.width}, {MEASURED.layers} layers, batch {MEASURED.batch}, sequence "
        f"{MEASURED.sequence}"
    )
    update_heading = f"The update alone, MiB; block trees of width {UPDATE_WIDTH}"
    report(
        heading,
        [table(usages), update_heading, update_table(temporaries, UPDATE_WIDTH)],
        records(usages) + update_records(temporaries, UPDATE_WIDTH),
        path,
    )


if __name__ == "__main__":
    main()
