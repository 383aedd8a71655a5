"""Layouts: the matrix view, its inverse, the defaults and the errors."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scion_jax import SpectralConv
from scion_jax.norms._layout import parse_layout
from tests.support import naive

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]


@pytest.mark.parametrize(
    ("shape", "sizes"), [((), (1, 1, 1)), ((7,), (7, 1, 1)), ((5, 7), (7, 5, 1))]
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
    pieces = read.to_blocks(array)
    assert [piece.shape for piece in pieces] == [size for _, size in blocks]
    np.testing.assert_array_equal(read.from_blocks(pieces), array)
    assert sorted(x for piece in pieces for x in piece.ravel().tolist()) == array.ravel().tolist()
