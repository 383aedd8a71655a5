"""Meshes of the eight devices, and what compiled programs move between them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding

import scion_jax
from scion_jax import NewtonSchulz, scale_by_lmo

COLLECTIVE = re.compile(r" = (.*?) (all-[a-z-]+?|reduce-scatter|collective-[a-z]+)(?:-start)?\(")
BYTES = {"f32": 4, "bf16": 2, "u16": 2}

MESHES = {
    "8": ((8,), ("fsdp",)),
    "4x2": ((4, 2), ("fsdp", "tensor")),
    "2x2x2": ((2, 2, 2), ("fsdp", "tensor", "data")),
}

EXACT = NewtonSchulz(compute_dtype=jnp.float32)  # comparisons are close then
OPTIMIZERS = {
    "scion": scion_jax.scion,
    "unconstrained_scion": scion_jax.unconstrained_scion,
    "clipped_scion": functools.partial(scion_jax.clipped_scion, rho=30.0),
    "short_step": functools.partial(scion_jax.clipped_scion, rho=3.0, short_step=True),
    "unconstrained_clipped_scion": functools.partial(
        scion_jax.unconstrained_clipped_scion, rho=100.0
    ),
    "scion_light": scion_jax.scion_light,
    "almond": scion_jax.almond,
}


def make(mesh, kind):
    shape, names = MESHES[mesh]
    return jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * len(names))


def lmos_of(norm, ds, names=None):
    """The LMOs of several leaves of one norm, taken together."""
    return scale_by_lmo(norm, shard_over=names).update(list(ds), optax.EmptyState())[0]


def compiled(optimizer, shapes, mesh, specs):
    with jax.set_mesh(mesh):
        params = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs))
            for name, shape in shapes.items()
        }
        state = jax.eval_shape(optimizer.init, params)
        step = jax.jit(optimizer.update, out_shardings=None)
        return step.lower(params, state, params).compile().as_text()


def collectives(text):
    """Finds the kind of every collective, and how many bytes a device receives."""
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [math.prod(map(int, filter(None, s.split(",")))) * BYTES[t] for t, s in arrays]
            found.append((match[2], sum(sizes)))
    return found


def in_loops(text):
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    starts = [text.index(f"%{body} (") for body in bodies]
    return [c for start in starts for c in collectives(text[start : text.index("\n}", start)])]
