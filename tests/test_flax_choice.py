"""Which norm a parameter of a Flax model gets, and what flax_norms refuses."""

import concurrent.futures
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

from scion_jax import (
    BiasRMS,
    ColNorm,
    Euclidean,
    RowNorm,
    Sign,
    Spectral,
    flax_norms,
    scion,
)
from scion_jax.labels import ModelLabels
from scion_jax.reading_flax.layouts import einsum

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
FEATURES = jax.ShapeDtypeStruct((2, 4), jnp.float32)


class Language(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 12, rngs=rngs)


class LinenLanguage(nn.Module):
    tied: bool = False

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(12, 8, name="embed")
        x = nn.LayerNorm(name="norm")(embed(tokens))
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="hidden")(x))
        return embed.attend(x) if self.tied else nn.Dense(12, name="head")(x)


def language():
    return nnx.eval_shape(lambda: Language(nnx.Rngs(0)))


def chosen(norms, labels, tree):
    """The norm of every leaf, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(labels(tree))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): norms[v] for k, v in leaves}


def pure(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_kinds():
    norms, labels = flax_norms(
        language(), hidden=Spectral(2.0), last={"head": Sign(50.0)}, vectors=BiasRMS(0.5)
    )
    assert chosen(norms, labels, pure(language())) == {
        "embed/embedding": ColNorm(layout="io"),
        "norm/scale": BiasRMS(0.5, layout="o"),
        "norm/bias": BiasRMS(0.5, layout="o"),
        "hidden/kernel": Spectral(2.0, layout="io"),
        "hidden/bias": BiasRMS(0.5, layout="o"),
        "head/kernel": Sign(50.0, layout="io"),
        "head/bias": BiasRMS(0.5, layout="o"),
    }


def test_first_pattern_wins_and_layouts_may_be_given():
    rules = {"hidden/kernel": RowNorm(layout="oi"), "norm": Euclidean(3.0), "^h": Spectral(7.0)}
    norms, labels = flax_norms(language(), rules=rules, last={})
    found = chosen(norms, labels, pure(language()))
    assert found["hidden/kernel"] == RowNorm(layout="oi")
    assert found["head/kernel"] == Spectral(7.0, layout="io")
    # Patterns mean matrices; only one that finds none means vectors.
    assert found["head/bias"] == BiasRMS(layout="o")
    assert found["norm/scale"] == Euclidean(3.0, layout="o")


def test_labels_are_not_mixed_up_by_patterns_that_look_like_them():
    rules = {"hidden": Spectral(5.0), "embed": ColNorm(2.0)}
    norms, labels = flax_norms(language(), hidden=Spectral(3.0), rules=rules, last={})
    found = chosen(norms, labels, pure(language()))
    assert found["hidden/kernel"] == Spectral(5.0, layout="io")
    assert found["head/kernel"] == Spectral(3.0, layout="io")
    assert found["embed/embedding"] == ColNorm(2.0, layout="io")


def test_last_is_required_and_candidates_are_listed():
    with pytest.raises(TypeError, match=r"needs last.*'hidden/kernel' \(8, 8\) of Linear"):
        flax_norms(language())
    with pytest.raises(TypeError, match=r"one of: 'head/kernel' \(8, 12\) of Dense"):
        flax_norms(LinenLanguage(), TOKENS)
    with pytest.raises(TypeError, match=r"one of: 'embed/embedding' \(12, 8\) of Embed"):
        flax_norms(LinenLanguage(tied=True), TOKENS)
    for count, more in ((8, ""), (11, ", and 3 more")):
        deep = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(count)))
        with pytest.raises(TypeError, match=r"one of: 'layers/\d+/kernel'") as error:
            flax_norms(deep)
        assert str(error.value).count("of Linear") == 8
        assert ("more" in str(error.value)) == bool(more)
        assert more in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"last": {"haed": Sign()}},
            r"last\['haed'\] finds no parameter.*nearest is 'head/",
        ),
        ({"rules": {"ebmed": Sign()}}, r"rules\['ebmed'\] finds no .*nearest is 'embed/embedding'"),
        (
            {"rules": {"head": Sign()}, "last": {"^head": Sign()}},
            r"last\['\^head'\] only finds leaves that patterns before it.*'head/kernel'",
        ),
        ({"last": {"(": Sign()}}, r"last\['\('\]: not a regular expression"),
        ({"last": {"head": Sign(layout="ioo")}}, r"'ioo' has 3 letters, but leaf 'head/kernel'"),
        ({"hidden": Spectral(layout="io")}, "layouts come from the model"),
        ({"vectors": BiasRMS(layout="o")}, "layouts come from the model"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flax_norms(language(), **{"last": {}, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last": Sign()}, "last maps patterns of paths to norms"),
        ({"last": {"head": 3.0}}, "'head': 3.0"),
        ({"rules": [("head", Sign())]}, "rules maps patterns"),
        ({"hidden": 50.0}, "hidden is a Norm"),
        ({"vectors": None}, "vectors is a Norm"),
        ({"radius": 3.0}, "leave out radius"),
    ],
)
def test_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        flax_norms(language(), **{"last": {}, **arguments})


def test_models_that_are_none():
    with pytest.raises(TypeError, match="make an instance of it"):
        flax_norms(Language, last={})
    with pytest.raises(TypeError, match=r"got \{'kernel'"):
        flax_norms({"kernel": 1}, last={})
    with pytest.raises(TypeError, match="without its inputs"):
        flax_norms(language(), TOKENS, last={})


class Embeddings(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.other = nnx.Embed(3, 8, rngs=rngs)


class Tied(Embeddings):
    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class TiedInside(Embeddings):
    def __call__(self, tokens):
        return jax.vmap(lambda x: self.embed.attend(x))(self.embed(tokens))


class TiedByReading(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.embed(tokens) @ self.embed.embedding[...].T


class Head(nnx.Module):
    def __init__(self, table):
        self.table = table

    def __call__(self, x):
        return x @ self.table[...].T


class Alias(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.a_head = Head(self.embed.embedding)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)


@pytest.mark.parametrize("make", [Tied, TiedInside, TiedByReading, Alias])
def test_tied_embeddings(make):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"(?s)tied to another layer.*last=.*Sign.*rules=.*ColNorm"
    ) as error:
        flax_norms(model, last={})
    also = "'a_head/table' (12, 8) of Head (also 'embed/embedding')"
    assert (also in str(error.value)) == (make is Alias)
    for pattern in ("^embed", "a_head") if make is Alias else ("^embed",):
        norms, labels = flax_norms(model, last={pattern: Sign(3.0)})
        tied = {norm for norm in norms.values() if isinstance(norm, Sign)}
        assert tied == {Sign(3.0, layout="oi")}
        norms, _ = flax_norms(model, last={}, rules={pattern: ColNorm(2.0)})
        assert ColNorm(2.0, layout="io") in norms.values()
        labels(nnx.state(model, nnx.Param))


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.plain = Embeddings(rngs)
        self.read = TiedByReading(rngs)
        self.tied = Tied(rngs)


def test_embeddings_of_other_modules_are_not_tied():
    model = nnx.eval_shape(lambda: Mixed(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"(?s)'read/embed/.*'tied/embed/") as error:
        flax_norms(model, last={})
    assert "plain" not in str(error.value)
    norms, labels = flax_norms(model, last={"^(read|tied)/embed": Sign()})
    found = chosen(norms, labels, pure(model))
    assert {path for path, norm in found.items() if norm == ColNorm(layout="io")} == {
        "plain/embed/embedding",
        "plain/other/embedding",
        "tied/other/embedding",
    }


class Shared(nnx.Module):
    """An embedding that is also a kernel, and a part of a cell that has another path, too."""

    def __init__(self, rngs):
        self.a_head = nnx.Linear(8, 8, rngs=rngs)
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.a_head.kernel = self.embed.embedding
        self.cell = nnx.GRUCell(8, 8, rngs=rngs)
        self.an_input = self.cell.dense_i
        self.own = nnx.Linear(8, 8, rngs=rngs)


def test_what_has_several_paths_gets_what_the_one_who_knows_best_says():
    model = nnx.eval_shape(lambda: Shared(nnx.Rngs(0)))
    _, labels = flax_norms(model, last={"a_head": Sign()})
    assert {path: label for path, _, label in labels.leaves if "bias" not in path} == {
        "a_head/kernel": "last 'a_head' oi",
        "embed/embedding": "last 'a_head' oi",
        "an_input/kernel": "hidden io[3]",
        "cell/dense_i/kernel": "hidden io[3]",
        "cell/dense_h/kernel": "hidden io[3]",
        "own/kernel": "hidden io",
    }


def test_tied_embeddings_of_linen():
    with pytest.raises(ValueError, match=r"(?s)tied.*'embed/embedding' \(12, 8\)"):
        flax_norms(LinenLanguage(tied=True), TOKENS, last={})
    norms, _ = flax_norms(LinenLanguage(tied=True), TOKENS, last={"embed": Sign(3.0)})
    assert norms["last 'embed' oi"] == Sign(3.0, layout="oi")


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (4, 8))
        heads = self.param("heads", nn.initializers.normal(), (2, 8, 3))
        self.param("b", nn.initializers.ones, (3,))
        return jnp.einsum("bi,io,hok->bhk", x, w, heads)


def test_matrices_of_unknown_modules_need_rules_with_layouts():
    with pytest.raises(ValueError, match=r"(?s)'w' \(4, 8\) of Own.*'heads' \(2, 8, 3\) of Own"):
        flax_norms(Own(), FEATURES, last={})
    rules = {"w": Spectral(), "heads": Spectral(2.0, layout="bio")}
    with pytest.raises(ValueError, match=r"'w' \(4, 8\).*rules=\{'\^w\$'") as error:
        flax_norms(Own(), FEATURES, last={}, rules=rules)
    assert "heads" not in str(error.value)
    norms, labels = flax_norms(
        Own(), FEATURES, last={"w": Spectral(layout="io")}, rules={"heads": rules["heads"]}
    )
    assert set(norms) == {"last 'w' io", "'heads' bio", "vectors o"}
    assert labels.start_of("b") is not None
    assert labels.start_of("w") is None


def test_unknown_matrices_in_stacks_say_so():
    with pytest.raises(ValueError, match=r"'w' \(4, 8\) of Own: "):
        flax_norms(Own(), FEATURES, last={})
    own = nn.vmap(Own, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
    with pytest.raises(ValueError, match=r"'w' \(3, 4, 8\) of \w*Own \(a stack of \(4, 8\)\): "):
        flax_norms(own(), FEATURES, last={})


class ByVariable(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.variable("params", "w", jnp.ones, (4, 8)).value
        return x @ w + self.variable("params", "b", jnp.zeros, (8,)).value


def test_parameters_that_are_made_as_variables():
    with pytest.raises(ValueError, match=r"'w' \(4, 8\) of a module"):
        flax_norms(ByVariable(), FEATURES, last={})
    norms, labels = flax_norms(ByVariable(), FEATURES, last={}, rules={"w": Spectral(layout="io")})
    assert labels({"w": jnp.ones((4, 8)), "b": jnp.ones(8)}) == {"w": "'w' io", "b": "vectors o"}
    assert set(norms) == {"'w' io", "vectors o"}


class Gains(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.param("table", nn.initializers.ones, (4, 8))
        self.param("scale", nn.initializers.ones, (4, 8))
        return x


class InBias(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Gains(name="bias")(x)


def test_names_of_gains_suggest_vectors_but_do_not_decide():
    model = InBias()
    with pytest.raises(ValueError, match="Flax's own layers do not tell") as error:
        flax_norms(model, FEATURES, last={})
    assert "{'^bias/table$': Spectral(" in str(error.value)
    assert "{'^bias/scale$': BiasRMS(" in str(error.value)


class Stranger(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs(), (4, 8)))
        self.shift = nnx.Param(jnp.ones(8))
        self.order = nnx.Param(jnp.arange(32).reshape(4, 8))  # not trained


def test_unknown_matrices_of_nnx():
    model = Stranger(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'table' \(4, 8\) of Stranger.*'io' \(Dense\), 'oi'"):
        flax_norms(model, last={})
    norms, _ = flax_norms(model, last={}, rules={"table": Spectral(layout="oi")})
    assert set(norms) == {"'table' oi", "vectors o"}


def stack(axis, size=4, features=(4, 4), bias=True, **options):
    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}), **options)
    def make(rngs):
        return nnx.Linear(*features, use_bias=bias, rngs=rngs)

    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        (stack(0), {"bio", "bo"}),
        (stack(1, bias=False), {"bio"}),  # nothing tells: leading
        (stack(1, size=3), {"ibo", "ob"}),  # sizes tell
        (stack(1, features=(4, 3)), {"ibo", "ob"}),  # the bias tells
    ],
)
def test_axes_of_stacks(model, layouts):
    norms, _ = flax_norms(model, last={})
    assert {norm.layout for norm in norms.values()} == layouts


def test_names_of_axes_tell():
    named = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None))

    @nnx.split_rngs(splits=4)
    @nnx.vmap(
        out_axes=nnx.StateAxes({nnx.Param: 1, ...: 0}),
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )
    def make(rngs):
        return nnx.Linear(4, 4, use_bias=False, kernel_init=named, rngs=rngs)

    with nnx.use_eager_sharding(False):
        norms, _ = flax_norms(make(nnx.Rngs(0)), last={})
    assert {norm.layout for norm in norms.values()} == {"ibo"}


def test_stack_whose_axis_remains_open():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.square = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.gain = nnx.RMSNorm(3, rngs=rngs)

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: -1, ...: 0}))
    def make(rngs):
        return Pair(rngs)

    model = make(nnx.Rngs(0))
    # The gains (3, 4) tell that the axis is 1 or the last one.
    with pytest.raises(ValueError, match=r"'square/kernel' \(4, 4, 4\).*axes of its stack may be"):
        flax_norms(model, last={})
    norms, _ = flax_norms(model, last={}, rules={"square": Spectral(layout="iob")})
    assert {norm.layout for norm in norms.values()} == {"iob", "ob"}


class Scaled(nnx.Linear):
    def __init__(self, rngs):
        super().__init__(4, 3, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(3))
        self.slope = nnx.Param(jnp.ones(()))


class Partial(nnx.Module):
    """A stack beside layers that are in none, one of them flat, and gains of one's own."""

    def __init__(self, rngs, flat=False):
        @nnx.split_rngs(splits=4)
        @nnx.vmap
        def make(rngs):
            return Scaled(rngs)

        self.a_layer = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.layers = make(rngs)
        if flat:
            self.a_layer.kernel = nnx.Param(self.a_layer.kernel[...].reshape(-1))
        else:
            self.scale = nnx.Param(jnp.ones((4, 3)))


def test_gains_of_unknown_layers_in_stacks_are_told_by_their_own_surroundings():
    model = nnx.eval_shape(lambda: Partial(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r":\n  'scale' \(4, 3\) of Partial: .*BiasRMS") as error:
        flax_norms(model, last={})
    assert "layers/scale" not in str(error.value)
    _, labels = flax_norms(model, last={}, rules={"^scale": BiasRMS(layout="oo")})
    assert labels(pure(model))["layers"] == {
        "kernel": "hidden bio",
        "bias": "vectors bo",
        "scale": "vectors bo",
        "slope": "vectors o[4]",
    }


def test_stacks_beside_what_has_lost_axes():
    rules = {"a_layer": Spectral(layout="o[16]")}
    model = nnx.eval_shape(lambda: Partial(nnx.Rngs(0), flat=True))
    _, labels = flax_norms(model, last={}, rules=rules)
    assert ("layers/kernel", (4, 4, 3), "hidden bio") in labels.leaves


@pytest.mark.parametrize(
    ("equation", "kernel", "bias"),
    [
        ("BTD,NDH->BTNH", "oio", "oo"),
        ("BTNH,NHD->BTD", "iio", "o"),
        ("BTD,SNDH->SBTNH", "boio", "boo"),
        ("BTD,CKDH->CBTKH", "boio", "boo"),
        ("ecd,edf->ecf", "bio", "bo"),
        ("...d,df->...f", "io", "o"),
        ("d,df->f", "io", "o"),
        ("d,dnh->nh", "ioo", "oo"),
        ("btd,dh->hbt", "io", "o"),
        ("btd,d->btd", "o", "o"),
        ("btd,d->bt", "o", ""),
        ("btnd,nd->btn", "bo", "b"),
    ],
)
def test_einsum(equation, kernel, bias):
    assert einsum(equation)[1:] == (kernel, bias)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("bd,...d->b...", "unnamed axes"),
        ("bd,dd->b", "repeated"),
        ("bd,dk->b", "sums over 'k'"),
        ("btd,dnh->nhbt", "lead the result"),
        ("bt,tdh->btdh", "contracts no axis"),
        ("bd,df", "not of the form"),
    ],
)
def test_einsum_refuses(equation, message):
    with pytest.raises(ValueError, match=message):
        einsum(equation)


def test_einsum_that_does_not_tell_is_named():
    model = nn.Einsum((4, 2, 3), "btd,dnh->nhbt")
    with pytest.raises(ValueError, match=r"'kernel' \(4, 2, 3\) of Einsum .*lead the result"):
        flax_norms(model, jax.ShapeDtypeStruct((2, 5, 4), jnp.float32), last={})
    model = nnx.Einsum("btd,dnh->nhbt", (4, 2, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'kernel' \(4, 2, 3\) of Einsum .*lead the result"):
        flax_norms(model, last={})


def test_what_is_stored_in_another_shape_than_it_is_made_in_is_named():
    def turned(variables):
        return jax.tree.map(jnp.transpose, variables)

    linen = nn.map_variables(nn.Dense, "params", turned, turned, mutable=True, init=True)(3)
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(linear.kernel[...].T)
    flat = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    flat.kernel = nnx.Param(flat.kernel[...].reshape(-1))
    for model, inputs, shape in (
        (linen, [FEATURES], r"\(3, 4\)"),
        (linear, [], r"\(3, 4\)"),
        (flat, [], r"\(12,\)"),
    ):
        message = rf"'kernel' {shape} of .* \(its layer makes it of shape \(4, 3\)\)"
        with pytest.raises(ValueError, match=message):
            flax_norms(model, *inputs, last={})


@pytest.mark.parametrize(
    ("features", "axes", "layouts"),
    [((2, 3), (-2, -1), ("ioo", "oo")), (3, -1, ("io", "o"))],
)
def test_gains_of_nnx_weight_norm(features, axes, layouts):
    layer = nnx.LinearGeneral(4, features, use_bias=False, rngs=nnx.Rngs(0))
    norm = nnx.WeightNorm(layer, feature_axes=axes, rngs=nnx.Rngs(0))
    for model in (norm, nnx.Sequential(norm)):
        params = nnx.state(model, nnx.Param)  # before Flax 0.12.4 without the gains
        norms, labels = flax_norms(model, last={})
        found = jax.tree.leaves(labels(params))
        both = [f"hidden {layouts[0]}", f"vectors {layouts[1]}"]
        assert sorted(found) == both[: len(jax.tree.leaves(params))]
        assert set(found) == norms.keys()


class Named(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name="own")(x)


class Interrupted(Named):
    """While it is read, another thread makes a model whose parameters have the same paths."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.features, name="own")(x)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(self.make_another).result()
        return y

    @staticmethod
    def make_another():
        return Named(5, parent=None).init(jax.random.key(0), jnp.ones((1, 2)))


def test_other_threads_may_make_models():
    assert flax_norms(Interrupted(3), FEATURES, last={})[0].keys() == {"vectors o", "hidden io"}


def linen_params():
    return LinenLanguage().init(jax.random.key(0), jnp.zeros((2, 5), jnp.int32))


def test_labels_fit_every_tree_of_the_model():
    norms, labels = flax_norms(LinenLanguage(), TOKENS, last={"head": Sign()})
    variables = linen_params()
    assert labels(variables)["params"] == labels(variables["params"])
    shapes = jax.eval_shape(linen_params)
    assert labels(shapes) == labels(variables)
    part = {"hidden": {"kernel": jnp.zeros((8, 8)), "bias": optax.MaskedNode()}, "head": None}
    assert labels(part)["hidden"]["kernel"] == "hidden io"
    assert jax.tree.structure(labels(part)) == jax.tree.structure(part)
    assert isinstance(labels, ModelLabels)

    def step(params):
        optimizer = scion(0.1, norms, labels)
        return optimizer.update(params, optimizer.init(params), params)[0]

    assert jax.eval_shape(step, variables).keys() == {"params"}
    model = Language(nnx.Rngs(0))
    norms, labels = flax_norms(model, last={"head": Sign()})
    for wrt in (nnx.Param, nnx.All(nnx.Param, nnx.PathContains("head"))):
        optimizer = nnx.Optimizer(model, scion(0.1, norms, labels), wrt=wrt)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, wrt)))


def test_labels_of_boxed_parameters():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
    model = nn.Dense(3, kernel_init=boxed)
    norms, labels = flax_norms(model, FEATURES, last={})
    variables = model.init(jax.random.key(0), jnp.zeros((2, 4)))
    for tree in (variables, nn.meta.unbox(variables)):
        assert jax.tree.leaves(labels(tree)) == ["vectors o", "hidden io"]
    logical = nn.Dense(3, kernel_init=nn.with_logical_partitioning(boxed, ("embed", None)))
    assert flax_norms(logical, FEATURES, last={})[0] == norms


def test_labels_are_hashable_and_equal_if_they_label_equally():
    one, two = (flax_norms(LinenLanguage(), TOKENS, last={})[1] for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert repr(one) == repr(two)
    assert one != flax_norms(LinenLanguage(), TOKENS, last={"head": Sign()})[1]


def test_under_inject_hyperparams():
    norms, labels = flax_norms(LinenLanguage(), TOKENS, last={"head": Sign()})
    optimizer = optax.inject_hyperparams(scion, static_args=("norms", "param_labels"))(
        0.1, norms, labels
    )
    params = linen_params()["params"]
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


def test_other_collections_are_refused():
    _, labels = flax_norms(Normalized(), FEATURES, train=True, last={})
    variables = Normalized().init(jax.random.key(0), jnp.ones((2, 4)), train=True)
    with pytest.raises(ValueError, match=r"'batch_stats'.*variables\['params'\]"):
        labels(variables)
    labels(variables["params"])
    with pytest.raises(ValueError, match="'batch_stats/BatchNorm_0/mean' is no parameter"):
        labels({"batch_stats": variables["batch_stats"]})


def test_leaves_of_another_model_are_refused():
    _, labels = flax_norms(language(), last={})
    with pytest.raises(ValueError, match=r"'hidden/kernle' is no parameter.*'hidden/kernel'"):
        labels({"hidden": {"kernle": jnp.zeros((8, 8))}})
    with pytest.raises(ValueError, match=r"'hidden/kernel' has shape \(8, 9\), but \(8, 8\)"):
        labels({"hidden": {"kernel": jnp.zeros((8, 9))}})


class Autoencoder(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(3)
        self.decoder = nn.Dense(4)

    def __call__(self, x):
        return self.decoder(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, *, scale, noisy):
        noise = jax.random.normal(self.make_rng("noise"), x.shape) if noisy else 0.0
        return nn.Dense(3)(x + scale * noise)


def test_methods_and_streams():
    norms, labels = flax_norms(Autoencoder(), FEATURES, method=Autoencoder.encode, last={})
    assert [path for path, _, _ in labels.leaves] == ["encoder/kernel", "encoder/bias"]
    for rngs in ({"noise": jax.random.key(1)}, {"noise": jax.eval_shape(jax.random.key, 0)}):
        assert flax_norms(Noisy(), FEATURES, scale=0.1, noisy=True, rngs=rngs, last={})[0] == norms
    assert flax_norms(LinenLanguage(), TOKENS, train=True, last={})[0]


def test_nothing_is_computed():
    def read(x):
        return flax_norms(
            Own(), x, last={}, rules={"w": Spectral(layout="io"), "h": Sign(layout="bio")}
        )

    jax.eval_shape(lambda x: read(x) and x, FEATURES)
    with jax.log_compiles(False), jax.transfer_guard("disallow"):
        read(FEATURES)


def test_importing_scion_jax_does_not_import_flax():
    code = "import sys, scion_jax; assert 'flax' not in sys.modules; sys.modules['flax'] = None\n"
    code += "try: scion_jax.flax_norms(1, last={})\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "scion_jax[flax]" in done.stdout
