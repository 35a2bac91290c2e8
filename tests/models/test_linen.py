"""Flax linen: the model's code is not touched, `model.apply` is the function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

nn = pytest.importorskip("flax.linen")
KEY = jax.random.key(0)


class Block(nn.Module):
    """Pre-norm attention and a two-layer network."""

    width: int = 8

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(y)


_BLOCK = ["Dense_0/kernel", "Dense_1/kernel"]
_BLOCK += [f"MultiHeadDotProductAttention_0/{p}/kernel" for p in ("key", "out", "query", "value")]


class ScannedStack(nn.Module):
    """Layers in one scan, each rematerialised, their parameters stacked along ``axis``."""

    axis: int = 0
    remat: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scanned = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        return scanned(block(name="layers"), x, None)[0]


class Convolutional(nn.Module):
    """Strided, grouped, dilated and transposed convolutions."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(9, (3, 3), feature_group_count=3)(x))
        x = nn.relu(nn.Conv(4, (2, 2), kernel_dilation=2, padding="VALID")(x))
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x)
        return nn.ConvTranspose(5, (2, 2), transpose_kernel=True)(x).mean((1, 2))


class Einsums(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.DenseGeneral((2, 3))(x)
        x = nn.Einsum((2, 3, 5), "bhd,hdo->bho")(x)
        return nn.DenseGeneral(5, axis=(-2, -1))(x)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        embed = nn.Embed(11, 8)
        x = embed(ids)
        return embed.attend(x + nn.Dense(8)(jnp.tanh(x)))


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, learned positions, a block and a head."""

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(8, (4, 4), strides=4, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        x = Block(name="block")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm()(x)[:, 0])


class ResNet(nn.Module):
    """A residual block with batch normalisation, strided, with a projection beside it."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        def norm(x: Any, name: str) -> Any:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)(x)

        x = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False, name="stem")(x), "bn0"))
        y = nn.Conv(6, (3, 3), 2, use_bias=False, name="conv1")(x)
        y = nn.Conv(6, (3, 3), use_bias=False, name="conv2")(nn.relu(norm(y, "bn1")))
        x = nn.Conv(6, (1, 1), 2, use_bias=False, name="shortcut")(x)
        x = nn.relu(x + norm(y, "bn2"))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Ensemble(nn.Module):
    """Members side by side, each with parameters of its own."""

    shared_input: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if not self.shared_input:
            x = jnp.stack([x, 2 * x, -x])
        dense = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None if self.shared_input else 0,
            axis_size=3,
        )
        return dense(5, name="members")(x)


class ConvolutionalEnsemble(nn.Module):
    """Convolutions side by side, each of its own input: to JAX one convolution by groups."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        convolution = nn.vmap(
            nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
        )
        return convolution(5, (3, 3), name="members")(x)


class Changed(nn.Module):
    """Weights that the model changes before it multiplies with them."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        mask = jnp.asarray(np.arange(3 * 6 * 7).reshape(3, 6, 7) % 3 > 0, jnp.float32)
        x = nn.Conv(7, (3,), mask=mask, name="masked")(x)
        x = nn.WeightNorm(nn.Dense(9, name="normalised"))(x)[:, 0]
        cell = nn.OptimizedLSTMCell(5, name="cell")  # it concatenates the kernels of its gates
        return cell((x[:, :5], x[:, 4:]), x)[1]


IDS = np.array([[3, 0, 10], [7, 7, 1]], np.int32)
MODELS: dict[str, tuple[Any, Any, list[str]]] = {
    "dense": (nn.Dense(5), (4, 6), ["kernel"]),
    "dense general, einsum": (
        Einsums(),
        (7, 6),
        ["DenseGeneral_0/kernel", "DenseGeneral_1/kernel", "Einsum_0/kernel"],
    ),
    "convolutions": (
        Convolutional(),
        (7, 8, 8, 3),
        [f"{kind}_{k}/kernel" for kind, n in (("Conv", 3), ("ConvTranspose", 2)) for k in range(n)],
    ),
    "tied embedding": (Tied(), IDS, ["Dense_0/kernel", "Embed_0/embedding"]),
    "scanned and rematerialised": (ScannedStack(), (2, 3, 8), [f"layers/{p}" for p in _BLOCK]),
    "scanned along axis 1": (
        ScannedStack(axis=1, remat=False),
        (2, 3, 8),
        [f"layers/{p}" for p in _BLOCK],
    ),
    "rematerialised": (nn.remat(nn.Dense)(5), (4, 6), ["kernel"]),
    "vision transformer": (
        VisionTransformer(),
        (7, 8, 8, 3),
        [
            "head/kernel",
            "patches/kernel",
            *(f"block/{path}" for path in _BLOCK),
        ],
    ),
    "ensemble": (Ensemble(), (4, 7), ["members/kernel"]),
    "ensemble, an input each": (Ensemble(shared_input=False), (4, 7), ["members/kernel"]),
    "ensemble of convolutions": (ConvolutionalEnsemble(), (2, 3, 6, 6, 4), ["members/kernel"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, normal: Any, check_model: Any, factored: Any, drawn: Any) -> None:
    model, x, paths = MODELS[name]
    x = normal(*x) if isinstance(x, tuple) else jnp.asarray(x)
    variables = drawn(jax.eval_shape(lambda: model.init(KEY, x)))
    sites = factored(*(f"params/{path}" for path in paths))
    # A bias added to a small product may be fused into it with one rounding less.
    exact = name != "tied embedding"
    adapter = check_model(model.apply, variables, x, sites=sites, exact=exact)
    if name.startswith("scanned"):
        axis = 1 if name.endswith("1") else 0
        assert {f.layout.stack_axes for f in adapter.values()} == {(axis,)}
    if name == "ensemble, an input each":
        assert adapter["params/members/kernel"].layout.stack_axes == (0,)


def test_changed_weights(normal: Any, check_model: Any, drawn: Any) -> None:
    model, x = Changed(), normal(4, 3, 6)
    variables = drawn(jax.eval_shape(lambda: model.init(KEY, x)))
    gates = [f"{side}{gate}" for side in "hi" for gate in "figo"]
    sites = {f"params/cell/{gate}/kernel": ("concatenate",) for gate in gates}
    sites |= {"params/masked/kernel": ("mul",), "params/normalised/kernel": ("mul",)}
    check_model(model.apply, variables, x, sites=sites)


def test_lstm(normal: Any, check_model: Any, factored: Any, drawn: Any) -> None:
    """The weights are constants of the scan over time; the state's dtype is the input's."""
    model, xs = nn.RNN(nn.LSTMCell(5)), normal(2, 4, 3)
    state = (normal(2, 5), normal(2, 5, seed=3))
    variables = drawn(jax.eval_shape(lambda: model.init(KEY, xs)))

    def fun(variables: Any, xs: Any, state: Any) -> Any:
        return model.apply(variables, xs, initial_carry=state)

    gates = [f"{side}{gate}" for side, gate in zip("hhhhiiii", "figo" * 2, strict=True)]
    sites = factored(*(f"params/cell/{gate}/kernel" for gate in gates))
    check_model(fun, variables, xs, state, sites=sites)


def test_resnet(normal: Any, check_model: Any, factored: Any, drawn: Any) -> None:
    """Batch statistics are an argument, and those of the adapted model come back."""
    model, x = ResNet(), normal(7, 6, 6, 5)
    variables = drawn(jax.eval_shape(lambda: model.init(KEY, x, False)))

    def fun(params: Any, stats: Any, x: Any) -> Any:
        return model.apply(
            {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
        )

    def everything(out: Any) -> Any:
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(out)])

    params, stats = variables["params"], variables["batch_stats"]
    sites = factored(*(f"{name}/kernel" for name in ("stem", "conv1", "conv2", "shortcut", "head")))
    check_model(fun, params, stats, x, sites=sites, pick=everything, tol=5e-5, scale=0.1)


def test_dropout(normal: Any, planned: Any) -> None:
    """Dropout draws from the key that is passed: the same mask with and without an adapter."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            return nn.Dense(5)(nn.Dropout(0.3, deterministic=not train)(nn.Dense(8)(x)))

    model, x = Model(), normal(4, 6)
    variables = model.init(KEY, x, False)

    def fun(variables: Any, x: Any, key: Any) -> Any:
        return model.apply(variables, x, True, rngs={"dropout": key})

    adapter = planned(fun, variables, x, KEY)
    adapted = jax.jit(jl.apply(fun, strict=True))
    one, same, other = (adapted(variables, adapter, x, jax.random.key(k)) for k in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    # In float32: under another dtype other numbers would be drawn.
    want = jax.jit(fun)(jl.merge(variables, adapter), x, jax.random.key(3))
    np.testing.assert_allclose(one, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_other_methods(normal: Any, check_model: Any, factored: Any) -> None:
    class Model(nn.Module):
        def setup(self) -> None:
            self.encoder, self.decoder = nn.Dense(4), nn.Dense(6)

        def __call__(self, x: Any) -> Any:
            return self.decoder(self.encode(x))

        def encode(self, x: Any) -> Any:
            return jnp.tanh(self.encoder(x))

    model, x = Model(), normal(5, 6)
    variables = model.init(KEY, x)

    def encode(variables: Any, x: Any) -> Any:
        return model.apply(variables, x, method="encode")

    check_model(encode, variables, x, sites=factored("params/encoder/kernel"))
    # An adapter of the whole model serves its methods.
    plan = jl.plan(model.apply, variables, x, config=jl.LoraConfig(rank=2))
    adapter = jl.init(KEY, variables, plan)
    got = jl.apply(model.apply)(variables, adapter, x, method=Model.encode)
    np.testing.assert_array_equal(got, encode(variables, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any, normal: Any, filled: Any) -> None:
    """Parameters and arithmetic in half precision, factors in float32: one rounding an operation.

    The bound is 8 roundings to the dtype's precision of the size of the output.
    """
    model = nn.Dense(6, dtype=dtype, param_dtype=dtype)
    x = normal(4, 8).astype(dtype)
    variables = model.init(KEY, x)
    plan = jl.plan(model.apply, variables, x, config=jl.LoraConfig(rank=2))
    adapter = filled(jl.init(KEY, variables, plan), scale=0.1)
    got = jl.apply(model.apply, strict=True)(variables, adapter, x)
    assert got.dtype == dtype
    f = adapter["params/kernel"]
    assert f.a.dtype == jnp.float32
    kernel, bias, xs, a, b = (
        np.asarray(v).astype(np.float64)
        for v in (variables["params"]["kernel"], variables["params"]["bias"], x, f.a, f.b)
    )
    want = xs @ kernel + bias + float(f.scale) * (xs @ a) @ b
    bound = 8 * float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(
        np.asarray(got).astype(np.float64), want, rtol=0, atol=bound * np.abs(want).max()
    )
