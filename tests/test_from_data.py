"""EVA and LoRA-GA find the singular vectors that numpy finds, of what they never form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.from_data import (
    _from_inputs,
    _gram,
    input_energies,
    principal_gradients,
    principal_inputs,
)

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # older versions
    from jax.experimental import enable_x64

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
    _, params, batches, inputs = scanned()

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
    batches = [_spectral(6, 7, 7, 6, decay=0.5, seed=1)]

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
    def test_the_energy_is_that_of_all_inputs(self, case: Callable[[], Case]) -> None:
        model, params, plan, batches, inputs = _planned(case())
        layouts = {path: target.layout for path, target in plan.targets.items()}
        found = input_energies(model, params, layouts, batches)
        for path, wanted in inputs.items():
            energies = [(x**2).sum() for x in _stacked(wanted)]
            np.testing.assert_allclose(np.ravel(found[path]), energies, rtol=1e-5)

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_is_numpy_s_svd_of_the_inputs(self, case: Callable[[], Case]) -> None:
        model, params, plan, batches, inputs = _planned(case())
        # Neighbouring singular values of patches are closer.
        passes = 24 if "conv" in case.__name__ else 8
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, batches, passes=passes)
        layouts = {path: target.layout for path, target in plan.targets.items()}
        counts = dict.fromkeys(inputs, RANK)
        found = principal_inputs(jax.random.key(1), model, params, layouts, counts, batches, passes)
        assert set(adapter) == set(inputs)
        for path, entry in adapter.items():
            assert not np.asarray(entry.b).any()
            columns = _matrices(entry.a, entry.layout, RANK)
            wanted = _stacked(inputs[path])
            assert len(columns) == len(wanted)
            for a, x in zip(columns, wanted, strict=True):
                _, s_64, vt = np.linalg.svd(x, full_matrices=False)
                assert s_64[RANK] < 0.95 * s_64[RANK - 1]  # a gap, or there is nothing to find
                found = np.linalg.norm(x @ a, axis=0)
                np.testing.assert_allclose(found, s_64[:RANK], rtol=1e-4)
                np.testing.assert_allclose(a.T @ a, np.eye(RANK), rtol=0, atol=1e-5)
                v = vt[:RANK].T
                assert np.linalg.norm(a - v @ (v.T @ a), 2) < 1e-4  # the sine of the largest angle

    def test_order_and_negative_control(self) -> None:
        """The columns are the singular vectors one by one; a random start is nowhere near."""
        model, params, plan, batches, inputs = _planned(mlp())
        eva = jl.init_eva(jax.random.key(0), model, params, plan, batches)["l1"].a
        v = np.linalg.svd(inputs["l1"])[2][:RANK].T
        np.testing.assert_allclose(np.abs(v.T @ _64(eva)), np.eye(RANK), rtol=0, atol=1e-4)
        found = principal_inputs(
            jax.random.key(0),
            model,
            params,
            {path: target.layout for path, target in plan.targets.items()},
            {"l1": RANK, "l2": 99},
            batches,
        )
        assert found["l2"].directions.shape == (20, 20)  # all that there are
        for path, n in (("l1", RANK), ("l2", 8)):
            s = np.linalg.svd(inputs[path])[1]
            np.testing.assert_allclose(found[path].singular_values[:n], s[:n], rtol=1e-4)
        random = np.linalg.qr(_64(jl.init(jax.random.key(0), params, plan)["l1"].a))[0]
        assert np.linalg.norm(random - v @ (v.T @ random), 2) > 0.5

    def test_keys_come_from_paths(self) -> None:
        """Another weight beside it changes nothing: with a key in common it would be another."""
        model, params, plan, batches, _ = _planned(mlp())
        both = jl.init_eva(jax.random.key(0), model, params, plan, batches)
        alone = jl.plan(model, params, batches[0], config=jl.LoraConfig(rank=RANK, targets="l2"))
        one = jl.init_eva(jax.random.key(0), model, params, alone, batches)
        np.testing.assert_allclose(one["l2"].a, both["l2"].a, rtol=0, atol=1e-5)

    def test_the_start_is_the_base_bit_for_bit(self) -> None:
        model, params, plan, batches, _ = _planned(mlp())
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, batches)
        run = jax.jit(jl.apply(model))(params, adapter, batches[0])
        np.testing.assert_array_equal(run, jax.jit(model)(params, batches[0]))

    def test_more_columns_than_inputs_are_random_ones(self, normal: Any) -> None:
        params, x = {"w": normal(4, 9), "v": normal(9, 9)}, normal(20, 4)

        def model(params: Any, x: Any) -> Any:
            return jnp.tanh(x @ params["w"]) @ params["v"]

        plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=6))
        a = _64(jl.init_eva(jax.random.key(0), model, params, plan, [x])["w"].a)
        np.testing.assert_allclose(a[:, :4].T @ a[:, :4], np.eye(4), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(
            a[:, 4:], jl.init(jax.random.key(0), params, plan)["w"].a[:, 4:]
        )

    def test_experts_without_rows_start_orthonormal(self) -> None:
        model, params, plan, [(x, _)], _ = _planned(experts())
        batches = [(x, jnp.array([30, 0, 30], jnp.int32))]
        a = _64(jl.init_eva(jax.random.key(0), model, params, plan, batches)["w"].a)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a[1].T @ a[1], np.eye(RANK), rtol=0, atol=1e-5)

    def test_in_bfloat16(self) -> None:
        """The products are those of bfloat16; the directions are as near as its 8 bits allow."""
        model, params, plan, batches, inputs = _planned(mlp(), dtype="bfloat16")
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batches))
        adapter = jl.init_eva(jax.random.key(0), model, narrow[0], plan, narrow[1])
        v = np.linalg.svd(inputs["l1"])[2][:RANK].T
        a = _64(adapter["l1"].a)
        assert adapter["l1"].a.dtype == adapter["l1"].b.dtype == jnp.bfloat16
        assert np.linalg.norm(a - v @ (v.T @ a), 2) < 10 * 2**-8

    def test_variants_keep_what_is_theirs(self, normal: Any) -> None:
        """`a` and `b` of those that have them; other kinds start as they do without data."""
        params = {name: normal(8, 8, seed=k) for k, name in enumerate(("d", "f", "p", "v", "w"))}
        x = normal(30, 8)

        def model(params: Any, x: Any) -> Any:
            for w in params.values():
                x = jnp.tanh(x @ w)
            return x

        targets = (
            *(jl.Rule("d", variant="dora"), jl.Rule("f", variant="lora-fa")),
            *(jl.Rule("p", init="pissa"), jl.Rule("v", variant="vera")),
            jl.Rule("w", variant="full"),
        )
        plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=2, targets=targets))
        fresh = jl.init(jax.random.key(0), params, plan)
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, [x])
        assert {path: type(e) for path, e in adapter.items()} == {
            p: type(e) for p, e in fresh.items()
        }
        for path in "dfp":
            entry = adapter[path]
            np.testing.assert_allclose(entry.a.T @ entry.a, np.eye(2), rtol=0, atol=1e-5)
            assert not np.asarray(entry.b).any()
            assert entry.a0 is None
        for path in "vw":
            jax.tree.map(np.testing.assert_array_equal, adapter[path], fresh[path])
        np.testing.assert_array_equal(adapter["d"].magnitude, fresh["d"].magnitude)
        # One operation after the other: compiled as a whole, XLA may fuse them in another order.
        np.testing.assert_array_equal(jl.apply(model)(params, adapter, x), model(params, x))

    def test_arguments_that_are_not_arrays(self) -> None:
        model, params, plan, batches, _ = _planned(mlp())

        def fun(params: Any, x: Any, how: str, twice: bool) -> Any:
            assert (how, twice) == ("plain", True)
            return model(params, x)

        tuples = [(x, "plain", True) for x in batches]
        plan = jl.plan(fun, params, *tuples[0], config=jl.LoraConfig(rank=RANK))
        one = jl.init_eva(jax.random.key(0), fun, params, plan, iter(tuples))
        other = jl.init_eva(jax.random.key(0), model, params, plan, batches)
        jax.tree.map(np.testing.assert_array_equal, one, other)

    def test_infinite_gradients_do_not_matter(self) -> None:
        """The gradient of a norm at zero is not a number; that of `a` does not depend on it."""
        model, params, plan, batches, _ = _planned(mlp())

        def fun(params: Any, x: Any) -> Any:
            out = model(params, x)
            return jnp.sqrt((out - out) ** 2)

        assert not np.isfinite(jax.grad(lambda p: fun(p, batches[0]).sum())(params)["l1"]).any()
        one = jl.init_eva(jax.random.key(0), fun, params, plan, batches)
        other = jl.init_eva(jax.random.key(0), model, params, plan, batches)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), one, other)

    def test_a_tied_head_is_initialised_from_what_the_head_sees(self, normal: Any) -> None:
        """The lookup of a tied embedding has no inputs, its product with hidden states has."""
        params = {"table": normal(30, 20), "w": normal(20, 20)}
        tokens = jnp.arange(25)

        def head_first(params: Any, tokens: Any) -> Any:
            h = _spectral(25, 20) @ params["table"].T  # so the table's in-axis is 1
            return h[:, :20] @ params["w"] + params["table"][tokens]

        plan = jl.plan(
            head_first, params, tokens, config=jl.LoraConfig(rank=RANK, targets=("table", "w"))
        )
        assert plan.targets["table"].layout.in_axes == (1,)
        a = _64(jl.init_eva(jax.random.key(0), head_first, params, plan, [tokens])["table"].a)
        v = np.linalg.svd(_64(_spectral(25, 20)))[2][:RANK].T
        assert np.linalg.norm(a - v @ (v.T @ a), 2) < 1e-4

    def test_refused(self, normal: Any) -> None:
        params = {"table": normal(30, 20), "w": normal(20, 20), "v": normal(20, 20)}
        tokens = jnp.arange(5)

        def model(params: Any, tokens: Any) -> Any:
            h = lax.stop_gradient(params["table"][tokens] @ params["w"])
            return h @ params["v"]

        config = jl.LoraConfig(rank=2, targets="**")
        plan = jl.plan(model, params, tokens, config=config)
        with pytest.raises(jl.TargetError, match=r"(?s)table\n  w\nLooked-up rows have no inputs"):
            jl.init_eva(jax.random.key(0), model, params, plan, [tokens])
        with pytest.raises(jl.ConfigError, match="at least one batch, got none"):
            jl.init_eva(jax.random.key(0), model, params, plan, [])
        for wrong in ({"passes": 1}, {"passes": 2.0}, {"oversample": -1}, {"rho": 0.5}):
            with pytest.raises(jl.ConfigError, match=f"expected {next(iter(wrong))} to be"):
                jl.init_eva(jax.random.key(0), model, params, plan, [tokens], **wrong)
        other = {**params, "v": normal(20, 21)}
        with pytest.raises(jl.AdapterError, match="not the planned parameters"):
            jl.init_eva(jax.random.key(0), model, other, plan, [tokens])
        whole = jl.LoraConfig(targets=jl.Rule("v", variant="full"))
        plan = jl.plan(model, params, tokens, config=whole)
        with pytest.raises(jl.TargetError, match="lora, lora-fa and dora"):
            jl.init_eva(jax.random.key(0), model, params, plan, [tokens])

    def test_keeps_no_inputs(self) -> None:
        """The memory of a step does not grow with the depth, as that of a gradient does."""

        def model(params: Any, x: Any) -> Any:
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

        def temporary(step: Callable[..., Any], depth: int) -> int:
            layout = jl.Layout((depth, 32, 32), (1,), (2,), (0,))
            params = {"w": jnp.zeros((depth, 32, 32))}
            a, x = {"w": jnp.zeros((depth, 32, 4))}, jnp.zeros((4096, 32))
            compiled = jax.jit(lambda p, x, a: step(model, {"w": layout}, p, (x,), a))
            stats = compiled.lower(params, x, a).compile().memory_analysis()
            return int(stats.temp_size_in_bytes)

        def gradient(model: Any, layouts: Any, params: Any, args: Any, a: Any) -> Any:
            return jax.grad(lambda p: model(p, *args).sum())(params)

        inputs = 4096 * 32 * 4  # the bytes of one layer's
        grown = {
            step: temporary(step, 12) - temporary(step, 4)
            for step in (functools.partial(_from_inputs, _gram), gradient)
        }
        of_inputs, of_gradient = grown.values()
        assert of_inputs < inputs
        assert of_gradient >= 8 * inputs


class TestRedistributedRanks:
    """Three weights: one that sees a few directions, a stack in between, one that sees many."""

    def case(self) -> tuple[Any, ...]:
        params = {"few": _weight(16, 16), "layers": _weight(2, 16, 16), "many": _weight(16, 16)}
        batch = {
            "few": _spectral(60, 16, decay=0.2),
            "layers": jnp.stack([_spectral(60, 16, decay=d) for d in (0.5, 0.6)]),
            "many": _spectral(60, 16, decay=0.8),
        }

        def model(params: Any, x: Any) -> Any:
            stacked = jnp.einsum("lni,lio->lno", x["layers"], params["layers"])
            return x["few"] @ params["few"], stacked, x["many"] @ params["many"]

        config = jl.LoraConfig(rank=2, targets="**")
        return model, params, jl.plan(model, params, batch, config=config), batch

    def wanted(self, batch: Any, rho: float) -> dict[str, int]:
        """The rule, by numpy: of all first `2 rho` shares the largest, as many as ranks."""
        candidates = []
        for path, x in batch.items():
            s = np.linalg.svd(_64(x), compute_uv=False).reshape(-1, 16)
            shares = (s**2 / (s**2).sum(-1, keepdims=True)).mean(0)[: int(2 * rho)]
            candidates += [(share, path) for share in shares]
        ranks, budget = dict.fromkeys(batch, 0), 2 + 2 * 2 + 2
        for _, path in sorted(candidates, reverse=True):
            cost = 2 if path == "layers" else 1
            if cost <= budget:
                ranks[path], budget = ranks[path] + 1, budget - cost
        return {path: rank for path, rank in ranks.items() if rank}

    @pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
    def test_are_those_that_explain_most(self, rho: float) -> None:
        model, params, plan, batch = self.case()
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, [batch], rho=rho)
        ranks = {path: entry.rank for path, entry in adapter.items()}
        assert ranks == self.wanted(batch, rho)
        assert (ranks == dict.fromkeys(batch, 2)) == (rho == 1)
        # Each has the first columns of what it had, zeros in b, and the plan's scale.
        same = jl.init_eva(jax.random.key(0), model, params, plan, [batch])
        for path, entry in adapter.items():
            assert entry.problems() == []
            assert float(entry.scale) == plan.targets[path].scale
            n = min(entry.rank, 2)
            inner = np.abs(np.sum(_64(entry.a * 1)[..., :n] * _64(same[path].a)[..., :n], axis=-2))
            np.testing.assert_allclose(inner, 1, rtol=0, atol=1e-4)

    def test_an_adapter_of_several_ranks_is_saved_and_restored(self, tmp_path: Any) -> None:
        model, params, plan, batch = self.case()
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, [batch], rho=2.0)
        jl.io.save_adapter(tmp_path / "adapter", adapter, plan.config)
        back, _, _ = jl.io.load_adapter(tmp_path / "adapter", params)
        jax.tree.map(np.testing.assert_array_equal, back, adapter)

    def test_a_weight_left_with_none_is_not_adapted(self) -> None:
        params = {"few": _weight(16, 16), "many": _weight(64, 16)}
        batch = {"few": _spectral(60, 16, decay=0.9), "many": _spectral(90, 64, decay=1.0)}

        def model(params: Any, x: Any) -> Any:
            return x["few"] @ params["few"], x["many"] @ params["many"]

        plan = jl.plan(model, params, batch, config=jl.LoraConfig(rank=2, targets="**"))
        adapter = jl.init_eva(jax.random.key(0), model, params, plan, [batch], rho=2.0)
        assert {path: entry.rank for path, entry in adapter.items()} == {"few": 4}


def _loss_of(case: Case) -> tuple[Any, ...]:
    """A regression on random targets; the gradient by float64, of the mean over the batches."""
    model, params, plan, batches, _ = _planned(case)
    model = case[0]

    def loss(params: Any, *args: Any) -> Any:
        out = model(params, *args)
        target = _rng(5).normal(size=out.shape)
        return ((out - jnp.asarray(target, out.dtype)) ** 2).mean()

    tuples = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    with enable_x64(True):

        def wide(x: Any) -> Any:
            return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

        of = [
            jax.grad(loss)(jax.tree.map(wide, params), *jax.tree.map(wide, args)) for args in tuples
        ]
        gradient = {path: np.mean([_64(g[path]) for g in of], axis=0) for path in params}
    return loss, params, plan, batches, gradient


def _matrices_of(gradient: np.ndarray, layout: jl.Layout) -> np.ndarray:
    return _64(layout.matrices(gradient)).reshape(-1, layout.fan_in, layout.fan_out)


class TestLoraGA:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_is_numpy_s_svd_of_the_gradient(self, case: Callable[[], Case]) -> None:
        loss, params, plan, batches, gradient = _loss_of(case())
        gamma, rank = 4.0, 2
        plan = dataclasses.replace(
            plan,
            targets={p: dataclasses.replace(t, rank=rank) for p, t in plan.targets.items()},
        )
        adapter = jl.init_lora_ga(
            jax.random.key(0), loss, params, plan, batches, gamma=gamma, passes=12
        )
        assert set(adapter) == set(gradient)
        for path, entry in adapter.items():
            layout = entry.layout
            c = layout.fan_out**0.25 / np.sqrt(gamma)
            all_a = _64(entry.a).reshape(-1, layout.fan_in, rank) / c
            all_b = _64(entry.b).reshape(-1, rank, layout.fan_out) / c
            for a, b, g in zip(all_a, all_b, _matrices_of(gradient[path], layout), strict=True):
                u, s, vt = np.linalg.svd(g, full_matrices=False)
                assert s[1] > 1.05 * s[2]
                assert s[3] > 1.05 * s[4]  # gaps, or there is nothing to find
                np.testing.assert_allclose(np.abs(u[:, :2].T @ a), np.eye(2), rtol=0, atol=1e-3)
                np.testing.assert_allclose(np.abs(vt[2:4] @ b.T), np.eye(2), rtol=0, atol=1e-3)

    def test_singular_values_and_products(self) -> None:
        loss, params, plan, batches, gradient = _loss_of(mlp())
        found = principal_gradients(
            jax.random.key(0),
            loss,
            params,
            {path: target.layout for path, target in plan.targets.items()},
            {"l1": 4, "l2": 99},
            batches,
            passes=12,
        )
        for path, (u, s, vt) in found.items():
            n = s.shape[-1]
            assert n == {"l1": 4, "l2": 18}[path]
            u64, s64, vt64 = np.linalg.svd(gradient[path], full_matrices=False)
            np.testing.assert_allclose(s[:4], s64[:4], rtol=1e-4)
            best = (u64[:, :n] * s64[:n]) @ vt64[:n]
            got = (_64(u) * _64(s)) @ _64(vt)
            assert np.linalg.norm(got - best) < 1e-4 * np.linalg.norm(best)

    def test_the_first_step_is_that_of_the_whole_weight(self) -> None:
        """Of rank 2r it is the best there is; a random start with b = 0 is far from it."""
        loss, params, _, batches, gradient = _loss_of(mlp())
        model = mlp()[0]
        config = jl.LoraConfig(rank=RANK, alpha=2.0, scaling="rslora", targets="**")
        plan = jl.plan(model, params, batches[0], config=config)
        start = jl.init_lora_ga(jax.random.key(0), loss, params, plan, batches, passes=12)
        random = jl.init(jax.random.key(0), params, plan)
        rate = 1e-3
        adapted = jl.apply(loss)

        def step(adapter: jl.Adapter) -> dict[str, np.ndarray]:
            of = [jax.grad(lambda a, x=x: adapted(params, a, x))(adapter) for x in batches]
            mean = jax.tree.map(lambda *g: sum(g[1:], g[0]) / len(g), *of)
            after = {
                path: dataclasses.replace(
                    e, a=e.a - rate * mean[path].a, b=e.b - rate * mean[path].b
                )
                for path, e in adapter.items()
            }
            return {p: _64(x) for p, x in jl.delta(jl.Adapter(after)).items()}

        s = 2.0 / np.sqrt(RANK)
        first, of_random = step(start), step(random)
        for path, g in gradient.items():
            u, sigma, vt = np.linalg.svd(g, full_matrices=False)
            best = (u[:, : 2 * RANK] * sigma[: 2 * RANK]) @ vt[: 2 * RANK]
            size = rate * s**2 * np.sqrt(g.shape[1]) / 16.0
            # The rest is of second order in the rate, and float32.
            error = np.linalg.norm(first[path] + size * best)
            assert error < 1e-2 * np.linalg.norm(size * best)

            def missed(update: np.ndarray, g: np.ndarray = g) -> float:
                """The least of |update + zeta G| / |zeta G|, over zeta: the sine of the angle."""
                cosine = -np.sum(update * g) / np.linalg.norm(update) / np.linalg.norm(g)
                return float(np.sqrt(max(1 - cosine**2, 0)))

            assert missed(first[path]) < missed(-best) + 1e-3
            assert missed(of_random[path]) > 3 * missed(first[path])

    def test_the_start_is_the_base_bit_for_bit(self) -> None:
        loss, params, plan, batches, _ = _loss_of(mlp())
        adapter = jl.init_lora_ga(jax.random.key(0), loss, params, plan, batches)
        for entry in adapter.values():
            assert np.asarray(entry.b).any()
            np.testing.assert_array_equal(entry.a, entry.a0)
            np.testing.assert_array_equal(entry.b, entry.b0)
        run = jax.jit(jl.apply(mlp()[0]))(params, adapter, batches[0])
        np.testing.assert_array_equal(run, jax.jit(mlp()[0])(params, batches[0]))

    @pytest.mark.parametrize("rank", [4, 8])
    def test_ranks_beyond_half_of_the_smaller_side(self, rank: int, normal: Any) -> None:
        """Of 6 singular vectors, rank 4 has the last 4 in `b`; rank 8 has all, and zeros."""
        params, x = {"w": normal(9, 6), "v": normal(6, 9)}, normal(20, 9)
        params["u"] = normal(9, 9)

        def loss(params: Any, x: Any) -> Any:
            return jnp.sin(x @ params["u"] @ params["w"] @ params["v"]).sum()

        plan = jl.plan(loss, params, x, config=jl.LoraConfig(rank=rank))
        u, _, vt = np.linalg.svd(_64(jax.grad(loss)(params, x)["w"]), full_matrices=False)
        entry = jl.init_lora_ga(jax.random.key(0), loss, params, plan, [x])["w"]
        c, k = 6**0.25 / 4, min(rank, 6)
        for got, wanted in ((_64(entry.a), u[:, :k]), (_64(entry.b).T, vt[6 - k :].T)):
            np.testing.assert_allclose(
                np.abs(wanted.T @ got[:, :k]), c * np.eye(k), rtol=0, atol=1e-3
            )
            assert not got[:, k:].any()

    def test_lookups_and_formed_weights_have_gradients_too(self, normal: Any) -> None:
        params = {"table": normal(30, 12), "w": normal(12, 12)}
        tokens = jnp.asarray(_rng(1).integers(0, 30, 40))

        def loss(params: Any, tokens: Any) -> Any:
            return (jnp.tanh(params["table"][tokens] @ jnp.sin(params["w"]))).sum()

        plan = jl.plan(loss, params, tokens, config=jl.LoraConfig(rank=RANK, targets="table"))
        entry = jl.init_lora_ga(jax.random.key(0), loss, params, plan, [tokens], passes=12)["table"]
        u, _, vt = np.linalg.svd(_64(jax.grad(loss)(params, tokens)["table"]), full_matrices=False)
        c = 12**0.25 / 4
        a, b = _64(entry.a) / c, _64(entry.b) / c
        assert np.linalg.norm(a - u[:, :RANK] @ (u[:, :RANK].T @ a), 2) < 1e-3
        v = vt[RANK : 2 * RANK].T
        assert np.linalg.norm(b.T - v @ (v.T @ b.T), 2) < 1e-3

    def test_variants_and_dtypes(self, normal: Any) -> None:
        params = {name: normal(10, 10, seed=k) for k, name in enumerate(("d", "f", "v"))}
        x = normal(30, 10)

        def loss(params: Any, x: Any) -> Any:
            for w in params.values():
                x = jnp.tanh(x @ w)
            return x.sum()

        targets = (
            *(jl.Rule("d", variant="dora"), jl.Rule("f", variant="lora-fa")),
            jl.Rule("v", variant="vera"),
        )
        config = jl.LoraConfig(rank=2, targets=targets, dtype="bfloat16")
        plan = jl.plan(loss, params, x, config=config)
        fresh = jl.init(jax.random.key(0), params, plan)
        adapter = jl.init_lora_ga(jax.random.key(0), loss, params, plan, [x])
        assert {p: type(e) for p, e in adapter.items()} == {p: type(e) for p, e in fresh.items()}
        for path in "df":
            assert adapter[path].a.dtype == adapter[path].b0.dtype == jnp.bfloat16
            assert np.asarray(adapter[path].b0).any()
        jax.tree.map(np.testing.assert_array_equal, adapter["v"], fresh["v"])

    def test_refused(self, normal: Any) -> None:
        params, x = {"w": normal(6, 6), "v": normal(6, 6)}, normal(5, 6)

        def loss(params: Any, x: Any) -> Any:
            return (lax.stop_gradient(x @ params["v"]) @ params["w"]).sum()

        plan = jl.plan(loss, params, x, config=jl.LoraConfig(rank=2, targets="**"))
        with pytest.raises(jl.TargetError, match=r"a gradient that is zero for:\n  v\nExclude"):
            jl.init_lora_ga(jax.random.key(0), loss, params, plan, [x])
        for wrong in ({"gamma": 0.0}, {"gamma": np.inf}, {"passes": -1}, {"oversample": True}):
            with pytest.raises(jl.ConfigError, match=f"expected {next(iter(wrong))} to be"):
                jl.init_lora_ga(jax.random.key(0), loss, params, plan, [x], **wrong)
        with pytest.raises(TypeError, match="scalar-output"):
            jl.init_lora_ga(jax.random.key(0), lambda p, x: x @ p["v"] @ p["w"], params, plan, [x])
