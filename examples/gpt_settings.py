"""Settings of the example: one dataclass, from which the command line is made.

Every field is a flag: ``eval_every`` is ``--eval-every``. Its default, its help text and the moment
from which it may no longer change stand side by side, so that none of them can drift apart.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MESH_AXES = ("data", "fsdp", "tensor")

MAY_BE_ZERO = ("seed", "sample_length", "fake_devices")

# Stands for a default that depends on the optimizer; `parse_settings` replaces it.
OWN = math.nan


class InputError(ValueError):
    """What the user asked for cannot be done; the message says why, no traceback is needed."""


def flag(default: Any, text: str, *, fixed: bool = True, **options: Any) -> Any:
    """Declares a field of `Settings` together with its flag.

    Args:
        default: The value when the flag is absent. A number or a path also gives the flag's type.
        text: The help text.
        fixed: Whether a resumed run must have the same value to continue exactly.
        **options: More arguments for ``ArgumentParser.add_argument``.

    Returns:
        A dataclass field.
    """
    metadata = {"help": text, "fixed": fixed, "options": options}
    return dataclasses.field(default=default, metadata=metadata)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the value of ``--mesh``.

    Args:
        text: Such as ``data=2,fsdp=4``.

    Returns:
        The sizes by name, in the order of `MESH_AXES`.

    Raises:
        argparse.ArgumentTypeError: If the text is anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not NAME=SIZE with a name out of {', '.join(MESH_AXES)} and a "
                "positive size"
            )
        if name in sizes:
            raise argparse.ArgumentTypeError(f"{name} is named twice in {text!r}")
        sizes[name] = int(size)
    return {name: sizes[name] for name in MESH_AXES if name in sizes}


@dataclass(frozen=True)
class Settings:
    """Everything that one run of the example depends on."""

    data: tuple[str, ...] = flag(
        (),
        "text files (a byte is a token) or FineWeb token shards (.bin); "
        "default: the sources of Python's standard library",
        nargs="+",
        metavar="FILE",
    )
    out: Path = flag(Path("runs/gpt"), "folder for loss.csv, loss.png and checkpoints", fixed=False)
    resume: bool = flag(False, "continue the run in --out where it stopped", fixed=False)
    overwrite: bool = flag(False, "replace the run in --out by a new one", fixed=False)

    width: int = flag(128, "width of the residual stream")
    layers: int = flag(3, "number of blocks")
    heads: int = flag(4, "attention heads per block")
    tied: bool = flag(False, "use one matrix as embedding and as output head")

    batch: int = flag(16, "sequences per step")
    sequence: int = flag(128, "tokens per sequence")
    steps: int = flag(1200, "optimizer steps of the whole run")
    seed: int = flag(0, "seed of initialization, batches and sample")

    optimizer: str = flag("unconstrained_scion", "which optimizer trains the model")
    learning_rate: float = flag(OWN, "peak learning rate")
    hidden_radius: float = flag(OWN, "radius of the hidden matrices' spectral ball (scion family)")
    head_radius: float = flag(
        OWN, "radius of the head's sign ball, also of a tied embedding (scion family)"
    )
    embedding_radius: float = flag(
        1.0, "radius of the embedding's column ball (scion family, untied)"
    )
    momentum: float = flag(0.1, "weight of the newest gradient in the average (scion family)")
    weight_decay: float = flag(
        0.0, "decay where the optimizer has one (unconstrained_scion, adamw, muon)"
    )
    rho: float = flag(
        OWN,
        "pairing below which steps get shorter (clipped optimizers): about the middle of what a "
        "run of the unclipped optimizer logs",
    )
    accumulate: int = flag(
        1, "microbatches that a batch is split into, whose gradients are added up for one step"
    )

    mesh: Mapping[str, int] | None = flag(
        None,
        "train on several devices: data and fsdp split the batch, fsdp and tensor the matrices; "
        "the sizes multiply to the number of devices used, as in fsdp=8 or data=2,fsdp=2,tensor=2; "
        "--resume may change it (default: one device)",
        fixed=False,
        type=parse_mesh,
        metavar="NAME=SIZE,...",
    )
    fake_devices: int = flag(
        0, "have the CPU act as this many devices; 0: take the devices there are", fixed=False
    )

    eval_every: int = flag(200, "steps between two validation losses", fixed=False)
    eval_batches: int = flag(64, "batches in a validation loss", fixed=False)
    checkpoint_every: int = flag(300, "steps between two checkpoints", fixed=False)
    sample_length: int = flag(400, "tokens in the final sample", fixed=False)
    temperature: float = flag(0.7, "temperature of the final sample", fixed=False)

    def __post_init__(self) -> None:
        """Refuses values that no run can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = flag_name(field.name)
            if type(value) is int and value < (0 if field.name in MAY_BE_ZERO else 1):
                raise InputError(f"{name} must be positive, not {value}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(
                f"--width {self.width} over --heads {self.heads}: the width of a head must be a "
                "whole, even number (rotary embeddings turn pairs of channels)"
            )
        for name in ("temperature", "rho"):
            if not getattr(self, name) > 0:
                raise InputError(f"{flag_name(name)} must be positive, not {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise InputError(
                f"--batch {self.batch} cannot be split into --accumulate {self.accumulate} equal "
                "microbatches"
            )
        sizes = self.mesh or {}
        parts = sizes.get("data", 1) * sizes.get("fsdp", 1)
        if self.batch // self.accumulate % parts:
            raise InputError(
                f"--mesh splits a batch into data × fsdp = {parts} equal parts, which "
                f"--batch {self.batch} with --accumulate {self.accumulate} does not allow"
            )
        if self.resume and self.overwrite:
            raise InputError("--resume keeps the run in --out, --overwrite replaces it: choose one")

    def fixed(self) -> dict[str, Any]:
        """Returns the values that a resumed run must share, as JSON would return them."""
        fields = (field for field in dataclasses.fields(self) if field.metadata["fixed"])
        values = {field.name: getattr(self, field.name) for field in fields}
        return values | {"data": list(self.data)}


def require_same(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to resume a run under settings that it did not have.

    Args:
        stored: The fixed settings of the run as its checkpoint tells them.
        current: The fixed settings of this call.

    Raises:
        InputError: If they differ.
    """
    differences = [
        f"  {flag_name(name)}: {stored.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in sorted(stored.keys() | current.keys())
        if stored.get(name) != current.get(name)
    ]
    if differences:
        raise InputError(
            "--resume continues a run exactly, so it needs the flags of that run:\n"
            + "\n".join(differences)
        )


def flag_name(field_name: str) -> str:
    """Returns the flag of a field, e.g. ``--eval-every`` for ``eval_every``."""
    return "--" + field_name.replace("_", "-")


def parse_settings(
    arguments: Sequence[str] | None, description: str, optimizers: Mapping[str, Mapping[str, float]]
) -> Settings:
    """Reads the command line.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
        description: What ``--help`` says first.
        optimizers: The name of every optimizer and the defaults that are its own.

    Returns:
        The settings, complete.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Settings):
        options: dict[str, Any] = dict(field.metadata["options"])
        text = field.metadata["help"]
        if field.default is False:
            options["action"] = "store_true"
        elif field.default not in ((), None):
            options["type"] = type(field.default)
            shown = "the optimizer's own" if field.default is OWN else field.default
            text += f" (default: {shown})"
        if field.name == "optimizer":
            options["choices"] = list(optimizers)
        parser.add_argument(flag_name(field.name), default=field.default, help=text, **options)
    values = vars(parser.parse_args(arguments))
    values["data"] = tuple(values["data"])
    own = optimizers[values["optimizer"]]
    values |= {name: own.get(name, 1.0) for name, value in values.items() if value is OWN}
    try:
        return Settings(**values)
    except InputError as error:
        parser.error(str(error))
