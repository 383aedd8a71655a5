"""Layouts: the matrix view, its inverse, the defaults and the errors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scion_jax import Auto, BiasRMS, ExactPolar, Sign, Spectral, SpectralConv
from scion_jax.norms.layout import parse_layout
from tests.support import naive

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((), (1, 1, 1)),
        ((7,), (7, 1, 1)),
        ((5, 7), (7, 5, 1)),
    ],
)
def test_default_by_rank(shape, sizes):
    (axes,) = parse_layout(None, shape).blocks
    assert (axes.d_out, axes.d_in, axes.window_size) == sizes


@given(
    letters=st.permutations("oisb").flatmap(
        lambda p: st.lists(st.sampled_from(p), min_size=1, max_size=5)
    ),
    data=st.data(),
)
def test_view_agrees_with_the_naive_one_and_is_undone(letters, data):
    layout = "".join(letters) + "o"
    shape = tuple(data.draw(st.integers(1, 3)) for _ in layout)
    array = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    (axes,) = parse_layout(layout, shape).blocks
    matrices = axes.to_matrices(array)
    expected = np.stack(list(naive.to_matrices(array, layout).values()))
    columns = [layout.index(letter) for letter in "is" if letter in layout]
    if columns and min(columns) < layout.index("o"):  # as they lie: inputs first
        expected = expected.mT
    np.testing.assert_array_equal(matrices, expected)
    np.testing.assert_array_equal(axes.from_matrices(matrices), array)


def test_auto_asks_the_norm_of_the_rank():
    x = jnp.array([3.0, -4.0])
    (axes,) = parse_layout(None, x.shape).blocks
    for hook in ("unit_lmo", "unit_gauge", "unit_dual_norm"):
        np.testing.assert_array_equal(
            getattr(Auto(), hook)(x, axes), getattr(BiasRMS(), hook)(x, axes)
        )
    np.testing.assert_array_equal(Auto().unit_init(jax.random.key(0), axes), [0, 0])
    told = Auto(2.0, vector_radius=3.0, constrained=False, orthogonalizer=ExactPolar())
    assert told.resolve(1) == BiasRMS(3.0, constrained=False)
    assert told.resolve(2) == Spectral(2.0, constrained=False, orthogonalizer=ExactPolar())
    stacked = dataclasses.replace(told, layout="bo")
    assert stacked.resolve(2) == BiasRMS(3.0, layout="bo", constrained=False)


def test_scalar_view():
    (axes,) = parse_layout(None, ()).blocks
    assert axes.to_matrices(jnp.float32(3.0)).shape == (1, 1, 1)
    assert axes.from_matrices(jnp.ones((1, 1, 1))).shape == ()


def test_every_order_of_a_convolution():
    for letters in set(itertools.permutations("iosb")):
        layout = "".join(letters)
        shape = tuple({"i": 2, "o": 3, "s": 5, "b": 4}[letter] for letter in layout)
        (axes,) = parse_layout(layout, shape).blocks
        assert (axes.d_out, axes.d_in, axes.window_size) == (3, 2, 5)
        assert sorted(axes.to_matrices(jnp.zeros(shape)).shape) == [3, 4, 10]


@pytest.mark.parametrize(
    ("shape", "candidates"),
    [
        ((2, 3, 4), "sio ioo iio oio bio"),
        ((1, 2, 3, 4), "ssio bioo biio boio bbio bsio oiss"),
        ((1, 2, 3, 4, 5), "sssio bssio"),
        ((1,) * 6, ""),
    ],
)
def test_no_rank_above_2_is_guessed(shape, candidates):
    with pytest.raises(ValueError, match="has no default layout") as error:
        parse_layout(None, shape, "leaf 'block/kernel'")
    assert f"leaf 'block/kernel' of shape {shape}" in str(error.value)
    assert all(f"'{layout}'" in str(error.value) for layout in candidates.split())
    for norm in (Auto(), Spectral(), Sign()):
        with pytest.raises(ValueError, match="has no default layout"):
            norm.lmo(jnp.ones(shape))


def test_a_convolution_knows_its_layouts():
    for layout, shape in {"sio": (3, 4, 5), "ssio": (2, 3, 4, 5), "sssio": (2, 2, 3, 4, 5)}.items():
        assert SpectralConv().read(shape) == parse_layout(layout, shape)


@pytest.mark.parametrize(
    ("layout", "shape", "blocks"),
    [
        ("io[3]", (4, 6), [("ibo", (4, 3, 2))]),
        ("io[2,2,2]", (4, 6), [("ibo", (4, 3, 2))]),
        ("io[1]", (4, 6), [("io", (4, 6))]),
        ("i[2]o", (4, 6), [("bio", (2, 2, 6))]),
        ("io[3,2,1]", (4, 6), [("io", (4, 3)), ("io", (4, 2)), ("io", (4, 1))]),
        ("bi[1,3]o[2]", (2, 4, 6), [("bibo", (2, 1, 2, 3)), ("bibo", (2, 3, 2, 3))]),
        ("i[1,3]o[2,4]", (4, 6), [("io", (1, 2)), ("io", (1, 4)), ("io", (3, 2)), ("io", (3, 4))]),
        ("ssio[6]", (3, 3, 1, 6), [("ssibo", (3, 3, 1, 6, 1))]),
        ("o[4]", (8,), [("bo", (4, 2))]),
    ],
)
def test_parts_are_matrices_of_their_own(layout, shape, blocks):
    read = parse_layout(layout, shape)
    assert list(read.blocks) == [parse_layout(text, size).blocks[0] for text, size in blocks]
    array = jnp.arange(float(np.prod(shape))).reshape(shape)
    pieces = read.split(array)
    assert [piece.shape for piece in pieces] == [size for _, size in blocks]
    np.testing.assert_array_equal(read.join(pieces), array)
    assert sorted(x for piece in pieces for x in piece.ravel().tolist()) == array.ravel().tolist()


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("ix", (2, 3), "letter 'x'"),
        ("IO", (2, 3), "letter 'I'"),
        ("ii", (2, 3), "no output axis"),
        ("", (), "no output axis"),
        ("io", (2, 3, 4), r"2 letters.*rank 3"),
        ("ssio", (2, 3), r"4 letters.*rank 2"),
        ("io[4]", (2, 6), "axis 1.*leaf 'w'.*6 entries.*4 equal parts"),
        ("io[3,2]", (2, 6), r"parts \[3, 2\] of axis 1.*add up to 5.*leaf 'w'.*has 6"),
        ("io[0]", (2, 6), "equal parts"),
        ("io[]", (2, 6), "equal parts"),
        ("io[a]", (2, 6), "equal parts"),
        ("s[2]io", (2, 3, 6), "'i' and 'o' may be followed"),
        ("i o", (2, 6), "cannot be read from ' o' on"),
        ("io[3", (2, 6), "cannot be read from"),
    ],
)
def test_errors(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(layout, shape, "leaf 'w'")


def test_errors_come_at_construction_where_they_can():
    with pytest.raises(ValueError, match="no output axis"):
        Spectral(layout="ii")
    with pytest.raises(ValueError, match="letter 'z'"):
        Spectral(layout="zo")
    with pytest.raises(TypeError, match="is a string"):
        Spectral(layout=("i", "o"))
