"""Where a run lives on disk, and how it stops and continues.

A checkpoint holds everything that the next step depends on: parameters, optimizer state and the
number of steps made, of which data position and random state are functions (see `gpt_data`). Beside
them it holds the losses so far and the settings, but not the mesh: what was written on one is read
onto any other. Orbax gives a checkpoint its final name only after writing it in full, so whatever
stops the program, the newest one is whole.
"""

import shutil
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from gpt_report import History, write_csv
from gpt_settings import InputError, Settings, require_same
from gpt_training import TrainState

KEPT = 2  # an older checkpoint in reserve


class RunFolder:
    """The folder ``--out`` of one run."""

    def __init__(self, settings: Settings, data: dict[str, int]) -> None:
        """Opens the folder, or refuses if that would harm a run or could not continue it.

        Args:
            settings: The run's settings.
            data: Facts about the data that a resumed run must find again.

        Raises:
            InputError: If the folder holds a run and the settings do not say what to do with it, or
                if there is no matching run to resume.
        """
        self.path = settings.out
        self.csv = self.path / "loss.csv"
        self.picture = self.path / "loss.png"
        self._facts = settings.fixed() | data
        checkpoints = (self.path / "checkpoints").absolute()
        occupied = self.csv.exists() or any(checkpoints.glob("*"))
        if occupied and settings.overwrite:
            for path in (self.csv, self.picture):
                path.unlink(missing_ok=True)
            if checkpoints.exists():
                shutil.rmtree(checkpoints)
        elif occupied and not settings.resume:
            raise InputError(
                f"{self.path} already holds a run: continue it with --resume, replace it with "
                "--overwrite, or choose another folder with --out"
            )
        self._manager = ocp.CheckpointManager(
            checkpoints,
            # Training gives the memory of its state away, so nothing may read it in background.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT, enable_async_checkpointing=False
            ),
        )
        self.step = self._manager.latest_step() or 0
        self.history = History()
        if settings.resume:
            self._resume()

    def _resume(self) -> None:
        """Reads the losses of the newest checkpoint and compares its settings with ours."""
        if self._manager.latest_step() is None:
            raise InputError(f"--resume: there is no checkpoint in {self.path}")
        arguments = ocp.args.Composite(run=ocp.args.JsonRestore())
        run: dict[str, Any] = self._manager.restore(self.step, args=arguments)["run"]
        require_same(run["facts"], self._facts)
        self.history = History.from_json(run["history"])

    def restore(self, initial: TrainState) -> TrainState:
        """Returns the state of the newest checkpoint, or ``initial`` if there is none.

        Args:
            initial: The state before the first step; every array is read onto the devices on which
                its counterpart here lies.
        """
        if not self.step:
            return initial
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self._manager.restore(self.step, args=arguments)["state"]

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint and the CSV file of the losses up to it, unless both are there."""
        write_csv(self.history, self.csv)
        if step == self._manager.latest_step():
            return
        run = {"facts": self._facts, "history": self.history.as_json()}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
        )

    def __enter__(self) -> Self:
        """Returns the folder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends Orbax's background work."""
        self._manager.close()
