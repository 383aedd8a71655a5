"""Which devices work on which matrices, of stacks that hold fewer than there are devices."""

import functools
import math
from collections import defaultdict

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from scion_jax import ExactPolar, NewtonSchulz, Spectral
from scion_jax.distributed import _places as ours
from scion_jax.polar import Orthogonalizer
from tests.distributed.test_meshes import close, two_steps
from tests.support.meshes import EXACT, OPTIMIZERS, lmos_of, make
from tests.support.norms import gaussian

pytestmark = pytest.mark.unoptimized

# Of 8 devices the first three, the next two and the last three have one.
SHAPES = {"wide": (3, 16, 40), "tall": (2, 40, 16), "square": (3, 16, 16)}
every_kind = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def places(*shapes, devices):
    return ours.places([jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes], devices)


def test_layers_of_llama():
    query, gate, down = (24, 4096, 4096), (24, 4096, 14336), (12, 14336, 4096)
    found = [tuple(range(36, 60)), tuple(range(24)), tuple(range(24, 36))]
    assert places(query, gate, down, devices=64) == found
    key = (24, 4096, 1024)  # as in the module's table
    (*_, last) = places(query, gate, down, key, devices=64)
    assert last == (*range(36, 56), *range(60, 64))


def test_who_has_no_places():
    expand, contract = (4, 768, 3072), (4, 3072, 768)
    assert places(expand, contract, devices=8) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert places(expand, contract, (8, 768, 768), devices=8)[2] == ()  # nobody is idle
    assert places(expand, contract, (12, 768, 768), devices=8)[2] == ()  # two for some
    assert places((4, 64, 64), (4, 64, 256), devices=8) == [(), ()]  # small
    assert places((5, 768, 768), devices=8) == [()]  # alone it gains nothing
    assert places((7, 768, 768), (7, 768, 3072), devices=8) == [(), ()]  # two for some anyway
    assert places(devices=8) == []


some_stacks = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from([1024, 4096]), st.sampled_from([1024, 2048])),
    max_size=5,
)


@given(shapes=some_stacks, devices=st.integers(2, 24))
def test_everyone_has_a_place_and_nobody_more_to_do(shapes, devices):
    found = places(*shapes, devices=devices)
    work = [min(n, m) ** 2 * (2 * max(n, m) + min(n, m)) for _, n, m in shapes]
    loads, without = np.zeros(devices), 0
    for (batch, *_), of_stack, of_matrix in zip(shapes, found, work, strict=True):
        if of_stack:
            assert len(of_stack) == batch < devices
            assert sorted(set(of_stack)) == list(of_stack)
            assert 0 <= of_stack[0] <= of_stack[-1] < devices
            loads[list(of_stack)] += of_matrix
            without += of_matrix
    assert max(loads) < without if any(found) else len(found) == len(shapes)


@given(where=st.sets(st.integers(0, 8), min_size=1))
def test_placed_and_taken_back(where):
    stack = jnp.arange(1.0, 1 + 2 * len(where)).reshape(-1, 1, 2)
    there = ours.placed(stack, tuple(sorted(where)), 9)
    assert there.shape == (9, 1, 2)
    assert set(np.flatnonzero(np.asarray(there).all(axis=(1, 2)))) == where
    assert jnp.count_nonzero(there) == stack.size
    np.testing.assert_array_equal(ours.taken_back(there, tuple(sorted(where))), stack)


@pytest.fixture
def found(monkeypatch):
    """Matrices as small as ours have places, too; returns those that were found."""
    found, find = [], ours.places

    def noting(*arguments):
        found.append(find(*arguments))
        return found[-1]

    monkeypatch.setattr(ours, "_SMALLEST", 1)
    monkeypatch.setattr("scion_jax.distributed._devices.places", noting)
    return found


def split(tree, mesh):
    spec = P(None, ("fsdp", "tensor") if "tensor" in mesh.axis_names else "fsdp")
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


def leaves_of(shapes=SHAPES):
    return [gaussian(shape, dtype=np.float32) for shape in shapes.values()]


class Doubling(Orthogonalizer):
    """Doubles, and notes which device was given matrices of which shape."""

    def __init__(self, may_be_skipped):
        self.may_be_skipped = may_be_skipped
        self.devices = defaultdict(list)

    def polar(self, matrices):
        name = next(name for name, shape in SHAPES.items() if shape[1:] == matrices.shape[1:])
        device = jax.lax.axis_index("fsdp")
        jax.debug.callback(lambda device: self.devices[name].append(int(device)), device)
        return 2 * matrices


@every_kind
@pytest.mark.parametrize("may_be_skipped", [True, False])
def test_devices_do_nothing_where_they_have_no_matrix(found, kind, may_be_skipped):
    method, mesh, leaves = Doubling(may_be_skipped), make("8", kind), leaves_of()
    norm = Spectral(layout="bio", orthogonalizer=method)
    with jax.set_mesh(mesh):
        results = jax.jit(functools.partial(lmos_of, norm))(split(leaves, mesh))
        jax.effects_barrier()
    everywhere = list(range(8))
    devices = {"wide": [0, 1, 2], "tall": [3, 4], "square": [5, 6, 7]}
    for name, their_devices in devices.items():
        assert sorted(method.devices[name]) == (their_devices if may_be_skipped else everywhere)
    for leaf, result, (_, n, m) in zip(leaves, results, SHAPES.values(), strict=True):
        np.testing.assert_allclose(result, 2 * math.sqrt(m / n) * leaf, rtol=1e-5)


def test_which_methods_may_be_skipped():
    assert NewtonSchulz().may_be_skipped
    assert ExactPolar().may_be_skipped
    assert not Orthogonalizer.may_be_skipped
    assert NewtonSchulz(steps=3) == NewtonSchulz(steps=3)


@pytest.mark.parametrize(
    ("optimizer", "mesh", "kind"),
    [
        ("unconstrained_scion", "8", "Explicit"),
        ("short_step", "4x2", "Explicit"),  # numbers have no places
        ("scion", "4x2", "Auto"),
    ],
)
def test_the_same_as_on_one_device(found, optimizer, mesh, kind):
    """Beside a stack that has no places, and one whose matrices stay where they are."""
    shapes = SHAPES | {"more": (11, 16, 40), "experts": (8, 16, 16)}
    params = dict(zip(shapes, leaves_of(shapes), strict=True))
    gradients = jax.tree.map(lambda x: np.sin(3 * x), params)
    built = OPTIMIZERS[optimizer](0.1, Spectral(layout="bio", orthogonalizer=EXACT))
    expected, _ = jax.jit(two_steps(built))(params, gradients)
    mesh = make(mesh, kind)
    tree = split((params, gradients), mesh)
    for part in tree:
        part["experts"] = jax.device_put(part["experts"], NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        results, _ = jax.jit(two_steps(built))(*tree)
    assert any(map(any, found))
    close(results, expected)


@every_kind
def test_derivatives_zeros_and_what_is_not_a_number(found, kind):
    mesh, leaves = make("8", kind), leaves_of()
    norm = Spectral(layout="bio", orthogonalizer=EXACT)
    leaves[1][0] = 0

    def both(ds):
        results, pull = jax.vjp(functools.partial(lmos_of, norm), ds)
        return results, pull(jax.tree.map(lambda x: jnp.cos(3 * x), results))[0]

    expected = jax.jit(both)(leaves)
    with jax.set_mesh(mesh):
        results = jax.jit(both)(split(leaves, mesh))
        eagerly = lmos_of(norm, split(leaves, mesh))
        leaves[0][1, 2, 3] = np.nan
        with_nan = jax.jit(functools.partial(lmos_of, norm))(split(leaves, mesh))
    assert any(map(any, found))
    chex.assert_trees_all_close(results, expected, atol=1e-5)
    chex.assert_trees_all_close(eagerly, results[0], atol=1e-5)
    assert not np.asarray(results[1][1])[0].any()  # of a zero matrix
    assert [bool(np.isnan(result).any()) for result in with_nan] == [True, False, False]
    assert np.isnan(with_nan[0]).all(axis=(1, 2)).tolist() == [False, True, False]


def test_all_come_before_one_is_worked_on_and_go_after_the_last(found):
    """And what has no places is done before. Otherwise devices would wait for each other."""
    mesh, norm = make("8", "Explicit"), Spectral(layout="bio", orthogonalizer=ExactPolar())
    leaves = [*leaves_of(), gaussian((9, 16, 24), dtype=np.float32)]
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(functools.partial(lmos_of, norm))(split(leaves, mesh))
    (mapped,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    order = [e.primitive.name for e in mapped.params["jaxpr"].eqns]
    order = [name for name in order if name in ("all_to_all", "cond", "optimization_barrier")]
    come, go = ["all_to_all"] * 3, ["optimization_barrier"]
    assert order == [
        *["all_to_all", "all_to_all"],  # of the stack of nine
        *[*go, *come, *go, *["cond"] * 3, *go, *come],
    ]
