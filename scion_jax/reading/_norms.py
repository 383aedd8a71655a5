"""Norms from roles: rules over the last layer over the first over what a parameter is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scion_jax._assignment import Assignment, Entry
from scion_jax._checks import warn
from scion_jax._paths import nearest, without_collection
from scion_jax.norms import BiasRMS, ColNorm, Norm, Sign, Spectral, possible_layouts
from scion_jax.reading._roles import Role, read_roles

_SWAPPED = str.maketrans("io", "oi")
_NAMES = {"unused": "unused", "unknown": "unknown", "vector": "vectors", "embedding": "embedding"}


def infer_norms(
    function: Callable[..., Any],
    params: Any,
    *inputs: Any,
    last: Norm | None,
    hidden: Norm = Spectral(),
    first: Norm | None = None,
    embeddings: Norm = ColNorm(),
    vectors: Norm = BiasRMS(),
    rules: Mapping[str, Norm] = {},
    has_aux: bool = False,
    heads: str = "together",
) -> Assignment:
    """Chooses a norm and a layout for every parameter of a program, from what that does with them.

    The program is traced, and nothing is computed. Each parameter gets the first of these that
    holds: the norm of the first rule whose pattern is found in its path; `last`, if its result
    reaches the outputs with no product after; `first`, if it takes the inputs; `embeddings`, if it
    is looked up; `vectors`, if it is added or multiplied entry by entry; `hidden`. Layouts are the
    program's, see `read_roles`, unless a rule's norm has one.

    Args:
        function: The loss, or the forward pass, as for `jax.value_and_grad`.
        params: Its parameters: any tree of arrays or `jax.ShapeDtypeStruct`s, of which the leaves
            that are no floating arrays belong to the program; or an NNX module.
        *inputs: Its other arguments; arrays or shapes in them are data. What the function closes
            over is constant, so inputs and keys must be here.
        last: Norm of the output layer, or None if there is none, or `rules` have it. A tied
            embedding is one; it does not start at zero.
        hidden: Norm of matrices and convolutions.
        first: Norm of the first layers; None for `hidden` with `max=True`, if it is `Spectral`
            without `rms`.
        embeddings: Norm of what is looked up.
        vectors: Norm of biases, gains, learned tokens and tables of positions.
        rules: Norms by regular expressions, which are searched for in the `/`-joined path (a
            leading `params/` may be left out). They mean matrices; one that finds no matrix means
            vectors.
        has_aux: Whether the function returns a pair, of which the second is no part of the loss.
        heads: `"together"`: the heads of an attention projection are one matrix; `"apart"`: each is
            one of its own, where the program tells (see the page on layouts).

    Returns:
        Norms and labels as one value, to be given as `norms` to optimizers, `init_params`,
        `describe` and the diagnostics.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a parameter cannot be read, or there is no output layer for `last`, or
            several that differ, or a rule finds nothing, or `heads` is neither. The message names
            all of them, what was done with them and where, and what to write.

    Example:
        >>> import jax, jax.numpy as jnp, scion_jax
        >>> def loss(params, tokens):
        ...     x = jax.nn.relu(params["embed"][tokens] @ params["hidden"] + params["bias"])
        ...     return -jnp.mean(jax.nn.log_softmax(x @ params["head"]))
        >>> params = {"bias": jnp.zeros(32), "embed": jnp.ones((50, 16)),
        ...           "head": jnp.ones((32, 50)), "hidden": jnp.ones((16, 32))}
        >>> norms = infer_norms(loss, params, jnp.zeros(8, int), last=scion_jax.Sign(16.0))
        >>> norms.labels(params)
        {'bias': 'vectors o', 'embed': 'embedding io', 'head': 'last io', 'hidden': 'hidden io'}
        >>> optimizer = scion_jax.scion(1e-3, norms)

    Source: [S] Pethick et al., arXiv:2502.07529, Recommendation 3.1.
    """
    norms = {"last": last, "hidden": hidden, "first": first}
    norms |= {"embeddings": embeddings, "vectors": vectors}
    for name, norm in norms.items():
        _check_norm(name, norm, optional=name in ("last", "first"))
    roles = read_roles(function, params, *inputs, has_aux=has_aux, heads=heads)
    found = _matched(rules, roles)
    if first is None:
        may_grow = isinstance(hidden, Spectral) and not hidden.rms
        first = dataclasses.replace(hidden, max=True) if may_grow else hidden
    norms |= {"first": first, "embedding": embeddings, "unused": vectors, "unknown": vectors}
    if last is not None:
        _check_last(last, [role for role in roles if role.last and role.path not in found])

    entries, problems = [], []
    for role in roles:
        pattern = found.get(role.path)
        name = repr(pattern) if pattern is not None else _name(role, last)
        norm: Any = norms[name] if pattern is None else rules[pattern]
        layout = norm.layout or role.layout or "o" * max(len(role.shape), 1)
        if role.problem and norm.layout is None:
            problems.append(_what_to_write(role))
            continue
        if role.kind == "tied" and name == "embedding":
            layout = layout.translate(_SWAPPED)
        if role.kind == "tied" and name == "last" and isinstance(norm, Sign):
            norm = dataclasses.replace(norm, zero_init=False)  # as a head may, an embedding not
        norm = dataclasses.replace(norm, layout=layout)
        norm.read(role.shape, f"leaf '{role.path}'")
        entries.append(Entry(role.path, role.shape, f"{name} {layout}", norm, role.used_at))
    if problems:
        raise ValueError(
            "the program does not tell what these parameters are; give each a rule whose norm has "
            "a layout, one letter per axis (i input, o output, s window, b batch), or leave it out "
            "of the parameters:\n  " + "\n  ".join(problems)
        )
    if idle := [role.path for role in roles if role.kind == "unused" and role.path not in found]:
        warn(
            f"no gradient reaches {', '.join(map(repr, idle))}: leave them out of the parameters, "
            "or pass what they depend on as an argument"
        )
    return Assignment(tuple(entries))


def _name(role: Role, last: Norm | None) -> str:
    """Finds which norm a parameter has that no rule is for."""
    if role.kind in _NAMES:
        return _NAMES[role.kind]
    if role.last and last is not None:
        return "last"
    if role.last and role.kind == "tied":
        return "embedding"
    return "first" if role.first else "hidden"


def _check_norm(name: str, norm: object, optional: bool) -> None:
    if norm is None and optional:
        return
    if not isinstance(norm, Norm):
        raise TypeError(f"{name} is a Norm such as Spectral(50.0); got {norm!r}")
    if norm.layout is not None:
        raise ValueError(
            f"{name}={norm}: layouts are the program's, one for each parameter; leave layout out, "
            "or use rules for single parameters"
        )


def _matched(rules: Mapping[str, Norm], roles: Sequence[Role]) -> dict[str, str]:
    """Finds the rule of every parameter that has one."""
    found: dict[str, str] = {}
    for pattern, expression in _compiled(rules).items():
        hits = [
            r for r in roles if any(map(expression.search, (r.path, without_collection(r.path))))
        ]
        meant = [role for role in hits if role.kind != "vector"] or hits
        new = [role.path for role in meant if role.path not in found]
        if not hits:
            closest = nearest(pattern, [role.path for role in roles])
            hint = f"; the nearest is '{closest}'" if closest else ""
            raise ValueError(f"rules[{pattern!r}] finds no parameter{hint}")
        if not new:
            raise ValueError(
                f"rules[{pattern!r}] only finds parameters of rules before it, such as "
                f"'{meant[0].path}'; leave it out, or put it first"
            )
        found |= dict.fromkeys(new, pattern)
    return found


def _compiled(rules: Mapping[str, Norm]) -> dict[str, re.Pattern[str]]:
    patterns = {}
    for pattern, norm in rules.items() if isinstance(rules, Mapping) else [("", rules)]:
        if not (isinstance(pattern, str) and isinstance(norm, Norm)):
            raise TypeError(
                "rules map patterns of paths to norms, such as {'^head': Sign(16.0)}; got "
                f"{rules!r}"
            )
        try:
            patterns[pattern] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rules[{pattern!r}]: not a regular expression ({error})") from error
    return patterns


def _check_last(last: Norm, heads: Sequence[Role]) -> None:
    if not heads:
        raise ValueError(
            "no matrix has a result that reaches the outputs with no product after it, so there is "
            "no output layer for last: write last=None, and rules={'^path$': …} for what you mean"
        )
    if len({(role.layout, role.shape) for role in heads}) > 1:
        listed = ", ".join(f"'{role.path}' {role.shape}" for role in heads)
        raise ValueError(
            f"several parameters could be the output layer: {listed}; write last=None, and rules="
            f"{{'^{re.escape(heads[0].path)}$': {last}, …}} for each of them"
        )


def _what_to_write(role: Role) -> str:
    used = f", used at {', '.join(role.used_at)}" if role.used_at else ""
    path = re.escape(without_collection(role.path))
    return (
        f"'{role.path}' of shape {role.shape}: {role.problem}{used}; "
        f"{possible_layouts(len(role.shape))}, as in rules={{'^{path}$': Spectral(layout='…')}}"
    )
