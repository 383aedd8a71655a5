"""Memory of a training step of the example's GPT, by optimizer.

    python benchmarks/memory.py                      # a Markdown table
    python benchmarks/memory.py --json memory.json   # also records for other programs

Nothing is run: the compiler says what the compiled, donated step needs, from forward pass to new
parameters. With four microbatches the same batch is split into four, whose gradients are added up
for one step, by `scion_light(every_k=4)` itself and for all others by `optax.MultiSteps(4)`.

What `scion_light` saves: its one buffer is also the accumulator, so with microbatches it needs one
array of the parameters' size less than `scion` under `MultiSteps`. That is all. In the PyTorch
reference the buffer is moreover the gradient itself, which saves one without microbatches too. Not
in JAX: `jax.grad` returns new arrays, which are among the temporaries here whatever the optimizer.
A bfloat16 buffer is half as large, but sums are taken in float32, and where the compiler keeps them
for all matrices at once, temporaries take back a part of what the buffer saves.

Parameters and states follow from the shapes alone. The temporaries are those of XLA's CPU compiler
in the versions named above the table; an accelerator's plans differ.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import jaxlib
import optax

from gpt_data import BYTE_VOCABULARY
from gpt_optimizers import OPTIMIZERS, Recipe, layer_norms, learning_rate_schedule, param_labels
from gpt_settings import Settings, parse_settings
from gpt_training import TrainState, make_loss, make_model, make_steps
from scion_jax import scion, scion_light

MICROBATCHES = 4
MEBIBYTE = 2**20

Optimizer = Callable[[Recipe, int], optax.GradientTransformation]  # of the microbatches per step


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


def _with_accumulator(build: Callable[[Recipe], optax.GradientTransformation]) -> Optimizer:
    def built(recipe: Recipe, microbatches: int) -> optax.GradientTransformation:
        if microbatches == 1:
            return build(recipe)
        return optax.MultiSteps(build(recipe), microbatches).gradient_transformation()

    return built


def _scion(dtype: Any) -> Optimizer:
    return _with_accumulator(
        lambda recipe: scion(recipe.schedule, recipe.norms, param_labels, momentum_dtype=dtype)
    )


def _scion_light(dtype: Any) -> Optimizer:
    return lambda recipe, microbatches: scion_light(
        recipe.schedule, recipe.norms, param_labels, momentum_dtype=dtype, every_k=microbatches
    )


CASES: dict[str, Optimizer] = {
    "adamw": _with_accumulator(OPTIMIZERS["adamw"].build),
    "muon": _with_accumulator(OPTIMIZERS["muon"].build),
    "scion": _scion(None),
    "scion, bfloat16": _scion(jnp.bfloat16),
    "scion_light": _scion_light(None),
    "scion_light, bfloat16": _scion_light(jnp.bfloat16),
}
PEERS = ("adamw", "muon", "scion")


def default_settings(*arguments: str) -> Settings:
    """Returns the model and the batch that are measured, unless ``arguments`` say otherwise."""
    shape = ["--width", "256", "--layers", "4", "--batch", "8", "--sequence", "128"]
    optimizers = {name: choice.defaults for name, choice in OPTIMIZERS.items()}
    return parse_settings([*shape, *arguments], "", optimizers)


def array_bytes(tree: Any) -> int:
    """Returns the size of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make_step(settings: Settings, name: str, microbatches: int) -> tuple[Callable, TrainState]:
    """Makes the step and the shapes of its state.

    Args:
        settings: The model and the batch.
        name: One of `CASES`.
        microbatches: The number of parts of the batch.

    Returns:
        A function of a state and the tokens of some steps, and the state's shapes.
    """
    logits, params = make_model(settings, BYTE_VOCABULARY)
    recipe = Recipe(learning_rate_schedule(settings), layer_norms(settings), settings)
    optimizer = CASES[name](recipe, microbatches)
    state = jax.eval_shape(lambda params: TrainState(params, optimizer.init(params)), params)
    return make_steps(make_loss(logits), optimizer, microbatches), state


def measure(settings: Settings, name: str, microbatches: int) -> Usage:
    """Compiles a step and asks what it needs.

    Args:
        settings: The model and the batch.
        name: One of `CASES`.
        microbatches: The number of parts of the batch.

    Returns:
        The bytes.
    """
    step, state = make_step(settings, name, microbatches)
    tokens = jax.ShapeDtypeStruct((1, settings.batch, settings.sequence + 1), jnp.int32)
    plan = jax.jit(step, donate_argnums=0).lower(state, tokens).compile().memory_analysis()
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
    lines = [
        "| optimizer | microbatches | parameters | optimizer state | temporaries | whole step "
        "| to `scion` |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, microbatches), usage in usages.items():
        sizes = (usage.params, usage.state, usage.temporaries, usage.step)
        ratio = usage.step / usages["scion", microbatches].step
        cells = [*(f"{size / MEBIBYTE:.1f}" for size in sizes), f"{ratio:.2f}"]
        optimizer, comma, dtype = name.partition(",")
        lines.append(f"| `{optimizer}`{comma}{dtype} | {microbatches} | {' | '.join(cells)} |")
    return "\n".join(lines)


def records(usages: dict[tuple[str, int], Usage]) -> list[dict[str, Any]]:
    """Compares each of our optimizers with its peers under the same number of microbatches."""
    return [
        {
            "benchmark": f"memory: {quantity}",
            "case": case_name(name, microbatches),
            "ours": round(ours / MEBIBYTE, 4),
            "peer": round(peer / MEBIBYTE, 4),
            "peer_name": peer_name,
            "ratio": round(ours / peer, 4),
            "unit": "MiB",
        }
        for (name, microbatches), usage in usages.items()
        if name.startswith("scion")
        for peer_name in PEERS
        if peer_name != name
        for quantity, ours, peer in (
            ("optimizer state", usage.state, usages[peer_name, microbatches].state),
            ("whole step", usage.step, usages[peer_name, microbatches].step),
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write records there")
    path = parser.parse_args(arguments).json
    settings = default_settings()
    usages = {
        (name, microbatches): measure(settings, name, microbatches)
        for microbatches in (1, MICROBATCHES)
        for name in CASES
    }
    print(
        f"MiB; width {settings.width}, {settings.layers} layers, batch {settings.batch}, sequence "
        f"{settings.sequence}; jaxlib {jaxlib.__version__}, optax {optax.__version__}, CPU\n"
    )
    print(table(usages))
    if path:
        path.write_text(json.dumps(records(usages), indent=1) + "\n")


if __name__ == "__main__":
    main()
