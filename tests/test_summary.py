"""The table of a model: the article's numbers, a scan's steps, and what is never used."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_lora as jl

WIDTHS = (3072, 128, 128, 10)


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _mlp(params: Any, x: Any) -> Any:
    for k in (1, 2, 3):
        x = x @ params[f"l{k}"]["kernel"] + params[f"l{k}"]["bias"]
        x = jax.nn.relu(x) if k < 3 else x
    return x


@pytest.fixture(scope="module")
def article() -> tuple[Any, Any, jl.Adapter]:
    """The article's model on a batch of 32, and its adapter of rank 32."""
    params = {
        f"l{k}": {"kernel": _shape(n, m), "bias": _shape(m)}
        for k, (n, m) in enumerate(itertools.pairwise(WIDTHS), start=1)
    }
    x = _shape(32, 3072)
    config = jl.LoraConfig(rank=32, alpha=1, scaling="alpha", init="article")
    plan = jl.plan(_mlp, params, x, config=config)
    return params, x, jax.eval_shape(lambda: jl.init(jax.random.key(0), params, plan))


def _totals(summary: jl.Summary) -> dict[str, str]:
    """What is printed below the table."""
    totals = str(summary).splitlines()[-9:-1]
    return {" ".join(line.split()[:-1]): line.split()[-1] for line in totals}


def test_the_article_s_base_model(article: Any) -> None:
    params, x, _ = article
    summary = jl.summary(_mlp, params, x)
    rows = [(row.name, row.input_shape, row.output_shape, row.params) for row in summary.rows]
    assert rows == [
        ("l1", (32, 3072), (32, 128), 393_344),
        ("l2", (32, 128), (32, 128), 16_512),
        ("l3", (32, 128), (32, 10), 1_290),
    ]
    assert _totals(summary) == {
        "total params": "411,146",
        "trained params": "411,146",
        "frozen params": "0",
        "multiply-adds (M)": "13.16",
        "input size (MB)": "0.39",
        "forward/backward pass size (MB)": "0.07",
        "params size (MB)": "1.64",
        "estimated total size (MB)": "2.11",
    }
    assert summary.multiply_adds == 32 * 411_146


def test_the_article_s_model_with_its_adapter(article: Any) -> None:
    params, x, adapter = article
    summary = jl.summary(_mlp, params, x, adapter=adapter)
    rows = [(row.name.strip(), row.params, row.trained) for row in summary.rows]
    assert rows == [
        ("l1", 393_344, False),
        ("+ lora kernel, rank 32", 102_400, True),
        ("l2", 16_512, False),
        ("+ lora kernel, rank 32", 8_192, True),
        ("l3", 1_290, False),
        ("+ lora kernel, rank 32", 4_416, True),
    ]
    totals = _totals(summary)
    # torchinfo leaves the adapter's products out and prints 13.16 again; here they are counted,
    # 32 rows times as many as the factors have elements.
    assert totals.pop("multiply-adds (M)") == f"{32 * (411_146 + 115_008) / 1e6:.2f}"
    assert sum(row.multiply_adds for row in summary.rows if not row.trained) == 32 * 411_146
    assert totals == {
        "total params": "526,154",
        "trained params": "115,008",
        "frozen params": "411,146",
        "input size (MB)": "0.39",
        "forward/backward pass size (MB)": "0.14",
        "params size (MB)": "2.10",
        "estimated total size (MB)": "2.63",
    }


def test_the_printed_table() -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["l1"]["kernel"] + params["l1"]["bias"]

    params = {"l1": {"kernel": _shape(6, 4), "bias": _shape(4)}, "spare": {"w": _shape(9)}}
    assert str(jl.summary(model, params, _shape(2, 6))).splitlines()[:5] == [
        "-" * 64,
        "layer  input shape  output shape  params           multiply-adds",
        "l1     [2, 6]       [2, 4]            28  trained             56",
        "spare  -            -                  9  trained              0",
        "-" * 64,
    ]


def test_a_scan_counts_all_its_steps() -> None:
    def model(params: Any, x: Any) -> Any:
        def layer(x: Any, p: Any) -> Any:
            return jnp.tanh(x @ p["kernel"] + p["bias"]), None

        return lax.scan(layer, x, params["layers"])[0] @ params["head"]

    params = {"layers": {"kernel": _shape(7, 8, 8), "bias": _shape(7, 8)}, "head": _shape(8, 3)}
    x = _shape(5, 8)
    summary = jl.summary(model, params, x)
    layers, head = summary.rows
    assert (layers.name, layers.params) == ("layers", 7 * 72)
    assert layers.multiply_adds == 7 * 5 * (64 + 8)
    assert (layers.input_shape, layers.output_shape) == ((5, 8), (5, 8))  # of one step
    assert (head.name, head.multiply_adds) == ("(root)", 5 * 24)

    adapter = jl.init(
        jax.random.key(0), params, jl.plan(model, params, x, config=jl.LoraConfig(rank=2))
    )
    with_lora = jl.summary(model, params, x, adapter=adapter)
    assert [row.multiply_adds for row in with_lora.rows if row.trained] == [
        7 * 5 * 2 * 16,
        5 * 2 * 11,
    ]
    assert with_lora.trainable_params == adapter.trainable_params == 7 * 2 * 16 + 2 * 11


def test_an_unused_parameter_is_listed_and_counted() -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["used"]["w"]

    params = {"used": {"w": _shape(6, 4)}, "lost": {"w": _shape(10, 10)}}
    summary = jl.summary(model, params, _shape(2, 6))
    row = summary.rows[-1]
    assert (row.name, row.params, row.multiply_adds) == ("lost", 100, 0)
    assert (row.input_shape, row.output_shape, row.output_bytes) == (None, None, 0)
    assert summary.total_params == 124


def test_a_weight_used_twice_is_counted_twice_and_stored_once() -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["w"] @ params["w"].T

    summary = jl.summary(model, {"w": _shape(6, 4)}, _shape(2, 6))
    assert (summary.total_params, summary.multiply_adds) == (24, 2 * 2 * 24)


def test_bytes_follow_the_dtypes() -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["w"]

    half = jl.summary(
        model, {"w": _shape(6, 4, dtype=jnp.bfloat16)}, _shape(2, 6, dtype=jnp.bfloat16)
    )
    assert (half.param_bytes, half.input_bytes, half.pass_bytes) == (48, 24, 2 * 16)
    full = jl.summary(model, {"w": _shape(6, 4)}, _shape(2, 6))
    assert (full.param_bytes, full.input_bytes, full.pass_bytes) == (96, 48, 2 * 32)


def test_keys_flags_and_functions_among_the_arguments() -> None:
    def model(params: Any, x: Any, train: bool, *, key: Any) -> Any:
        y = params["act"](x @ params["w"])
        return y + jax.random.normal(key, y.shape) if train else y

    params = {"w": _shape(6, 4), "act": jnp.tanh}
    summary = jl.summary(model, params, _shape(2, 6), True, key=jax.random.key(0))
    assert summary.total_params == 24
    assert summary.input_bytes == 2 * 6 * 4 + jax.random.key(0).nbytes


def test_an_adapter_for_another_model_is_refused(article: Any) -> None:
    params, x, adapter = article
    with pytest.raises(jl.AdapterError, match="l3/kernel: no such parameter"):
        jl.summary(lambda p, x: x, {"l1": params["l1"], "l2": params["l2"]}, x, adapter=adapter)
