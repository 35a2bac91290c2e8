"""Flax NNX: `nnx.split` gives the parameters, `nnx.merge` inside the function the module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

nnx = pytest.importorskip("flax.nnx")


class Perceptron(nnx.Module):
    def __init__(self, rngs: Any):
        self.up, self.down = nnx.Linear(7, 8, rngs=rngs), nnx.Linear(8, 7, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(nnx.gelu(self.up(x)))


class Attention(nnx.Module):
    """Attention, a linear layer and batch normalisation over its state."""

    def __init__(self, rngs: Any):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm, self.head = nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.norm(x + self.attention(x)))


class Convolutional(nnx.Module):
    def __init__(self, rngs: Any):
        self.conv = nnx.Conv(3, 6, (3,), strides=2, rngs=rngs)
        self.grouped = nnx.Conv(6, 9, (3,), feature_group_count=3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.grouped(nnx.relu(self.conv(x)))


class Scanned(nnx.Module):
    """Layers in a rematerialised scan: NNX carries the weights in and out of the loop."""

    def __init__(self, rngs: Any):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: Any) -> Perceptron:
            return Perceptron(rngs)

        self.layers = make(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x: Any, layer: Perceptron) -> Any:
            return layer(x)

        return forward(x, self.layers)


def _split(model: Any) -> tuple[Any, Any]:
    """The function of the parameters alone, whose other state it closes over, and them."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fun(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest)(x)

    return fun, params


def test_perceptron(normal: Any, check_model: Any, factored: Any) -> None:
    fun, params = _split(Perceptron(nnx.Rngs(0)))
    sites = dict.fromkeys(_kernels(params), ())
    assert len(sites) == 2
    check_model(fun, params, normal(4, 7), sites=sites)


def test_convolutions(normal: Any, check_model: Any) -> None:
    fun, params = _split(Convolutional(nnx.Rngs(0)))
    sites = dict.fromkeys(_kernels(params), ())
    assert len(sites) == 2
    check_model(fun, params, normal(5, 6, 3), sites=sites)


def test_attention_and_batch_statistics(normal: Any, check_model: Any) -> None:
    """The statistics that the adapted model updates come back with its output."""
    graph, params, rest = nnx.split(Attention(nnx.Rngs(0)), nnx.Param, ...)

    def fun(params: Any, rest: Any, x: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        out = model(x)
        return out, nnx.state(model, nnx.BatchStat)

    def everything(out: Any) -> Any:
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(out)])

    sites = dict.fromkeys(_kernels(params), ())
    assert len(sites) == 5
    x = normal(2, 5, 8)
    check_model(fun, params, rest, x, sites=sites, pick=everything, tol=3e-5)


def test_scan_over_layers(normal: Any, check_model: Any) -> None:
    fun, params = _split(Scanned(nnx.Rngs(0)))
    sites = dict.fromkeys(_kernels(params), ())
    adapter = check_model(fun, params, normal(4, 7), sites=sites)
    assert len(adapter) == 2
    assert {f.layout.stack_axes for f in adapter.values()} == {(0,)}


def _kernels(params: Any) -> list[str]:
    """The paths of all kernels; older versions of Flax end them with ``/value``."""
    paths = [
        jax.tree_util.keystr(key_path, simple=True, separator="/")
        for key_path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    return [path for path in paths if "kernel" in path]
