"""Layouts: the matrix view, its inverse, the defaults and the errors."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import naive
from scion_jax import Spectral
from scion_jax.norms.layout import parse_layout

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((), (1, 1, 1)),
        ((7,), (7, 1, 1)),
        ((5, 7), (7, 5, 1)),
        ((3, 3, 5, 7), (7, 5, 9)),
        ((2, 3, 4, 5, 7), (7, 5, 24)),
    ],
)
def test_default_by_rank(shape, sizes):
    axes = parse_layout(None, shape)
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
    axes = parse_layout(layout, shape)
    matrices = axes.to_matrices(array)
    expected = naive.to_matrices(array, layout)
    np.testing.assert_array_equal(matrices, np.stack(list(expected.values())))
    np.testing.assert_array_equal(axes.from_matrices(matrices), array)


def test_scalar_view():
    axes = parse_layout(None, ())
    assert axes.to_matrices(jnp.float32(3.0)).shape == (1, 1, 1)
    assert axes.from_matrices(jnp.ones((1, 1, 1))).shape == ()


def test_every_order_of_a_convolution():
    for letters in set(itertools.permutations("iosb")):
        layout = "".join(letters)
        shape = tuple({"i": 2, "o": 3, "s": 5, "b": 4}[letter] for letter in layout)
        axes = parse_layout(layout, shape)
        assert (axes.d_out, axes.d_in, axes.window_size) == (3, 2, 5)
        assert axes.to_matrices(jnp.zeros(shape)).shape == (4, 3, 10)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1)])
def test_rank_3_is_ambiguous(shape):
    with pytest.raises(ValueError, match=r"'block/kernel'.*\(.*\).*'sio'.*'ioo'.*'bio'") as error:
        parse_layout(None, shape, "block/kernel")
    assert str(shape) in str(error.value)


def test_rank_6_needs_a_layout():
    with pytest.raises(ValueError, match="rank 6"):
        parse_layout(None, (1,) * 6)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("ix", (2, 3), "letter 'x'"),
        ("IO", (2, 3), "letter 'I'"),
        ("ii", (2, 3), "no output axis"),
        ("", (), "no output axis"),
        ("io", (2, 3, 4), r"2 letters.*rank 3"),
        ("ssio", (2, 3), r"4 letters.*rank 2"),
    ],
)
def test_errors(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(layout, shape, "w")


def test_errors_come_at_construction_where_they_can():
    with pytest.raises(ValueError, match="no output axis"):
        Spectral(layout="ii")
    with pytest.raises(ValueError, match="letter 'z'"):
        Spectral(layout="zo")
    with pytest.raises(TypeError, match="is a string"):
        Spectral(layout=("i", "o"))
