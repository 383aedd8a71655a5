"""Text as tokens: files, FineWeb shards or the standard library, and batches drawn from them.

Train and validation: the last tenth of the tokens is held out in one piece, and no training window
reaches into it. Neighbouring text is alike (a file, its package), so a held-out tail is a harder
and more honest test than held-out blocks scattered through the text would be. The sources of
Python's standard library are read in alphabetical order, which puts about 1 MB of ordinary modules
in the tail (from ``tkinter`` or ``unittest`` to ``zoneinfo``).

Batches: the windows that follow ``k`` steps are a function of the seed and ``k`` alone. ``k`` is
therefore the whole data position: a resumed run needs no other to see the same batches.
"""

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt_settings import InputError

Tokens = np.ndarray[Any, np.dtype[Any]]  # one axis, uint8 or uint16, perhaps a memory map

BYTE_VOCABULARY = 256
FINEWEB_VOCABULARY = 50304  # GPT-2's 50257 tokens, rounded up to a multiple of 128
HELD_OUT = 0.1

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # int32 numbers: magic, version, number of tokens, zeros

# Not text that anyone wrote by hand (tables, generated pages), or not part of every installation.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


def read_shard(path: Path) -> Tokens:
    """Maps the tokens of a FineWeb shard into memory.

    Args:
        path: A file in the format of modded-nanogpt: 256 int32, then uint16 tokens.

    Returns:
        The tokens; they are read from disk when they are used.

    Raises:
        InputError: If the header or the length of the file is not what the format says.
    """
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header.size < SHARD_HEADER:
        raise InputError(f"{path}: {size} bytes are too few for a shard's header of 1024 bytes")
    magic, version, count = (int(number) for number in header[:3])
    if magic != SHARD_MAGIC:
        raise InputError(f"{path}: not a FineWeb shard: magic {magic} instead of {SHARD_MAGIC}")
    if version != SHARD_VERSION:
        raise InputError(f"{path}: shard version {version}; only {SHARD_VERSION} is known")
    expected = header.nbytes + 2 * count
    if count < 1 or size != expected:
        raise InputError(
            f"{path}: truncated or damaged: the header promises {count} tokens, "
            f"a file of {expected} bytes, but it has {size}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes, shape=(count,))


def read_text(paths: Sequence[Path]) -> Tokens:
    """Returns the bytes of the files, one after the other."""
    return np.frombuffer(b"\n".join(path.read_bytes() for path in paths), dtype=np.uint8)


def standard_library() -> list[Path]:
    """Returns the source files of Python's standard library, always in the same order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in files if LEFT_OUT.isdisjoint(path.parts))
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


@dataclass(frozen=True)
class Corpus:
    """A text in pieces, from which windows of consecutive tokens are cut.

    Attributes:
        pieces: Token arrays; a window lies within one of them.
        vocabulary: The number of different tokens.
    """

    pieces: tuple[Tokens, ...]
    vocabulary: int

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return sum(len(piece) for piece in self.pieces)

    def split(self) -> tuple["Corpus", "Corpus"]:
        """Returns the training text and the held-out tail."""
        boundary = round(len(self) * (1 - HELD_OUT))
        train: list[Tokens] = []
        validation: list[Tokens] = []
        for piece in self.pieces:
            cut = min(boundary, len(piece))
            boundary -= cut
            train.append(piece[:cut])
            validation.append(piece[cut:])
        return Corpus(tuple(train), self.vocabulary), Corpus(tuple(validation), self.vocabulary)

    def random_windows(self, seed: int, step: int, count: int, length: int) -> Tokens:
        """Returns the windows to train on after ``step`` steps, shape ``(count, length)``."""
        generator = np.random.default_rng((seed, step))
        return self._windows(generator.integers(self._starts(length), size=count), length)

    def even_windows(self, count: int, length: int) -> Tokens:
        """Returns windows spread evenly over the whole text, shape ``(count, length)``."""
        return self._windows(np.arange(count) * self._starts(length) // count, length)

    def _starts(self, length: int) -> int:
        """Returns at how many places a window of that length can begin."""
        starts = sum(max(0, len(piece) - length + 1) for piece in self.pieces)
        if not starts:
            raise InputError(f"the data is too short: no {length} tokens in a row to cut out")
        return starts

    def _windows(self, starts: Tokens, length: int) -> Tokens:
        """Cuts the windows out, the starts being counted through all pieces."""
        room = [max(0, len(piece) - length + 1) for piece in self.pieces]
        first = np.concatenate([[0], np.cumsum(room)])
        which = np.searchsorted(first, starts, side="right") - 1
        windows = [
            self.pieces[piece][start : start + length]
            for piece, start in zip(which, starts - first[which], strict=True)
        ]
        tokens = np.stack(windows).astype(np.int32)
        if tokens.max() >= self.vocabulary:
            raise InputError(f"token {tokens.max()} is outside the vocabulary of {self.vocabulary}")
        return tokens


def load_corpus(files: Sequence[str]) -> Corpus:
    """Reads what ``--data`` names.

    Args:
        files: Text files or ``.bin`` shards, not both; empty means the standard library.

    Returns:
        The whole corpus, not yet split.

    Raises:
        InputError: If a file is missing or damaged, or the kinds are mixed.
    """
    paths = [Path(name) for name in files] or standard_library()
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    shards = [path.suffix == ".bin" for path in paths]
    if all(shards):
        return Corpus(tuple(read_shard(path) for path in paths), FINEWEB_VOCABULARY)
    if any(shards):
        raise InputError("--data takes either text files or .bin shards, not both in one run")
    return Corpus((read_text(paths),), BYTE_VOCABULARY)
