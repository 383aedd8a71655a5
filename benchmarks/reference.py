"""The published PyTorch code of Scion, as a peer in the same process.

It is read from a file that the user has, scion.py of LIONS-EPFL/scion on GitHub, and needs PyTorch;
no part of it is kept here. Its Newton–Schulz iteration is in bfloat16. Where the processor has no
bfloat16 arithmetic, PyTorch emulates that, ten to a hundred times slower than float32; so the code
can also run with that one cast replaced, which is a stronger peer there.

The code asks for `torch.compile` for its iteration. Where that does not work, for lack of a C++
compiler say, the code runs eagerly; the peer's name says which.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

DTYPES = ("bfloat16", "float32")
PUBLISHED_CAST, FLOAT32_CAST = "G.bfloat16()", "G.float()"


def load(path: Path, dtype: str) -> ModuleType:
    """Loads the published code.

    Args:
        path: The file.
        dtype: One of `DTYPES`; bfloat16 is the code as it is.

    Returns:
        The module.

    Raises:
        ValueError: If the cast to replace is not in the file.
    """
    source = path.read_text()
    if dtype == "float32":
        if PUBLISHED_CAST not in source:
            raise ValueError(f"{path} does not contain {PUBLISHED_CAST}, its cast to bfloat16")
        source = source.replace(PUBLISHED_CAST, FLOAT32_CAST)
    module = ModuleType("published_scion")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def compiles(torch: Any, device: str) -> bool:
    """Tries whether `torch.compile` works here, on something small."""
    try:
        torch.compile(lambda x: x @ x + 1)(torch.ones(2, 2, device=device))
    except Exception as error:  # which one depends on what is missing
        print(f"torch.compile does not work here ({type(error).__name__}): running eagerly\n")
        return False
    return True


def reference_call(
    path: Path, shapes: Any, learning_rate: float, dtype: str = "bfloat16"
) -> tuple[str, Callable[[], None]]:
    """Prepares steps of the published optimizer with its spectral norm.

    They run with a thread for each core, or on a GPU if JAX runs on one.

    Args:
        path: The published code's file.
        shapes: The shapes of the matrices, `(input, output)`; PyTorch's are transposed.
        learning_rate: The learning rate.
        dtype: One of `DTYPES`, for its iteration.

    Returns:
        The name of the peer, and a function that makes one step.
    """
    import torch  # of no use without a file, and not a dependency

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    mode = "compiled" if compiles(torch, device) else "eager"
    if mode == "eager":
        torch.compiler.set_stance("force_eager")
    params = []
    for leaf in jax.tree.leaves(shapes):
        param = torch.nn.Parameter(torch.randn(leaf.shape[::-1], device=device))
        param.grad = torch.randn_like(param)
        params.append(param)
    optimizer = load(path, dtype).Scion(
        params, lr=learning_rate, momentum=0.1, norm="Spectral", unconstrained=True
    )

    def step() -> None:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return f"PyTorch Scion, {dtype}, {mode}", step
