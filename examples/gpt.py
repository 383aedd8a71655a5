"""Trains a small GPT on text and compares optimizers.

    python examples/gpt.py                     # unconstrained Scion, on the standard library
    python examples/gpt.py --optimizer muon --out runs/muon
    python examples/gpt.py --data book.txt --out runs/book

loss.csv and loss.png show the pairing of the average gradient with the direction of the step. To
clip, take --rho from about the middle of what the unclipped optimizer showed:

    python examples/gpt.py --optimizer unconstrained_clipped_scion --rho RHO --out runs/clipped

The published learning rate and radii for nanoGPT (124M), on FineWeb token shards:

    python examples/gpt.py --data fineweb_train_*.bin --out runs/fineweb --optimizer scion \\
        --tied --width 768 --layers 12 --heads 6 --sequence 1024 \\
        --learning-rate 0.00024414 --hidden-radius 50 --head-radius 3000

On several devices, or on one CPU that acts as eight; a run may be resumed on any other mesh:

    python examples/gpt.py --mesh data=2,fsdp=4 --out runs/mesh
    python examples/gpt.py --mesh fsdp=8 --fake-devices 8 --out runs/mesh

The last tenth of the text is held out for the validation loss. Ctrl-C stops after the steps under
way and keeps everything; --resume then continues as if nothing had happened.
"""

import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np
from tqdm import tqdm

from gpt_checkpoint import RunFolder
from gpt_data import BYTE_VOCABULARY, Corpus, load_corpus
from gpt_mesh import describe, make_mesh, simulate_devices, use_mesh
from gpt_optimizers import OPTIMIZERS
from gpt_report import plot_history
from gpt_settings import InputError, Settings, parse_settings
from gpt_training import Trainer, TrainState, make_trainer

MOST_STEPS_PER_CALL = 20  # the progress bar moves, and Ctrl-C is heard, between two calls


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C into a question that the loop asks between two calls.

    A second Ctrl-C stops the program at once, as usual.

    Yields:
        A function that says whether the user wants to stop.
    """
    asked = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def validation_loss(trainer: Trainer, params: object, text: Corpus, settings: Settings) -> float:
    """Returns the mean loss over the same windows of held-out text every time."""
    windows = text.even_windows(settings.eval_batches * settings.batch, settings.sequence + 1)
    batches = np.split(windows, settings.eval_batches)
    return float(np.mean([trainer.loss(params, batch) for batch in batches]))


def steps_per_call(settings: Settings, done: int) -> int:
    """Returns how many steps a compiled call makes, so that calls end where something is due."""
    due = math.gcd(done, settings.steps, settings.eval_every, settings.checkpoint_every)
    return max(count for count in range(1, MOST_STEPS_PER_CALL + 1) if due % count == 0)


def train(
    settings: Settings, trainer: Trainer, folder: RunFolder, texts: tuple[Corpus, Corpus]
) -> TrainState:
    """Makes the steps that are left.

    Args:
        settings: The run's settings.
        trainer: The compiled functions.
        folder: Where losses and checkpoints go.
        texts: The training and the validation text.

    Returns:
        The state after the last step, or after those under way when the user pressed Ctrl-C.
    """
    state = folder.restore(trainer.initial)
    history = folder.history
    count = steps_per_call(settings, folder.step)
    tokens_per_step = settings.batch * settings.sequence
    bar = tqdm(
        total=settings.steps * tokens_per_step,
        initial=folder.step * tokens_per_step,
        unit="token",
        unit_scale=True,
        mininterval=0.5,
    )
    with bar, interruption() as interrupted:
        for step in range(folder.step + count, settings.steps + 1, count):
            batches = [
                texts[0].random_windows(settings.seed, past, settings.batch, settings.sequence + 1)
                for past in range(step - count, step)
            ]
            state, progress = trainer.steps(state, np.stack(batches))
            history.extend(*progress)
            bar.update(count * tokens_per_step)
            bar.set_postfix(loss=f"{history.train[-1]:.3f}", refresh=False)
            if step % settings.eval_every == 0 or step == settings.steps:
                history.validation[step] = validation_loss(
                    trainer, state.params, texts[1], settings
                )
                bar.write(f"step {step}: validation loss {history.validation[step]:.4f}")
            if interrupted() or step % settings.checkpoint_every == 0 or step == settings.steps:
                folder.save(step, state)
                folder.step = step
            if interrupted():
                break
    return state


def print_sample(settings: Settings, trainer: Trainer, params: object, text: Corpus) -> None:
    """Prints how the model continues a piece of held-out text."""
    context = text.even_windows(2, settings.sequence)[-1]
    tokens = np.asarray(trainer.sample(params, context, jax.random.key(settings.seed)))
    if text.vocabulary != BYTE_VOCABULARY:
        print("sample, as token numbers (a shard brings no tokenizer):", *tokens)
        return
    before, after = (bytes(part.tolist()).decode(errors="replace") for part in (context, tokens))
    print(f"--- held-out text\n{before}\n--- continued by the model\n{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.

    Raises:
        InputError: If the command line, the devices, the data or the output folder does not allow a
            run.
    """
    defaults = {name: choice.defaults for name, choice in OPTIMIZERS.items()}
    settings = parse_settings(arguments, __doc__ or "", defaults)
    simulate_devices(settings.fake_devices)
    mesh = make_mesh(settings.mesh)  # first: a run is not replaced for one that cannot begin
    corpus = load_corpus(settings.data)
    text, held_out = corpus.split()
    with RunFolder(settings, {"tokens": len(corpus)}) as folder:
        if mesh:
            print(describe(mesh))
        trainer = make_trainer(settings, corpus.vocabulary, mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(trainer.initial.params))
        print(
            f"{count:,} parameters, {len(text):,} training and {len(held_out):,} validation tokens"
        )
        with use_mesh(mesh):
            state = train(settings, trainer, folder, (text, held_out))
        unit = "byte" if corpus.vocabulary == BYTE_VOCABULARY else "token"
        rho = settings.rho if "rho" in defaults[settings.optimizer] else None
        plot_history(folder.history, folder.picture, f"GPT, {settings.optimizer}", unit, rho)
    if folder.step < settings.steps:
        print(f"stopped after step {folder.step}; --resume continues from there")
        return
    if settings.sample_length:
        with use_mesh(mesh):
            print_sample(settings, trainer, state.params, held_out)
    loss = folder.history.validation[settings.steps]
    print(f"final validation loss: {loss:.4f} nats per {unit}; see {folder.picture}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"gpt.py: {error}")
