"""Norms, layouts and starting points that a Flax model's own layers tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scion_jax.norms import BiasRMS, Norm, Spectral
from scion_jax.reading_flax import choice
from scion_jax.reading_flax.labels import FlaxLabels

_NOT_GIVEN: Any = object()


def flax_norms(
    model: Any,
    *inputs: Any,
    hidden: Norm = Spectral(),
    last: Mapping[str, Norm] = _NOT_GIVEN,
    rules: Mapping[str, Norm] = {},
    vectors: Norm = BiasRMS(),
    **kwargs: Any,
) -> tuple[dict[str, Norm], FlaxLabels]:
    """Chooses norms and layouts for a Flax model: `optimizer(learning_rate, *flax_norms(…))`.

    Layouts are read off the layers, and nothing is computed. Matrices and convolutions get
    `hidden`, embeddings `ColNorm()`, biases and gains `vectors`, each layer's on its own where
    layers are stacked. `rules`, then `last`, choose otherwise: they map regular expressions, which
    are searched for in the `/`-joined path (without `params`), to norms, and the first that is
    found wins. Patterns mean matrices; a pattern that finds no matrix means vectors. The norms'
    layouts are filled in unless given. Under `optax.inject_hyperparams`, list `"norms"` and
    `"param_labels"` in `static_args`.

    Args:
        model: An NNX module (`nnx.eval_shape`'s abstract ones, too), or a Linen module.
        *inputs: For Linen what the module's call takes: arrays or `jax.ShapeDtypeStruct`s, and
            anything else as it is.
        hidden: Norm of matrices and convolutions.
        last: The output layer's pattern and norm, such as `{"lm_head": Sign(3000.0)}`; `{}` if the
            model has none. An embedding in `last` is tied: its layout is that of the output layer.
        rules: Other patterns and norms. A matrix of a layer that Flax does not provide needs one,
            with a layout.
        vectors: Norm of biases and gains, of any shape.
        **kwargs: For Linen keyword arguments of the call, and `rngs` and `method` as for `init`.

    Returns:
        Norms by label, and a hashable function that labels the model's parameters, in trees of
        NNX and Linen, with leaves missing or not. It also knows how the model starts its leaves
        (`init_params` asks it).

    Raises:
        ImportError: If Flax is not installed.
        TypeError: If an argument is of the wrong type, or `last` is missing.
        ValueError: If a layout remains open, a pattern finds nothing, or a tied embedding is in
            neither `last` nor `rules`. The message names all such leaves and what to write.

    Example:
        >>> from flax import nnx
        >>> import scion_jax
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.embed = nnx.Embed(100, 16, rngs=rngs)
        ...         self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        ...         self.head = nnx.Linear(16, 100, use_bias=False, rngs=rngs)
        >>> norms, labels = flax_norms(Model(nnx.Rngs(0)), last={"head": scion_jax.Sign(50.0)})
        >>> sorted(norms)
        ['embedding io', 'hidden iio', 'hidden ioo', "last 'head' io", 'vectors o', 'vectors oo']
        >>> optimizer = scion_jax.scion(1e-3, norms, labels)
    """
    choice.check_norm("hidden", hidden)
    choice.check_norm("vectors", vectors)
    leaves = _leaves(model, inputs, kwargs)
    if last is _NOT_GIVEN:
        raise TypeError(
            "flax_norms needs last, the output layer's pattern and norm, such as "
            f"last={{'lm_head$': Sign(3000.0)}}, or last={{}} if there is none. It may be one of: "
            f"{choice.candidates(leaves)}"
        )
    return choice.choose(leaves, hidden, last, rules, vectors)


def _leaves(model: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    try:  # an extra: the library does without it
        from flax import linen, nnx

        from scion_jax.reading_flax import linen_leaves, nnx_leaves
    except ImportError as error:
        raise ImportError("flax_norms needs Flax: pip install 'scion_jax[flax]'") from error
    if isinstance(model, nnx.Module):
        if inputs or kwargs:
            unexpected = ", ".join([*(type(value).__name__ for value in inputs), *kwargs])
            raise TypeError(
                f"an NNX module is read without its inputs; leave out {unexpected} (a norm for "
                "single leaves goes into rules or last)"
            )
        return nnx_leaves.leaves_of(model)
    if isinstance(model, linen.Module):
        return linen_leaves.leaves_of(model, inputs, kwargs)
    hint = "; make an instance of it" if isinstance(model, type) else ""
    raise TypeError(f"flax_norms reads NNX and Linen modules; got {model!r}{hint}")
