"""What XLA makes of a factored gradient, counted beside the same model written by hand.

Each case is a model of arrays and its factored form as one would write it, ``x W + (x a) s b`` at
every product. Counted in the compiled gradient with respect to the adapter are floating-point
operations, bytes of temporaries, and operations of a weight's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl

Model = Callable[..., jax.Array]
# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its factored form, the shapes of its parameters, and its input.

    Attributes:
        model: ``(params, x)``.
        by_hand: ``(params, f, x)`` with the factors ``f[path].a``, ``.b`` and ``.scale``.
        shapes: Of the adapted weights.
        x: The input's shape, or the input.
    """

    model: Model
    by_hand: Model
    shapes: dict[str, tuple[int, ...]]
    x: Any


def _linear(x: jax.Array, w: jax.Array, f: Any) -> jax.Array:
    """``x W + (x a) s b``, the layer that all of the models below are made of."""
    return x @ w + (x @ f.a * f.scale) @ f.b


def _mlp(p: Any, x: Any) -> Any:
    return jax.nn.relu(jax.nn.relu(x @ p["l0"]) @ p["l1"]) @ p["l2"]


def _mlp_by_hand(p: Any, f: Any, x: Any) -> Any:
    x = jax.nn.relu(_linear(x, p["l0"], f["l0"]))
    x = jax.nn.relu(_linear(x, p["l1"], f["l1"]))
    return _linear(x, p["l2"], f["l2"])


def _stack(p: Any, x: Any) -> Any:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def _stack_by_hand(p: Any, f: Any, x: Any) -> Any:
    def layer(x: Any, step: Any) -> Any:
        w, a, b = step
        return jnp.tanh(x @ w + (x @ a * f["w"].scale) @ b), None

    return lax.scan(layer, x, (p["w"], f["w"].a, f["w"].b))[0]


def _heads(p: Any, x: Any) -> Any:
    y = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, p["split"]))
    return jnp.einsum("bhk,hkd->bd", y, p["join"])


def _heads_by_hand(p: Any, f: Any, x: Any) -> Any:
    s, j = f["split"], f["join"]
    y = jnp.einsum("bd,dhk->bhk", x, p["split"])
    y = jnp.tanh(y + jnp.einsum("br,rhk->bhk", x @ s.a * s.scale, s.b))
    hidden = jnp.einsum("bhk,hkr->br", y, j.a) * j.scale
    return jnp.einsum("bhk,hkd->bd", y, p["join"]) + hidden @ j.b


_CONV: dict[str, Any] = {
    "window_strides": (2, 2),
    "padding": "SAME",
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
}


def _convolution(p: Any, x: Any) -> Any:
    x = jax.nn.relu(lax.conv_general_dilated(x, p["c0"], **_CONV))
    return lax.conv_general_dilated(x, p["c1"], **_CONV)


def _convolution_by_hand(p: Any, f: Any, x: Any) -> Any:
    def conv(x: Any, name: str) -> Any:
        hidden = lax.conv_general_dilated(x, f[name].a, **_CONV) * f[name].scale
        pixel = {**_CONV, "window_strides": (1, 1)}
        update = lax.conv_general_dilated(hidden, f[name].b[None, None], **pixel)
        return lax.conv_general_dilated(x, p[name], **_CONV) + update

    return conv(jax.nn.relu(conv(x, "c0")), "c1")


def _grouped(p: Any, x: Any) -> Any:
    return lax.conv_general_dilated(jnp.tanh(x @ p["w"]), p["c"], **_CONV, feature_group_count=4)


def _grouped_by_hand(p: Any, f: Any, x: Any) -> Any:
    """Every group has the first factor as its kernel, and its own columns of the second."""
    x = jnp.tanh(_linear(x, p["w"], f["w"]))
    a, b, scale = f["c"].a, f["c"].b, f["c"].scale
    kernel = jnp.concatenate([a] * 4, axis=-1)
    hidden = lax.conv_general_dilated(x, kernel, **_CONV, feature_group_count=4) * scale
    hidden = hidden.reshape(*hidden.shape[:-1], 4, -1)
    update = jnp.einsum("...gr,rgo->...go", hidden, b.reshape(-1, 4, b.shape[-1] // 4))
    out = lax.conv_general_dilated(x, p["c"], **_CONV, feature_group_count=4)
    return out + update.reshape(out.shape)


def _tied(p: Any, ids: Any) -> Any:
    x = p["table"][ids]
    return (x + jnp.tanh(x @ p["w"])) @ p["table"].T


def _tied_by_hand(p: Any, f: Any, ids: Any) -> Any:
    t = f["table"]
    x = p["table"][ids] + (t.a[ids] * t.scale) @ t.b
    x = x + jnp.tanh(_linear(x, p["w"], f["w"]))
    return x @ p["table"].T + (x @ t.b.T * t.scale) @ t.a.T


def _normed(x: Any) -> Any:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(1e-6))


def _attend(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * jnp.float32(q.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def _split_heads(x: Any) -> Any:
    return x.reshape(*x.shape[:-1], 2, -1)


def _block(p: Any, x: Any) -> Any:
    y = _normed(x)
    y = _attend(*(_split_heads(y @ p[name]) for name in "qkv"))
    x = x + y.reshape(x.shape) @ p["o"]
    return x + jax.nn.gelu(_normed(x) @ p["up"]) @ p["down"]


def _block_by_hand(p: Any, f: Any, x: Any) -> Any:
    y = _normed(x)
    y = _attend(*(_split_heads(_linear(y, p[name], f[name])) for name in "qkv"))
    x = x + _linear(y.reshape(x.shape), p["o"], f["o"])
    return x + _linear(jax.nn.gelu(_linear(_normed(x), p["up"], f["up"])), p["down"], f["down"])


def _scanned_blocks(p: Any, x: Any) -> Any:
    block = jax.checkpoint(_block, prevent_cse=False)
    return lax.scan(lambda x, layer: (block(layer, x), None), x, p)[0]


def _scanned_blocks_by_hand(p: Any, f: Any, x: Any) -> Any:
    block = jax.checkpoint(_block_by_hand, prevent_cse=False)

    def layer(x: Any, step: Any) -> Any:
        p, factors = step
        f = {name: _Factors(*ab, scales[name]) for name, ab in factors.items()}
        return block(p, f, x), None

    scales = {name: f[name].scale for name in p}
    return lax.scan(layer, x, (p, {name: (f[name].a, f[name].b) for name in p}))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Factors:
    a: Any
    b: Any
    scale: Any


def _experts(p: Any, x: Any) -> Any:
    hidden = jax.nn.silu(jnp.einsum("ebd,edf->ebf", x, p["up"]))
    return jnp.einsum("ebf,efd->ebd", hidden, p["down"])


def _experts_by_hand(p: Any, f: Any, x: Any) -> Any:
    # A product with a stack of matrices is a product for each expert.
    return _linear(jax.nn.silu(_linear(x, p["up"], f["up"])), p["down"], f["down"])


def _sizes() -> Any:
    return jnp.array([17, 0, 15], jnp.int32)


def _ragged(p: Any, x: Any) -> Any:
    return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], _sizes())), p["down"], _sizes())


def _ragged_by_hand(p: Any, f: Any, x: Any) -> Any:
    def experts(x: Any, name: str) -> Any:
        hidden = lax.ragged_dot(x, f[name].a, _sizes()) * f[name].scale
        return lax.ragged_dot(x, p[name], _sizes()) + lax.ragged_dot(hidden, f[name].b, _sizes())

    return experts(jnp.tanh(experts(x, "up")), "down")


def _gates(y: Any, state: Any) -> Any:
    i, g, f, o = jnp.split(y, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def _lstm(p: Any, xs: Any) -> Any:
    def step(state: Any, x: Any) -> Any:
        return _gates(x @ p["ih"] + state[0] @ p["hh"], state), None

    zero = jnp.zeros((xs.shape[1], p["hh"].shape[0]), xs.dtype)
    return lax.scan(step, (zero, zero), xs)[0][0]


def _lstm_by_hand(p: Any, f: Any, xs: Any) -> Any:
    def step(state: Any, x: Any) -> Any:
        y = _linear(x, p["ih"], f["ih"]) + _linear(state[0], p["hh"], f["hh"])
        return _gates(y, state), None

    zero = jnp.zeros((xs.shape[1], p["hh"].shape[0]), xs.dtype)
    return lax.scan(step, (zero, zero), xs)[0][0]


_BLOCK = {**dict.fromkeys("qkvo", (24, 24)), "up": (24, 48), "down": (48, 24)}
CASES = {
    "mlp": Case(_mlp, _mlp_by_hand, {"l0": (96, 128), "l1": (128, 80), "l2": (80, 40)}, (21, 96)),
    "scanned layers": Case(_stack, _stack_by_hand, {"w": (5, 48, 48)}, (21, 48)),
    "einsum with heads": Case(
        _heads, _heads_by_hand, {"split": (48, 3, 20), "join": (3, 20, 32)}, (21, 48)
    ),
    "convolutions": Case(
        _convolution,
        _convolution_by_hand,
        {"c0": (3, 3, 8, 24), "c1": (3, 3, 24, 16)},
        (7, 8, 8, 8),
    ),
    "grouped convolution": Case(
        _grouped, _grouped_by_hand, {"w": (24, 24), "c": (3, 3, 6, 16)}, (7, 8, 8, 24)
    ),
    "embedding and tied head": Case(
        _tied,
        _tied_by_hand,
        {"table": (90, 32), "w": (32, 32)},
        np.arange(35).reshape(7, 5) * 17 % 90,
    ),
    "transformer block": Case(_block, _block_by_hand, _BLOCK, (7, 11, 24)),
    "scanned and rematerialised blocks": Case(
        _scanned_blocks,
        _scanned_blocks_by_hand,
        {name: (3, *shape) for name, shape in _BLOCK.items()},
        (7, 11, 24),
    ),
    "experts by einsum": Case(
        _experts, _experts_by_hand, {"up": (3, 24, 48), "down": (3, 48, 24)}, (3, 21, 24)
    ),
    "experts by ragged_dot": Case(
        _ragged, _ragged_by_hand, {"up": (3, 24, 48), "down": (3, 48, 24)}, (32, 24)
    ),
    "lstm": Case(_lstm, _lstm_by_hand, {"ih": (24, 128), "hh": (32, 128)}, (5, 7, 24)),
}


def _compiled_gradient(fun: Model, params: Any, adapter: Any, x: Any) -> Any:
    """The gradient with respect to the adapter; the base is an argument."""
    loss = jax.grad(lambda adapter, params, x: (fun(params, adapter, x) ** 2).sum())
    return jax.jit(loss, compiler_options=QUICK).lower(adapter, params, x).compile()


def _flops(program: Any) -> float:
    return float(program.cost_analysis()["flops"])


def _temporaries(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


# Where W + scale * a b, not the activations, is what takes the memory.
_MOSTLY_WEIGHTS = {"mlp", "scanned layers", "einsum with heads", "lstm"}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_costs_what_the_hand_written_one_costs(
    name: str, normal: Any, filled: Any, weight_ops: Any
) -> None:
    case = CASES[name]
    params = {path: normal(*s) / np.float32(np.sqrt(s[-2])) for path, s in case.shapes.items()}
    x = normal(*case.x) if isinstance(case.x, tuple) else jnp.asarray(case.x)
    plan = jl.plan(case.model, params, x, config=jl.LoraConfig(rank=2, targets="**"))
    adapter = filled(jl.init(jax.random.key(0), params, plan), scale=0.3)
    layouts = [f.layout for f in adapter.values()]
    ours, hand, dense = (
        _compiled_gradient(fun, params, adapter, x)
        for fun in (
            jl.apply(case.model, strict=True),
            case.by_hand,
            lambda params, adapter, x: case.model(jl.merge(params, adapter), x),
        )
    )
    # What is written by hand is the same function.
    gradients = (jax.tree.leaves(program(adapter, params, x)) for program in (ours, hand))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())

    assert not weight_ops(ours, layouts)
    assert not weight_ops(hand, layouts)
    assert _flops(ours) == pytest.approx(_flops(hand), rel=0.01)
    assert _temporaries(ours) <= _temporaries(hand)
    # Negative controls: W + scale * a b in the loss.
    assert weight_ops(dense, layouts).total() >= 2 * len(adapter)
    assert _flops(dense) > 1.05 * _flops(hand)
    if name in _MOSTLY_WEIGHTS:
        assert _temporaries(dense) > 1.4 * _temporaries(hand)


def test_a_linen_model_costs_what_its_layers_with_lora_inside_cost(
    normal: Any, filled: Any, weight_ops: Any
) -> None:
    """Layers in a rematerialised scan, as a model whose own layers hold the factors."""
    nn = pytest.importorskip("flax.linen")

    class LoraDense(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            zeros = nn.initializers.zeros
            kernel = self.param("kernel", zeros, (x.shape[-1], self.features))
            bias = self.param("bias", zeros, (self.features,))
            a = self.variable("lora", "a", jnp.zeros, (x.shape[-1], 2)).value
            b = self.variable("lora", "b", jnp.zeros, (2, self.features)).value
            scale = self.variable("scale", "scale", jnp.ones, ()).value
            return x @ kernel + (x @ a * scale) @ b + bias

    class Block(nn.Module):
        dense: Any

        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            hidden = nn.gelu(self.dense(48, name="up")(nn.LayerNorm(name="norm")(x)))
            return x + self.dense(24, name="down")(hidden), None

    class Stack(nn.Module):
        dense: Any = nn.Dense

        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0, "lora": 0},
                variable_broadcast="scale",
                split_rngs={"params": True},
                length=3,
            )
            return scan(self.dense, name="layers")(x, None)[0]

    x = normal(7, 11, 24)
    shapes = jax.eval_shape(Stack().init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / 5, shapes)
    plan = jl.plan(Stack().apply, params, x, config=jl.LoraConfig(rank=2))
    adapter = filled(jl.init(jax.random.key(0), params, plan), scale=0.3)
    layers = {name: adapter[f"params/layers/{name}/kernel"] for name in ("up", "down")}
    factors = {
        "lora": {"layers": {name: {"a": f.a, "b": f.b} for name, f in layers.items()}},
        "scale": {"layers": {name: {"scale": f.scale} for name, f in layers.items()}},
    }

    def by_hand(params: Any, factors: Any, x: Any) -> Any:
        return Stack(LoraDense).apply({**params, **factors}, x)

    ours = _compiled_gradient(jl.apply(Stack().apply, strict=True), params, adapter, x)
    hand = _compiled_gradient(by_hand, params, factors, x)
    got, want = ours(adapter, params, x), hand(factors, params, x)
    for name, own in want["lora"]["layers"].items():
        found = got[f"params/layers/{name}/kernel"]
        np.testing.assert_allclose(found.a, own["a"], rtol=0, atol=2e-5 * np.abs(own["a"]).max())
        np.testing.assert_allclose(found.b, own["b"], rtol=0, atol=2e-5 * np.abs(own["b"]).max())
    assert not weight_ops(ours, [f.layout for f in adapter.values()])
    assert _flops(ours) == pytest.approx(_flops(hand), rel=0.01)
    assert _temporaries(ours) <= _temporaries(hand)


def test_an_nnx_model_costs_what_flax_s_own_lora_costs(
    normal: Any, filled: Any, weight_ops: Any
) -> None:
    """Beside `nnx.LoRA`, which has no scale, so that here it is the constant 1."""
    nnx = pytest.importorskip("flax.nnx")

    class Perceptron(nnx.Module):
        def __init__(self, lora: bool):
            rngs = nnx.Rngs(0)

            def linear(n: int, m: int) -> Any:
                base = nnx.Linear(n, m, rngs=rngs)
                return nnx.LoRA(n, 2, m, base_module=base, rngs=nnx.Rngs(1)) if lora else base

            self.up, self.mid, self.down = linear(96, 128), linear(128, 80), linear(80, 40)

        def __call__(self, x: Any) -> Any:
            return self.down(nnx.relu(self.mid(nnx.relu(self.up(x)))))

    x = normal(21, 96)
    graph, params = nnx.split(Perceptron(lora=False), nnx.Param)
    plan = jl.plan(
        fun := lambda params, x: nnx.merge(graph, params)(x),
        params,
        x,
        config=jl.LoraConfig(rank=2),
    )
    adapter = filled(jl.init(jax.random.key(0), params, plan), scale=1.0)
    ab = {path: (f.a, f.b) for path, f in adapter.items()}

    def factor(ab: dict[str, tuple[Any, Any]], key_path: Any) -> Any:
        """Which of our arrays one of Flax's is: its path is ``up/lora_a``, and then ``value``."""
        layer, name, *_ = jax.tree_util.keystr(key_path, simple=True, separator="/").split("/")
        (path,) = (path for path in ab if path.startswith(layer))
        return ab[path][("lora_a", "lora_b").index(name)]

    lora_graph, drawn, base = nnx.split(Perceptron(lora=True), nnx.LoRAParam, ...)
    factors = jax.tree_util.tree_map_with_path(lambda path, _: factor(ab, path), drawn)

    def by_hand(base: Any, factors: Any, x: Any) -> Any:
        return nnx.merge(lora_graph, factors, base)(x)

    def by_us(params: Any, ab: dict[str, tuple[Any, Any]], x: Any) -> Any:
        entries = {
            path: jl.LoraFactors(*ab[path], jnp.float32(1), f.layout) for path, f in adapter.items()
        }
        return jl.apply(fun, strict=True)(params, jl.Adapter(entries), x)

    ours = _compiled_gradient(by_us, params, ab, x)
    hand = _compiled_gradient(by_hand, base, factors, x)
    got, want = ours(ab, params, x), hand(factors, base, x)
    for key_path, value in jax.tree_util.tree_leaves_with_path(want):
        found = factor(got, key_path)
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * np.abs(value).max())
    assert not weight_ops(ours, [f.layout for f in adapter.values()])
    assert _flops(ours) == pytest.approx(_flops(hand), rel=0.01)
    assert _temporaries(ours) <= _temporaries(hand)
