"""EVA and LoRA-GA find the singular vectors that numpy finds, of what they never form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.from_data import principal_gradients, principal_inputs

RANK = 3
#: A model, its parameters, batches, and the inputs of each weight by numpy: ``[*stack][rows, in]``.
Case = tuple[Callable[..., Any], Any, list[Any], dict[str, Any]]


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([11, *seed])


def _spectral(*shape: int, seed: int = 0, decay: float = 0.7) -> jax.Array:
    """Rows whose singular values fall by about ``decay``, in random directions."""
    rng = _rng(seed, *shape)
    n = shape[-1]
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    rows = rng.normal(size=shape) * decay ** np.arange(n)
    return jnp.asarray(rows @ rotation, jnp.float32)


def _weight(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(_rng(seed, *shape).normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


def _64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def mlp() -> Case:
    params = {"l1": _weight(24, 20), "l2": _weight(20, 18, seed=1)}
    batches = [_spectral(40, 24), _spectral(30, 24, seed=1)]

    def model(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["l1"]) @ params["l2"]

    x = np.concatenate([_64(b) for b in batches])
    return model, params, batches, {"l1": x, "l2": np.tanh(x @ _64(params["l1"]))}


def _stack_inputs(w: Any, x: np.ndarray) -> list[np.ndarray]:
    inputs = []
    for layer in _64(w):
        inputs.append(x)
        x = np.tanh(x @ layer)
    return inputs


def scanned(wrap: Callable[..., Any] = lambda step: step) -> Case:
    params = {"w": _weight(3, 16, 16)}
    batches = [_spectral(50, 16, seed=2), _spectral(50, 16, seed=3)]

    def model(params: Any, x: Any) -> Any:
        return lax.scan(wrap(lambda h, w: (jnp.tanh(h @ w), None)), x, params["w"])[0]

    x = np.concatenate([_64(b) for b in batches])
    return model, params, batches, {"w": _stack_inputs(params["w"], x)}


def remat() -> Case:
    return scanned(jax.checkpoint)


def jitted() -> Case:
    return scanned(jax.jit)


def indexed() -> Case:
    model, params, batches, inputs = scanned()

    def fun(params: Any, x: Any) -> Any:
        def step(k: Any, h: Any) -> Any:
            return jnp.tanh(h @ params["w"][k])

        return lax.fori_loop(0, 3, step, x)

    return fun, params, batches, inputs


def rows_of_vectors() -> Case:
    model, params, batches, inputs = mlp()
    return jax.vmap(model, in_axes=(None, 0)), params, batches, inputs


def einsum() -> Case:
    params = {"qkv": _weight(24, 4, 6), "out": _weight(4, 6, 10, seed=1)}
    batches = [_spectral(3, 20, 24)]

    def model(params: Any, x: Any) -> Any:
        heads = jnp.einsum("bld,dhk->blhk", x, params["qkv"])
        return jnp.einsum("blhk,hkd->bld", jnp.tanh(heads), params["out"])

    x = _64(batches[0]).reshape(60, 24)
    hidden = np.tanh(x @ _64(params["qkv"]).reshape(24, 24))
    return model, params, batches, {"qkv": x, "out": hidden}


def transposed_and_shared() -> Case:
    """A weight ``[out, in]``, used twice; in between it is used the other way round."""
    params = {"w": _weight(18, 20)}
    batches = [_spectral(40, 20)]

    def model(params: Any, x: Any) -> Any:
        w = params["w"]
        once = x @ w.T
        back = jnp.tanh(once) @ w
        return once + back @ w.T

    x, w = _64(batches[0]), _64(params["w"])
    back = np.tanh(x @ w.T) @ w
    return model, params, batches, {"w": np.concatenate([x, back])}


def _patches(x: np.ndarray, window: tuple[int, int], stride: int, padding: int) -> np.ndarray:
    """``[rows, window x channels]`` of ``[n, height, width, channels]``."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = []
    for i in range(0, x.shape[1] - window[0] + 1, stride):
        for j in range(0, x.shape[2] - window[1] + 1, stride):
            rows.append(x[:, i : i + window[0], j : j + window[1]].reshape(len(x), -1))
    return np.concatenate(rows)


def conv() -> Case:
    params = {"k": _weight(3, 2, 4, 5)}
    batches = [_spectral(4, 9, 8, 4, decay=0.5), _spectral(2, 9, 8, 4, decay=0.5, seed=1)]

    def model(params: Any, x: Any) -> Any:
        return lax.conv_general_dilated(
            x, params["k"], (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = np.concatenate([_64(b) for b in batches])
    return model, params, batches, {"k": _patches(x, (3, 2), 2, 1)}


def grouped_conv() -> Case:
    """Two groups of channels share the columns of ``a``, so both groups' patches are inputs."""
    params = {"k": _weight(3, 3, 3, 8)}
    batches = [_spectral(6, 7, 7, 6, decay=0.6)]

    def model(params: Any, x: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            params["k"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    x = _64(batches[0])
    both = [_patches(part, (3, 3), 1, 0) for part in (x[..., :3], x[..., 3:])]
    return model, params, batches, {"k": np.concatenate(both)}


def experts() -> Case:
    params = {"w": _weight(3, 20, 18)}
    x = _spectral(60, 20)
    sizes = jnp.array([25, 15, 18], jnp.int32)  # two rows belong to no expert

    def model(params: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot(x, params["w"], sizes)

    rows = _64(x)
    return model, params, [(x, sizes)], {"w": [rows[:25], rows[25:40], rows[40:58]]}


CASES = {
    f.__name__: f
    for f in (
        *(mlp, scanned, remat, jitted, indexed, rows_of_vectors, einsum, transposed_and_shared),
        *(conv, grouped_conv, experts),
    )
}


def _planned(case: Case, **settings: Any) -> tuple[Any, ...]:
    model, params, batches, inputs = case
    args = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    settings = {"rank": RANK, "targets": "**", **settings}
    plan = jl.plan(model, params, *args, config=jl.LoraConfig(**settings))
    return model, params, plan, batches, inputs


def _matrices(x: Any, layout: jl.Layout, width: int) -> np.ndarray:
    """``[matrices, rows, width]`` or, for a last axis of its own, flattened over the stack."""
    return _64(x).reshape(int(np.prod(layout.stack, dtype=int)), -1, width)


def _stacked(inputs: Any) -> list[np.ndarray]:
    return inputs if isinstance(inputs, list) else [inputs]


class TestEva:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_is_numpy_s_svd_of_the_inputs(self, case: Callable[[], Case]) -> None:
        model, params, plan, batches, inputs = _planned(case())
        # Neighbouring singular values of patches are closer.
        passes = 24 if "conv" in case.__name__ else 8
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, batches, passes=passes)
        layouts = {path: target.layout for path, target in plan.targets.items()}
        counts = dict.fromkeys(inputs, RANK)
        found = principal_inputs(
            jax.random.key(1), model, params, layouts, counts, batches, passes
        )
        assert set(adapter) == set(inputs)
        for path, entry in adapter.items():
            assert not np.asarray(entry.b).any()
            columns = _matrices(entry.a, entry.layout, RANK)
            values = _64(found[path].singular_values).reshape(-1, RANK)
            wanted = _stacked(inputs[path])
            assert len(columns) == len(wanted)
            for a, s, x in zip(columns, values, wanted, strict=True):
                _, s_64, vt = np.linalg.svd(x, full_matrices=False)
                assert s_64[RANK] < 0.93 * s_64[RANK - 1]  # a gap, or there is nothing to find
                np.testing.assert_allclose(s, s_64[:RANK], rtol=1e-4)
                np.testing.assert_allclose(a.T @ a, np.eye(RANK), rtol=0, atol=1e-5)
                v = vt[:RANK].T
                assert np.linalg.norm(a - v @ (v.T @ a), 2) < 1e-4  # the sine of the largest angle

    def test_order_and_negative_control(self) -> None:
        """The columns are the singular vectors one by one; a random start is nowhere near."""
        model, params, plan, batches, inputs = _planned(mlp())
        eva = jl.init_eva(jax.random.key(0), model, params, plan, batches)["l1"].a
        v = np.linalg.svd(inputs["l1"])[2][:RANK].T
        np.testing.assert_allclose(np.abs(v.T @ _64(eva)), np.eye(RANK), rtol=0, atol=1e-4)
        random = np.linalg.qr(_64(jl.init(jax.random.key(0), params, plan)["l1"].a))[0]
        assert np.linalg.norm(random - v @ (v.T @ random), 2) > 0.5
