"""Random programs around parameters whose roles are known by construction.

Each layer makes a parameter that is stored in some shape, brings it into the shape that it is used
in by a random chain of operations, and uses it in one of many ways of writing the same thing. What
the parameter is follows from how it was made: the letters of its axes are carried along, backwards,
through the chain.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
Step = Callable[[Params, Any], Any]


@dataclasses.dataclass
class Program:
    """A function of parameters and inputs, with what each parameter is.

    Attributes:
        params: The parameters.
        inputs: The inputs.
        expected: Kind and letters by name.
        steps: What is done one after the other.
    """

    params: Params
    inputs: tuple[Any, ...]
    expected: dict[str, tuple[str, str]]
    steps: list[Step]

    def __call__(self, params: Params, *inputs: Any) -> Any:
        x = inputs
        for step in self.steps:
            x = step(params, x)
        return jnp.mean(jnp.square(x))


class Maker:
    """Draws a program.

    Args:
        seed: Which one.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.program = Program({}, (), {}, [])

    def make(self) -> Program:
        """Makes a program of a few layers."""
        start = self.random.choice([self._from_numbers, self._from_tokens])
        width = start()
        for _ in range(self.random.randint(1, 4)):
            layer = self.random.choice(
                [self._dense, self._dense, self._bias, self._gain, self._looped,
                 self._fused, self._attention, self._experts, self._convolution, self._positions,
                 self._nonlinear]
            )  # fmt: skip
            width = layer(width)
        self._dense(width)
        return self.program

    # Parameters ---------------------------------------------------------------------------------

    def parameter(self, kind: str, letters: str, shape: tuple[int, ...]) -> Callable[[Params], Any]:
        """Adds a parameter, stored in another way; returns what brings it into a shape."""
        name = f"p{len(self.program.params)}"
        stored, letters, restore = self._stored(letters, shape)
        self.program.params[name] = jnp.asarray(self.numbers.normal(size=stored), jnp.float32)
        self.program.expected[name] = kind, letters
        return lambda params: restore(params[name])

    def _stored(
        self, letters: str, shape: tuple[int, ...]
    ) -> tuple[Any, str, Callable[[Any], Any]]:
        steps: list[Callable[[Any], Any]] = []
        for _ in range(self.random.randint(0, 3)):
            letters, shape, step = self.random.choice(
                [
                    self._transposed,
                    self._merged,
                    self._indexed,
                    self._reshaped,
                    self._cast,
                    self._kept,
                ]
            )(letters, shape)
            steps.append(step)

        def restore(array: Any) -> Any:
            for step in reversed(steps):
                array = step(array)
            return array

        return shape, letters, restore

    def _transposed(self, letters: str, shape: Any) -> Any:
        order = self.random.sample(range(len(shape)), len(shape))
        back = tuple(int(place) for place in np.argsort(order))
        moved = "".join(letters[axis] for axis in order), tuple(shape[axis] for axis in order)
        return *moved, lambda array: jnp.transpose(array, back)

    def _merged(self, letters: str, shape: Any) -> Any:
        """Stored with an axis in two: the program merges them."""
        axis = self.random.randrange(len(shape))
        divisors = [n for n in range(2, shape[axis]) if shape[axis] % n == 0]
        if not divisors or letters[axis] not in "io":
            return self._kept(letters, shape)
        outer = self.random.choice(divisors)
        split = (*shape[:axis], outer, shape[axis] // outer, *shape[axis + 1 :])
        return letters[: axis + 1] + letters[axis:], split, lambda array: array.reshape(shape)

    def _indexed(self, letters: str, shape: Any) -> Any:
        """Stored in a stack, of which all entries but one are someone else's."""
        if "i" not in letters:  # tables of rows may be embeddings
            return self._kept(letters, shape)
        axis, count = self.random.randint(0, len(shape)), self.random.randint(2, 3)
        place = self.random.randrange(count)
        stacked = (*shape[:axis], count, *shape[axis:])
        take = self.random.choice(
            [
                lambda array: jnp.take(array, place, axis),
                lambda array: jax.lax.dynamic_index_in_dim(array, place, axis, keepdims=False),
                lambda array: jnp.split(array, count, axis)[place].reshape(shape),
                lambda array: jnp.moveaxis(array, axis, 0)[place],
            ]
        )
        return letters[:axis] + "b" + letters[axis:], stacked, take

    def _reshaped(self, letters: str, shape: Any) -> Any:
        """Stored with an axis of size one more."""
        axis = self.random.randint(0, len(shape))
        wide = (*shape[:axis], 1, *shape[axis:])
        return letters[:axis] + "?" + letters[axis:], wide, lambda array: jnp.squeeze(array, axis)

    def _cast(self, letters: str, shape: Any) -> Any:
        step = self.random.choice(
            [
                lambda array: array.astype(jnp.bfloat16).astype(jnp.float32),
                lambda array: 0.5 * array,
                lambda array: array / jnp.sqrt(jnp.sum(array**2)),
                lambda array: jax.checkpoint(jnp.tanh)(array),
                jax.jit(lambda array: array + 0.0),
            ]
        )
        return letters, shape, step

    def _kept(self, letters: str, shape: Any) -> Any:
        return letters, shape, lambda array: array

    # Layers -------------------------------------------------------------------------------------

    def step(self, step: Step) -> None:
        """Adds a step."""
        self.program.steps.append(step)

    def _from_numbers(self) -> int:
        width = self.random.choice([4, 6, 10])
        self.program.inputs = (jnp.asarray(self.numbers.normal(size=(3, 5, width)), jnp.float32),)
        self.step(lambda params, x: x[0])
        return width

    def _from_tokens(self) -> int:
        words, width = 11, self.random.choice([4, 6, 10])
        self.program.inputs = (jnp.asarray(self.numbers.integers(0, words, (3, 5))),)
        name = f"p{len(self.program.params)}"
        self.program.params[name] = jnp.asarray(
            self.numbers.normal(size=(words, width)), jnp.float32
        )
        self.program.expected[name] = "embedding", "io"
        look = self.random.choice(
            [
                lambda table, x: table[x],
                lambda table, x: jnp.take(table, x, axis=0),
                lambda table, x: jax.nn.one_hot(x, words) @ table,
                lambda table, x: jax.vmap(jax.vmap(lambda n: table[n]))(x),
            ]
        )
        self.step(lambda params, x: look(params[name], x[0]))
        return width

    def _dense(self, width: int) -> int:
        out = self.random.choice([4, 6, 9, 12])
        kernel = self.parameter("matrix", "io", (width, out))
        use = self.random.choice(
            [
                lambda k, x: x @ k,
                lambda k, x: jnp.einsum("bti,io->bto", x, k),
                lambda k, x: jnp.einsum("io,bti->bto", k, x),
                lambda k, x: jax.vmap(jax.vmap(lambda row: k.T @ row))(x),
                lambda k, x: jnp.tensordot(x, k, ((2,), (0,))),
                lambda k, x: jnp.moveaxis(
                    jax.lax.dot_general(k, x, (((0,), (2,)), ((), ()))), 0, -1
                ),
                lambda k, x: jnp.sum(x[..., None] * k, 2),
                lambda k, x: jax.checkpoint(lambda a: jnp.matmul(a, k))(x),
                lambda k, x: jax.lax.map(lambda row: row @ k, x),
            ]
        )
        self.step(lambda params, x: use(kernel(params), x))
        return out

    def _bias(self, width: int) -> int:
        bias = self.parameter("vector", "o", (width,))
        self.step(lambda params, x: x + bias(params))
        return width

    def _gain(self, width: int) -> int:
        gain = self.parameter("vector", "o", (width,))

        def norm(params: Params, x: Any) -> Any:
            x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
            return x * (1 + gain(params))

        self.step(norm)
        return width

    def _positions(self, width: int) -> int:
        table = self.parameter("vector", "oo", (5, width))
        self.step(lambda params, x: x + table(params))
        return width

    def _nonlinear(self, width: int) -> int:
        function = self.random.choice([jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.silu, jnp.sin])
        self.step(lambda params, x: function(x))
        return width

    def _looped(self, width: int) -> int:
        kernels = self.parameter("matrix", "bio", (3, width, width))
        biases = self.parameter("vector", "bo", (3, width))

        def one(x: Any, layer: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ layer[0] + layer[1]), None

        def by_index(layers: Any, x: Any) -> Any:
            return jax.lax.fori_loop(0, 3, lambda n, x: one(x, (layers[0][n], layers[1][n]))[0], x)

        loop = self.random.choice(
            [lambda layers, x: jax.lax.scan(jax.checkpoint(one), x, layers)[0], by_index]
        )
        self.step(lambda params, x: loop((kernels(params), biases(params)), x))
        return width

    def _fused(self, width: int) -> int:
        name = f"p{len(self.program.params)}"  # as it is: its halves may be an axis of its own
        self.program.params[name] = jnp.ones((width, 2 * width))
        self.program.expected[name] = "matrix", "io[2]"

        def gated(params: Params, x: Any) -> Any:
            gate, up = jnp.split(x @ params[name], 2, -1)
            return jax.nn.silu(gate) * up

        self.step(gated)
        return width

    def _attention(self, width: int) -> int:
        heads, size = 2, 3
        query, key, value = (
            self.parameter("matrix", "ioo", (width, heads, size)) for _ in range(3)
        )
        out = self.parameter("matrix", "iio", (heads, size, width))

        def attend(params: Params, x: Any) -> Any:
            q, k, v = (jnp.einsum("bti,ihd->bthd", x, p(params)) for p in (query, key, value))
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(size))
            return x + jnp.einsum("bhts,bshd,hdo->bto", weights, v, out(params))

        self.step(attend)
        return width

    def _experts(self, width: int) -> int:
        router = self.parameter("matrix", "io", (width, 4))
        kernels = self.parameter("matrix", "bio", (4, width, width))

        def gathered(scores: Any, k: Any, x: Any) -> Any:
            return jnp.einsum("bti,btio->bto", x, k[jnp.argmax(scores, -1)])

        def dispatched(scores: Any, k: Any, x: Any) -> Any:
            chosen = jax.nn.one_hot(jnp.argmax(scores, -1), 4)
            apart = jnp.einsum("bte,bti->ebti", chosen, x)
            return jnp.einsum("ebti,eio->bto", apart, k)

        def sorted_by_expert(scores: Any, k: Any, x: Any) -> Any:
            chosen = jnp.argmax(scores, -1).reshape(-1)
            order = jnp.argsort(chosen)
            sizes = jnp.bincount(chosen, length=4)
            rows = jax.lax.ragged_dot(x.reshape(-1, width)[order], k, sizes)
            return rows[jnp.argsort(order)].reshape(x.shape)

        use = self.random.choice([gathered, dispatched, sorted_by_expert])

        def route(params: Params, x: Any) -> Any:
            scores = jax.nn.softmax(x @ router(params))
            return use(scores, kernels(params), x) * jnp.max(scores, -1, keepdims=True)

        self.step(route)
        return width

    def _convolution(self, width: int) -> int:
        out = self.random.choice([4, 6])
        kernel = self.parameter("matrix", "sio", (3, width, out))

        def convolve(params: Params, x: Any) -> Any:
            numbers = ("NWC", "WIO", "NWC")
            return jax.lax.conv_general_dilated(
                x, kernel(params), (1,), "SAME", dimension_numbers=numbers
            )

        self.step(convolve)
        return out
