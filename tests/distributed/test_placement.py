"""Parameters come back where they were, so that a compiled step takes its own output."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scion_jax import Auto, Spectral, clipped_scion, scion, scion_light

pytestmark = pytest.mark.unoptimized

BUILDS = {
    "scion": scion,
    "short_step": lambda *a, **k: clipped_scion(*a, rho=3.0, short_step=True, **k),
    "scion_light": scion_light,
}
SPECS = {"scanned": P(None, "fsdp", None), "expert": P("fsdp", "ep"), "bias": P("ep")}
NORMS = {"scanned": Spectral(layout="bio"), "expert": Spectral(2.0), "bias": Auto()}
LABELS = {name: name for name in NORMS}


def mesh_of(shape, names, kind="Auto"):
    return jax.make_mesh(shape, names, axis_types=(AxisType[kind],) * len(names))


def parameters(mesh):
    shapes = {"scanned": (2, 16, 16), "expert": (16, 16), "bias": (16,)}
    return {
        name: jax.device_put(jnp.ones(shape).at[..., 0].set(2.0), NamedSharding(mesh, SPECS[name]))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("shard_over", [None, (), ("fsdp", "ep")])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_compiled_step_takes_its_own_output(build, shard_over):
    """Leaves of one matrix shape that are split in several ways, on a mesh of Auto axes."""
    mesh = mesh_of((4, 2), ("fsdp", "ep"))
    optimizer = build(0.1, NORMS, LABELS, shard_over=shard_over)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = parameters(mesh)
        state = jax.jit(optimizer.init)(params)
        compiled = jax.jit(step).lower(params, state).compile()
        for _ in range(3):
            params, state = compiled(params, state)
            for name, spec in SPECS.items():
                split = NamedSharding(mesh, spec)
                assert params[name].sharding.is_equivalent_to(split, params[name].ndim), name


@pytest.mark.parametrize("transform", [lambda update: update, jax.jit])
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("scion", "Auto Auto"),
        ("scion", "Explicit Auto"),
        ("scion", "Explicit Explicit"),
        # Not where one is Explicit: JAX adds no pairings whose types say two meshes.
        ("short_step", "Auto Auto"),
    ],
)
def test_several_meshes_in_one_tree(kinds, name, transform):
    """None of them in force: each leaf stays on its own."""
    one, other = kinds.split()
    there = {
        "one": NamedSharding(mesh_of((8,), ("x",), one), P("x")),
        "other": NamedSharding(mesh_of((4, 2), ("y", "z"), other), P("z", "y")),
    }
    values = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    params = {name: jax.device_put(values, sharding) for name, sharding in there.items()}
    optimizer = BUILDS[name](0.1, Spectral())
    updates, _ = transform(optimizer.update)(params, optimizer.init(params), params)
    alone = {"one": jnp.asarray(values), "other": jnp.asarray(values)}
    expected, _ = optimizer.update(alone, optimizer.init(alone), alone)
    for name, sharding in there.items():
        assert updates[name].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-2)
