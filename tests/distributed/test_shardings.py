"""Shardings that an optimizer is told: on Auto axes then moves what it would on Explicit ones."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import scion_jax
from scion_jax import Spectral, scion, with_shardings
from tests.support.meshes import EXACT, OPTIMIZERS, collectives, compiled, make

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

BLOCK = {"q": (64, 64), "up": (64, 256), "down": (256, 64)}
SHAPES = {"a": (16, 16), "c": (16, 16), "down": (32, 16), "bias": (16,)}
SPECS = {"a": P("fsdp", "tensor"), "c": P("tensor"), "down": P(None, "fsdp"), "bias": P()}
MASK = {"a": True, "c": False, "down": True, "bias": True}
NORMS = scion_jax.Auto(orthogonalizer=EXACT)
WRAPPED = {
    "accumulated": optax.MultiSteps(scion(0.1, NORMS), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(scion)(learning_rate=0.1, norms=NORMS),
    "masked": optax.masked(scion(0.1, NORMS), MASK),
    "chained": optax.chain(optax.clip_by_global_norm(1.0), scion(0.1, NORMS)),
    "adam": optax.adam(0.1),
}
WRAPPED |= {name: build(0.1, NORMS) for name, build in OPTIMIZERS.items()}


def tree():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


def update(optimizer, params):
    return jax.jit(optimizer.update)(jax.tree.map(jnp.sin, params), optimizer.init(params), params)


@jax.numpy_dtype_promotion("standard")  # MultiSteps itself divides by an integer
@pytest.mark.parametrize("name", WRAPPED)
def test_the_same_updates_split_as_said(name):
    mesh = make("4x2", "Auto")
    shardings = {key: NamedSharding(mesh, spec) for key, spec in SPECS.items()}
    params = jax.device_put(tree(), shardings)
    told = with_shardings(WRAPPED[name], shardings)
    with jax.set_mesh(mesh):
        result, state = update(told, params)
    expected = update(WRAPPED[name], tree())
    chex.assert_trees_all_close((result, state), expected, rtol=1e-5, atol=1e-5)
    for key, value in result.items():
        assert value.sharding.is_equivalent_to(shardings[key], value.ndim), key


def test_mesh_of_the_shardings_and_prefixes():
    mesh = make("8", "Auto")
    params = {"a": tree()["down"], "none": None}
    placed = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
    result, _ = update(with_shardings(scion(0.1, NORMS), NamedSharding(mesh, P("fsdp"))), placed)
    chex.assert_trees_all_close(result, update(scion(0.1, NORMS), params)[0], rtol=1e-5, atol=1e-5)


class Network(nnx.Module):
    def __init__(self, rngs):
        start = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "fsdp"))
        self.linear = nnx.Linear(16, 32, kernel_init=start, rngs=rngs)


@pytest.mark.parametrize(
    "shardings",
    [nnx.get_partition_spec, lambda params: jax.tree.map(lambda x: x.sharding, params)],
)
def test_states_of_nnx(shardings):
    """As what `nnx.Optimizer` passes on has no variables, but paths that are the same."""
    with jax.set_mesh(make("8", "Auto")):
        model = Network(nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        params = jax.lax.with_sharding_constraint(params, nnx.get_partition_spec(params))
        nnx.update(model, params)
        told = with_shardings(scion(0.1, NORMS), shardings(params))
        optimizer = nnx.Optimizer(model, told, wrt=nnx.Param)
        nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))(
            model, optimizer
        )
    assert model.linear.kernel.get_value().sharding.spec == P(None, "fsdp")


def test_explicit_axes_and_no_params():
    """Where types say it, nothing changes; a stage without parameters gets none."""
    mesh = make("8", "Explicit")
    params = jax.device_put({"a": tree()["down"]}, NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        result, _ = update(with_shardings(scion(0.1, NORMS), P(None, "fsdp")), params)
    assert jax.typeof(result["a"]).sharding.spec == P("fsdp", None)
    lmo = with_shardings(scion_jax.scale_by_lmo(NORMS), P("fsdp"))
    with jax.set_mesh(make("8", "Auto")):
        found, _ = jax.jit(lmo.update)({"a": tree()["down"]}, optax.EmptyState())
    plain, _ = scion_jax.scale_by_lmo(NORMS).update({"a": tree()["down"]}, optax.EmptyState())
    chex.assert_trees_all_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [P("fsdp", "tensor"), P("tensor"), P(("tensor", "fsdp"))])
def test_what_moves_is_what_moves_on_explicit_axes(spec):
    shapes = {f"{name}{layer}": s for layer in range(8) for name, s in BLOCK.items()}
    told = compiled(with_shardings(scion(0.1, Spectral()), spec), shapes, make("4x2", "Auto"), spec)
    typed = compiled(scion(0.1, Spectral()), shapes, make("4x2", "Explicit"), spec)
    assert sorted(collectives(told)) == sorted(collectives(typed))


def test_refusals():
    params = {"a": tree()["a"]}
    other = with_shardings(scion(0.1, NORMS), {"b": P("fsdp"), "c": P()})
    message = r"says nothing of 'a', of shape \(16, 16\); it has 'b', 'c'\. A PartitionSpec\(\)"
    with jax.set_mesh(make("8", "Auto")), pytest.raises(ValueError, match=message):
        other.update(params, other.init(params), params)
    deep = with_shardings(scion(0.1, NORMS), P(None, None, "fsdp"))
    message = r"\(None, None, 'fsdp'\) for 'a', of shape \(16, 16\); give it one with as many"
    with jax.set_mesh(make("8", "Auto")), pytest.raises(ValueError, match=message):
        deep.update(params, deep.init(params), params)
    told = with_shardings(scion(0.1, NORMS), P("fsdp"))
    with pytest.raises(ValueError, match=r"finds no mesh; call the optimizer under jax\.set_mesh"):
        told.update(params, told.init(params), params)
