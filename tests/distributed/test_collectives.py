"""What compiled steps move between devices: the least that is needed, and nothing in loops."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import scion_jax
from scion_jax import NewtonSchulz, Spectral, scion
from tests.support.meshes import EXACT, OPTIMIZERS, collectives, compiled, in_loops, lmos_of, make

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

BLOCK = {"q": (64, 64), "up": (64, 256), "down": (256, 64)}
BLOCKS = {f"{name}{layer}": shape for layer in range(8) for name, shape in BLOCK.items()}
TWO = {name: shape for name, shape in BLOCKS.items() if "down" not in name}
SQUARES = {str(index): (64, 64) for index in range(8)}
ONE_STEP = Spectral(orthogonalizer=NewtonSchulz(steps=1))
every_kind = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def kinds(found):
    return [name for name, _ in found]


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        *((name, "Explicit") for name in OPTIMIZERS),
        *((name, "Auto") for name in ("scion", "clipped_scion", "short_step")),
    ],
)
def test_two_collectives_per_stack(optimizer, kind):
    """As users run it: nothing is said but the mesh. One step moves what four do."""
    norm = Spectral() if optimizer == "scion" else ONE_STEP
    step = OPTIMIZERS[optimizer](0.1, norm)
    text = compiled(step, BLOCKS, make("8", kind), P("fsdp", None))
    found = collectives(text)
    moves = 9 if optimizer == "short_step" else 6
    assert kinds(found).count("all-to-all") == moves
    assert len(found) <= {"short_step": 13}.get(optimizer, 7 if "clipped" in optimizer else 6)
    assert not any(name == "all-gather" and size > 1000 for name, size in found)
    # XLA for CPUs moves bfloat16 as float32.
    ideal = moves * sum(math.prod(shape) for shape in BLOCKS.values()) / 3 / 8 * 4
    assert sum(size for _, size in found) <= 1.5 * ideal
    assert not in_loops(text)


ALONE = {str(index): (8, 16, 16) for index in range(2)}
EXACTLY = {
    "a stack of one": ({"a": (1, 16, 16)}, P(None, "fsdp"), ["all-gather"]),
    "stacks of different lengths": (
        {"a": (8, 16, 16), "b": (3, 16, 16)},
        P(None, "fsdp"),
        ["all-to-all"] * 2,
    ),
    "stacks split along themselves": (ALONE, P("fsdp"), []),
}


@pytest.mark.parametrize(("shapes", "spec", "wanted"), EXACTLY.values(), ids=EXACTLY)
def test_how_stacked_layers_travel(shapes, spec, wanted):
    text = compiled(scion(0.1, Spectral(layout="bio")), shapes, make("8", "Explicit"), spec)
    assert kinds(collectives(text)) == wanted


def test_arrays_on_an_explicit_mesh_that_is_not_in_force():
    """Their types say all that is needed."""
    there = NamedSharding(make("8", "Explicit"), P("fsdp"))
    ds = [jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=there)] * 2
    text = jax.jit(lambda ds: lmos_of(Spectral(), ds)).lower(ds).compile().as_text()
    assert kinds(collectives(text)) == ["all-to-all"] * 2


@pytest.mark.parametrize(
    ("optimizer", "kind"), [*((name, "Explicit") for name in OPTIMIZERS), ("scion", "Auto")]
)
def test_nothing_is_spread_where_that_is_turned_off(optimizer, kind):
    step = OPTIMIZERS[optimizer](0.1, ONE_STEP, shard_over=())
    found = kinds(collectives(compiled(step, SQUARES, make("8", kind), P("fsdp", None))))
    assert "all-gather" in found
    assert "all-to-all" not in found


@pytest.mark.parametrize("names", [None, ()])
def test_bounds_are_spread_where_that_is_not_turned_off(names):
    mesh = make("8", "Explicit")
    with jax.set_mesh(mesh):
        xs = [shapes_on(mesh, P("fsdp"), 16, 16)] * 2
        bounds = jax.jit(lambda xs: scion_jax.gauge_bounds(xs, Spectral(), shard_over=names))
        found = kinds(collectives(bounds.lower(xs).compile().as_text()))
    assert ("all-to-all" in found) == (names is None)


@every_kind
def test_no_communication_inside_the_iteration(kind):
    """Neither for a stack of one matrix, nor if matrices are split over further axes."""
    optimizer = scion(0.1, Spectral(orthogonalizer=EXACT), shard_over="fsdp")
    text = compiled(optimizer, {"one": (32, 32), **SQUARES}, make("4x2", kind), P("fsdp", "tensor"))
    assert "while(" in text
    assert collectives(text)
    assert not in_loops(text)


@every_kind
def test_matrices_split_over_two_axes_are_never_gathered(kind):
    found = kinds(
        collectives(compiled(scion(0.1, Spectral()), TWO, make("4x2", kind), P("fsdp", "tensor")))
    )
    assert set(found) <= {"all-to-all", "collective-permute"}
    assert found.count("all-to-all") <= 8


@every_kind
def test_replicated_axes_move_a_share_only(kind):
    """Parameters split over one axis and replicated over two: shared out first, gathered last.

    On an Auto mesh the order is the mesh's or the given one: types do not say what is split.
    """
    names = ("data", "tensor", "fsdp") if kind == "Auto" else None
    optimizer = scion(0.1, Spectral(), shard_over=names)
    found = collectives(compiled(optimizer, TWO, make("2x2x2", kind), P("fsdp", None)))
    assert kinds(found).count("all-to-all") == 4  # two a stack
    # Of results, one a stack; and on an Auto mesh one for each axis, too.
    assert kinds(found).count("all-gather") == (4 if kind == "Auto" else 2)
    own = sum(64 * size for _, size in TWO.values()) / 2 * 4  # bytes of half of every matrix
    moved = sum(size for name, size in found if name == "all-to-all")
    assert moved <= 1.1 * 2 * own / 4  # of which it moves its quarter, there and back
    assert sum(size for name, size in found if name == "all-gather") <= 1.1 * (own / 2 + own)


@pytest.mark.parametrize(
    ("norm", "most", "kind"),
    [
        (scion_jax.Sign(), 0, "Auto"),
        (scion_jax.Sign(), 0, "Explicit"),
        (scion_jax.ColNorm(), 2, "Explicit"),
        (scion_jax.RowNorm(), 2, "Auto"),
        (scion_jax.BiasRMS(layout="io"), 2, "Explicit"),
        (scion_jax.Euclidean(), 2, "Auto"),
    ],
)
def test_two_small_reductions_per_label(norm, most, kind):
    """Of the largest entries, and of squares of what is divided by them."""
    optimizer = scion(0.1, norm, shard_over="fsdp" if kind == "Auto" else None)
    for specs in (P("fsdp", None), P(None, "fsdp")):
        found = kinds(collectives(compiled(optimizer, BLOCKS, make("8", kind), specs)))
        assert len(found) <= most
        assert set(found) <= {"all-reduce"}


def test_two_reductions_for_vectors_without_a_whole_axis():
    shapes, optimizer = {"a": (16,), "b": (16,)}, scion(0.1, scion_jax.BiasRMS())
    found = collectives(compiled(optimizer, shapes, make("8", "Explicit"), P("fsdp")))
    assert kinds(found) == ["all-reduce"] * 2


def test_shares_of_the_work():
    """Each device multiplies its own matrices only."""
    many = {str(index): (64, 64) for index in range(32)}
    text = compiled(scion(0.1, Spectral()), many, make("8", "Explicit"), P("fsdp", None))
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
    assert {math.prod(map(int, shape.split(","))) for shape in shapes} == {4 * 64 * 64}


@pytest.mark.parametrize(("names", "devices"), [(("tensor",), "2"), (("fsdp", "tensor"), "8")])
def test_mapped_devices_share_the_work(names, devices):
    mapped = jax.shard_map(
        lambda ds: lmos_of(Spectral(), ds, names),
        mesh=make("4x2", "Auto"),
        in_specs=P(),
        out_specs=P(),
    )
    text = str(jax.make_jaxpr(mapped)([jnp.ones((8, 12))] * 8))
    assert set(re.findall(r"all_gather.*?axis_size=(\d)", text, re.DOTALL)) == {devices}


def shapes_on(mesh, spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    ("layout", "mesh", "shape", "spec", "held"),
    [
        *(
            (
                layout,
                "4x2",
                (4, 8, 12),
                P(*("fsdp" if a == axis else None for a in range(3))),
                "fsdp",
            )
            for layout in ("ioo", "iio", "sio")
            for axis in range(3)
        ),
        ("biioo", "2x2x2", (2, 2, 3, 2, 5), P("fsdp", "tensor", None, "data", None), None),
    ],
)
def test_axes_that_become_one_may_be_split(layout, mesh, shape, spec, held):
    """Matrices are still held once, and results split as their leaf is."""
    norm, mesh = Spectral(layout=layout), make(mesh, "Explicit")
    with jax.set_mesh(mesh):
        given = shapes_on(mesh, spec, *shape)
        (axes,) = norm.read(shape).blocks
        matrices = jax.eval_shape(axes.to_matrices, given).sharding.spec
        assert held in matrices if held else matrices == P("fsdp", "tensor", "data")
        assert jax.eval_shape(norm.lmo, given).sharding.spec == spec


@pytest.mark.parametrize("compute", [None, jnp.float32])
def test_what_is_moved_is_narrow_if_the_products_are(compute):
    """What devices work on arrives as the factors of their products: the TPU's text, which says."""
    norm = Spectral(orthogonalizer=NewtonSchulz(compute_dtype=compute))
    mesh = make("8", "Explicit")
    with jax.set_mesh(mesh):
        ds = [shapes_on(mesh, P("fsdp"), 16, 16)] * 8
        traced = jax.jit(lambda ds: lmos_of(norm, ds)).trace(ds)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    moved = re.findall(r"manual_axes=.*?: tensor<[\dx]*x(\w+)>", text)
    assert moved == ["bf16" if compute is None else "f32"]
