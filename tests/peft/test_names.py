"""Rules of names: what they match, what they refuse, and where each of torch's parameters is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import ConfigError
from jax_lora.peft.names import Name, flax_names
from jax_lora.peft.places import Place, places_of
from tests.peft.small import World


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("x/{y}", "z.weight")], "different parameters would get one name"),
        ([("{a}/{a}", "{a}.weight")], "expected each field once"),
        ([("{", "z")], "expected path to be text with {fields}"),
        ([("nothing", "z.weight")], "no rule matches any; the paths are such as conv/kernel"),
        ([("layers/w", "fc.weight")], "expected a field of 'fc.weight' for each stack-axis"),
        ([("head/kernel", "{k}.weight")], "expected a field of '{k}.weight' for each stack-axis"),
        ([("head/kernel", "x.weight"), ("table", "x.weight")], "and so is"),
    ],
)
def test_rules_that_cannot_be(world: World, rules: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        places_of(world.params, rules, world.uses)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": "io"}, "expected axes only together with kind"),
        ({"kind": "table"}, "expected kind to be one of"),
        ({"kind": "linear", "axes": "ii"}, "expected axes to have i and o"),
        ({"kind": "linear", "axes": "ihwo"}, "with other axes than 'ihwo', those of a convolution"),
        ({"kind": "conv", "axes": "io"}, "with other axes than 'io', those of no convolution"),
        ({"kind": "conv", "axes": "hhio"}, "other letters at most once"),
        ({"kind": "conv", "axes": "hiio"}, "each once for a convolution"),
        ({"kind": "linear", "axes": 3}, "expected axes to have i and o"),
        ({"parts": {"p": ()}}, "expected parts to have, by field, different words"),
        ({"parts": {"p": ("a", "a")}}, "expected parts to have, by field, different words"),
        ({"parts": {"p": {"a": 0, "b": 1}}}, "expected parts to have, by field, different words"),
        ({"parts": {"x": ("a", "b")}}, "expected parts of fields that the name has"),
        ({"parts": {"p": {"a": 1, "b": 1}, "q": {"a": 1, "b": 1}}}, "at most one field of parts"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Name("w", "{p}.{q}.weight", **settings)
    assert message in str(caught.value)


def test_rules_as_json() -> None:
    rule = Name("a/{k}", "{k}.{p}.weight", "linear", "io", {"p": {"q": 2, "k": 1}})
    assert Name.from_json(rule.to_json()) == rule
    assert Name("a", "b").to_json() == {"path": "a", "name": "b"}
    for data, message in (
        ({"path": "a"}, "expected a rule with name"),
        ({"path": "a", "name": "b", "shape": 3}, "got also shape"),
        ("a", "expected a rule to be path, name"),
    ):
        with pytest.raises(ConfigError, match=message):
            Name.from_json(data)  # type: ignore[arg-type]


def _only(places: dict[str, Place]) -> Place:
    (place,) = places.values()
    return place


def test_rules_say_how_a_convolution_lies() -> None:
    """Axes in an order that cannot be guessed: ``[h, out, in, w]``."""
    layout = jl.Layout((2, 5, 3, 4), in_axes=(0, 2, 3), out_axes=(1,))
    params = {"w": jnp.zeros(layout.shape)}
    rule = Name("w", "conv.weight", kind="conv", axes="hoiw")
    weight = np.arange(5 * 3 * 2 * 4).reshape(5, 3, 2, 4)
    # With the function's use and without.
    for layouts in ({"w": layout}, {}, None):
        place = _only(places_of(params, [rule], layouts))
        assert place.layout == layout
        assert place.torch_shape == weight.shape
        ours = np.zeros(layout.shape, weight.dtype)
        place.write(ours, weight)
        np.testing.assert_array_equal(ours, weight.transpose(2, 0, 1, 3))
        np.testing.assert_array_equal(place.read(ours), weight)
    guess = Name("w", "conv.weight", kind="conv")
    with pytest.raises(ConfigError, match="say axes= in its rule"):
        places_of(params, [guess], {"w": layout})
    wrong = Name("w", "conv.weight", kind="conv", axes="ohiw")
    with pytest.raises(ConfigError, match="expected axes='ohiw' to fit the roles of its axes"):
        places_of(params, [wrong], {"w": layout})


@pytest.mark.parametrize(
    ("shape", "rule", "layout"),
    [
        ((4, 3), Name("w", "q.weight", "linear", "io"), jl.Layout((4, 3), (0,), (1,))),
        ((3, 4), Name("w", "q.weight", "linear", "oi"), jl.Layout((3, 4), (1,), (0,))),
        ((4, 2, 3), Name("w", "q.weight", "linear", "ioo"), jl.Layout((4, 2, 3), (0,), (1, 2))),
        ((9, 4), Name("w", "e.weight", "embedding"), jl.Layout((9, 4), (0,), (1,))),
        (
            (5, 4, 3),
            Name("w", "h.{k}.q.weight", "linear", "io"),
            jl.Layout((5, 4, 3), (1,), (2,), (0,)),
        ),
        (
            (4, 5, 3),
            Name("w", "h.{k}.q.weight", "linear", "iso"),
            jl.Layout((4, 5, 3), (0,), (2,), (1,)),
        ),
        ((4, 3), Name("w", "q.weight"), None),
    ],
)
def test_roles_without_a_function(shape: Any, rule: Name, layout: Any) -> None:
    places = places_of({"w": np.zeros(shape)}, [rule]) if layout or shape else {}
    assert {place.layout for place in places.values()} == {layout}
    assert len(places) == (1 if layout is None else max(1, *layout.stack, 1))
    assert all(place.sure is (rule.kind is not None) for place in places.values())


def test_axes_that_do_not_fit() -> None:
    rule = Name("w", "q.weight", "linear", "io")
    with pytest.raises(ConfigError, match=r"a letter for each axis of shape \(2, 3, 4\)"):
        places_of({"w": np.zeros((2, 3, 4))}, [rule])


class TestParts:
    def test_words_for_a_stack(self) -> None:
        rule = Name("mlp", "h.{k}.{p}_proj.weight", "linear", "io", {"p": ("gate", "up")})
        w = np.arange(3 * 2 * 4 * 5.0).reshape(3, 2, 4, 5)
        places = places_of({"mlp": w}, [rule])
        assert set(places) == {f"h.{k}.{p}_proj.weight" for k in range(3) for p in ("gate", "up")}
        np.testing.assert_array_equal(places["h.2.up_proj.weight"].read(w), w[2, 1].T)
        with pytest.raises(ConfigError, match=r"expected 4 words for 'p', got \['gate', 'up'\]"):
            places_of({"mlp": np.zeros((3, 4, 4, 5))}, [rule])

    @pytest.mark.parametrize(
        ("kind", "axes", "shape"),
        [("linear", "io", (4, 8)), ("linear", "oi", (8, 4)), ("conv1d", "io", (4, 8))],
    )
    def test_modules_side_by_side(self, kind: Any, axes: str, shape: Any) -> None:
        sizes = {"q": 4, "k": 1, "v": 3}
        rule = Name("qkv", "{p}.weight", kind, axes, {"p": sizes})
        w = np.arange(32.0).reshape(shape)
        places = places_of({"qkv": w}, [rule])
        torch = w if (axes == "oi") is not (kind == "conv1d") else w.T
        outputs = 1 if kind == "conv1d" else 0
        expected = np.split(torch, [4, 5], axis=outputs)
        again = np.zeros_like(w)
        for word, value in zip(sizes, expected, strict=True):
            place = places[f"{word}.weight"]
            assert place.torch_shape == value.shape
            np.testing.assert_array_equal(place.read(w), value)
            place.write(again, value)
        np.testing.assert_array_equal(again, w)
        wrong = Name("qkv", "{p}.weight", kind, axes, {"p": {"q": 4, "k": 1}})
        with pytest.raises(ConfigError, match="that add up to its 8 outputs"):
            places_of({"qkv": w}, [wrong])

    def test_their_biases(self) -> None:
        """Of three times two heads of four: in torch three of eight, in one axis."""
        sizes = {"q": 8, "k": 8, "v": 8}
        rules = [
            Name("w", "{p}.weight", "linear", "iooo", {"p": sizes}),
            Name("b", "{p}.bias", parts={"p": sizes}),
        ]
        b = np.arange(24.0).reshape(3, 2, 4)
        places = places_of({"w": np.zeros((5, 3, 2, 4)), "b": b}, rules)
        np.testing.assert_array_equal(places["k.bias"].read(b), np.arange(8.0, 16))
        again = np.zeros_like(b)
        for p in sizes:
            places[f"{p}.bias"].write(again, places[f"{p}.bias"].read(b))
        np.testing.assert_array_equal(again, b)


def test_a_bias_of_several_axes_is_one_in_torch() -> None:
    rules = [Name("w", "q.weight", "linear", "ioo"), Name("b", "q.bias")]
    b = np.arange(6.0).reshape(2, 3)
    places = places_of({"w": np.zeros((4, 2, 3)), "b": b}, rules)
    assert places["q.bias"].torch_shape == (6,)
    np.testing.assert_array_equal(places["q.bias"].read(b), b.reshape(-1))
    # What is no such bias keeps its shape.
    other = places_of({"w": np.zeros((4, 2, 3)), "b": np.zeros((3, 2))}, rules)
    assert other["q.bias"].torch_shape == (3, 2)


class TestFlaxNames:
    TREE: dict[str, Any] = {  # noqa: RUF012 - is not changed
        "model": {
            "layers": {"0": {"q": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}},
            "ln": {"scale": np.zeros(2), "bias": np.zeros(2)},
        },
        "embed": {"embedding": np.zeros((4, 2))},
    }
    NAMES = {  # noqa: RUF012
        "model.layers.0.q.weight": "model/layers/0/q/kernel",
        "model.layers.0.q.bias": "model/layers/0/q/bias",
        "model.ln.weight": "model/ln/scale",
        "model.ln.bias": "model/ln/bias",
        "embed.weight": "embed/embedding",
    }

    def test_with_and_without_params(self) -> None:
        for tree, start in ((self.TREE, ""), ({"params": self.TREE}, "params/")):
            places = places_of(tree, jl.peft.FLAX)
            found = {name: place.path for name, place in places.items()}
            assert found == {name: start + path for name, path in self.NAMES.items()}

    def test_names_of_torch(self) -> None:
        """Flat ones, as a state dict has them, and nested ones."""
        w = np.zeros((2, 3))
        for tree in (
            {"model.layers.0.q.weight": w},
            {"model": {"layers": [{"q": {"weight": w}}]}},
            {"params": {"model": {"layers": [{"q": {"weight": w}}]}}},
        ):
            assert set(places_of(tree, jl.peft.FLAX)) == {"model.layers.0.q.weight"}

    def test_numbered_modules(self) -> None:
        w, b = np.zeros((2, 3)), np.zeros(3)
        tree = {"model": {"layers_7": {"ln_1": {"kernel": w}, "q": {"bias": b}}}}
        names = {"model.layers.7.ln_1.weight", "model.layers.7.q.bias"}
        assert set(places_of(tree, flax_names(numbered=["layers"]))) == names
        assert set(places_of(tree["model"], flax_names(numbered=["layers"]))) == {
            name.removeprefix("model.") for name in names
        }
        # The control: without it the number stays where it is.
        assert "model.layers_7.q.bias" in places_of(tree, jl.peft.FLAX)

    def test_stacked_modules(self) -> None:
        w, scale = np.zeros((2, 4, 3)), np.zeros((2, 4))
        tree = {"params": {"layers": {"q": {"kernel": w}, "ln": {"scale": scale}}, "x": scale[0]}}
        layouts = {"params/layers/q/kernel": jl.Layout((2, 4, 3), (1,), (2,), (0,))}
        places = places_of(tree, flax_names(stacked=["layers"]), layouts)
        assert {name: place.index for name, place in places.items()} == {
            "layers.0.q.weight": (0,),
            "layers.1.q.weight": (1,),
            "layers.0.ln.weight": (0,),
            "layers.1.ln.weight": (1,),
            "x": (),
        }

    def test_a_module_of_flax(self) -> None:
        """Linen and NNX: the names of each are those of the same module in torch."""
        nnx, nn = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")
        import jax

        class Net(nnx.Module):  # type: ignore[misc,name-defined]
            def __init__(self, rngs: Any) -> None:
                self.fc = nnx.Linear(3, 2, rngs=rngs)
                self.embed = nnx.Embed(5, 3, rngs=rngs)

        _, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
        assert set(places_of(state, jl.peft.FLAX)) == {"fc.weight", "fc.bias", "embed.weight"}
        layer = nn.Dense(2, name="fc")
        tree = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3)))
        tree = {"params": {"block_4": tree["params"]}}
        names = set(places_of(tree, flax_names(numbered=["block"])))
        assert names == {"block.4.weight", "block.4.bias"}
