"""Adapters of PEFT against the formulas in float64, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import AdapterError, CheckpointError, JaxLoraError
from jax_lora.peft.config import PeftConfig
from tests.peft.small import NAMES, P, World, write

TARGETS = {"target_modules": ["head", "fc"]}
Tensors = dict[str, np.ndarray]


def _product(tensors: Tensors, module: str) -> np.ndarray:
    """``(B A)^T`` in float64: the update of a kernel ``[in, out]``, without its scale."""
    a = tensors[f"{P}{module}.lora_A.weight"].astype(np.float64)
    b = tensors[f"{P}{module}.lora_B.weight"].astype(np.float64)
    return (b @ a).T


def _delta(adapter: jl.Adapter, path: str, params: Any = None) -> np.ndarray:
    return np.asarray(jl.delta(adapter, params)[path], np.float64)


def test_the_update_is_the_formula(world: World, tensors: Tensors, tmp_path: Path) -> None:
    adapter = world.load(write(tmp_path, TARGETS, tensors))
    assert set(adapter) == {"head/kernel", "layers/w"}
    assert adapter["head/kernel"].rank == 2
    assert float(adapter["head/kernel"].scale) == 1.5
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(
        _delta(adapter, "head/kernel"), 1.5 * _product(tensors, "head"), **close
    )
    for k in range(2):
        expected = 1.5 * _product(tensors, f"layers.{k}.fc")
        np.testing.assert_allclose(_delta(adapter, "layers/w")[k], expected, **close)
    # Control: the other layer's is not within the tolerance.
    assert np.abs(_delta(adapter, "layers/w")[0] - expected).max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_patterns(
    world: World, tensors: Tensors, tmp_path: Path, rslora: bool
) -> None:
    rng = np.random.default_rng(2)
    tensors[f"{P}layers.1.fc.lora_A.weight"] = rng.standard_normal((5, 4)).astype(np.float32)
    tensors[f"{P}layers.1.fc.lora_B.weight"] = rng.standard_normal((4, 5)).astype(np.float32)
    patterns = {
        "rank_pattern": {r"layers\.1\.fc": 5},
        # The first that matches decides, and it has to match to the end of the name.
        "alpha_pattern": {"head": 7.5, r"layers\.\d+\.fc": 4, r"layers\.0": 9, "fc": 1},
        "use_rslora": rslora,
    }
    adapter = world.load(write(tmp_path, TARGETS | patterns, tensors))
    root = math.sqrt if rslora else float
    close = {"rtol": 1e-6, "atol": 2e-6}
    for path, at, module, scale in (
        ("head/kernel", ..., "head", 7.5 / root(2)),
        ("layers/w", 0, "layers.0.fc", 4 / root(2)),
        ("layers/w", 1, "layers.1.fc", 4 / root(5)),
    ):
        expected = scale * _product(tensors, module)
        np.testing.assert_allclose(_delta(adapter, path)[at], expected, **close)
    assert adapter["layers/w"].rank == 5
    assert float(adapter["layers/w"].scale) == 1.0


def test_layers_without_factors_are_zero(world: World, tensors: Tensors, tmp_path: Path) -> None:
    some = {key: x for key, x in tensors.items() if "layers.0" not in key}
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc: the configuration adapts it"):
        world.load(write(tmp_path / "missing", TARGETS, some))
    one = {"layers_to_transform": [1], "layers_pattern": "layers"}
    adapter = world.load(write(tmp_path / "one", TARGETS | one, some))
    # PEFT's rule: what is named in full, as the head is, is adapted whatever its layer.
    assert set(adapter) == {"layers/w", "head/kernel"}
    assert not _delta(adapter, "layers/w")[0].any()
    assert _delta(adapter, "layers/w")[1].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_dtypes_are_kept(world: World, tensors: Tensors, tmp_path: Path, dtype: Any) -> None:
    tensors = {key: x.astype(dtype) for key, x in tensors.items()}
    adapter = world.load(write(tmp_path / "in", TARGETS, tensors))
    assert {str(entry.a.dtype) for entry in adapter.values()} == {str(np.dtype(dtype))}
    world.save(tmp_path / "out", adapter, flat=False)
    file = jl.peft.tensors.TensorFile.open(tmp_path / "out" / "adapter_model.safetensors")
    assert set(file.tensors) == set(tensors)
    for key, x in tensors.items():
        assert file.read(key).dtype == x.dtype
        np.testing.assert_array_equal(file.read(key), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_scales_of_layers_are_not_rounded(
    world: World, tensors: Tensors, tmp_path: Path, dtype: Any
) -> None:
    """They go into ``b``, which is in float32 where its own dtype does not have the numbers."""
    tensors = {key: x.astype(dtype) for key, x in tensors.items()}
    for alpha, expected in ((4, dtype), (3.3, np.float32), (1e6, np.float32)):
        patterns = {"alpha_pattern": {r"layers\.1\.fc": alpha, "fc": 2}}
        folder = write(tmp_path / f"{alpha}", TARGETS | patterns, tensors)
        entry = world.load(folder)["layers/w"]
        assert (entry.a.dtype, entry.b.dtype) == (dtype, expected)
        update = alpha / 2 * _product(tensors, "layers.1.fc")
        found = _delta(jl.Adapter({"w": entry}), "w")[1]
        np.testing.assert_allclose(found, update, rtol=1e-6, atol=1e-6 * np.abs(update).max())


def test_a_scale_that_overflows(world: World, tensors: Tensors, tmp_path: Path) -> None:
    tensors[f"{P}layers.1.fc.lora_B.weight"] *= np.float32(1e30)
    patterns = {"alpha_pattern": {r"layers\.1\.fc": 1e12, "fc": 2}}
    with pytest.raises(AdapterError, match="layers/w: b with its scale is beyond the numbers of"):
        world.load(write(tmp_path, TARGETS | patterns, tensors))


def test_values_trained_whole(world: World, tensors: Tensors, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((3, 6), (3,)))
    tensors = {key: x for key, x in tensors.items() if ".head." not in key}
    tensors |= {f"{P}head.weight": weight, f"{P}head.bias": bias}
    config = {"target_modules": ["fc"], "modules_to_save": ["head"]}
    adapter = world.load(write(tmp_path, config, tensors))
    assert set(adapter) == {"head/kernel", "head/bias", "layers/w"}
    np.testing.assert_array_equal(adapter["head/kernel"].value, weight.T)
    np.testing.assert_array_equal(adapter["head/bias"].value, bias)


def test_a_start_that_changed_the_base(world: World, tensors: Tensors, tmp_path: Path) -> None:
    """PiSSA on the plain base is another model: refused, or taken as a difference."""
    config = TARGETS | {"init_lora_weights": "pissa_niter_4"}
    folder = write(tmp_path / "trained", config, tensors)
    with pytest.raises(CheckpointError, match="PEFT subtracted the factors at the start"):
        world.load(folder)
    before = {key: x + np.float32(0.25) for key, x in tensors.items()}
    start = write(tmp_path / "start", config, before)
    adapter = world.load(folder, start=start)
    expected = 1.5 * (_product(tensors, "head") - _product(before, "head"))
    np.testing.assert_allclose(_delta(adapter, "head/kernel"), expected, rtol=1e-6, atol=2e-6)
    again = world.load(folder, start=write(tmp_path / "same", config, tensors))
    assert not _delta(again, "head/kernel").any()
    # Written, it is an ordinary adapter of twice the rank.
    world.save(tmp_path / "plain", adapter)
    plain = world.load(tmp_path / "plain")
    assert plain["head/kernel"].rank == 4
    np.testing.assert_allclose(_delta(plain, "head/kernel"), expected, rtol=1e-6, atol=2e-6)
    with pytest.raises(CheckpointError, match="expected none, as init_lora_weights"):
        world.load(write(tmp_path / "usual", TARGETS, tensors), start=start)
    other = write(tmp_path / "other", config | {"lora_alpha": 4}, before)
    with pytest.raises(CheckpointError, match="another rank or scale than at the start"):
        world.load(folder, start=other)


def test_all_that_does_not_fit_is_one_error(world: World, tensors: Tensors, tmp_path: Path) -> None:
    tensors[f"{P}hed.lora_A.weight"] = tensors.pop(f"{P}head.lora_A.weight")
    tensors[f"{P}layers.0.fc.lora_B.weight"] = np.zeros((4, 3), np.float32)
    tensors[f"{P}layers.2.fc.lora_A.weight"] = np.zeros((2, 4), np.float32)
    tensors["head.lora_A.weight"] = np.zeros((2, 6), np.float32)
    tensors[f"{P}conv.lora_A.weight"] = np.zeros((2, 4, 2), np.float32)
    tensors[f"{P}layers.0.fc.bias"] = np.zeros(4, np.float32)
    tensors[f"{P}layers.1.fc.lora_A.weight"] = np.full((2, 4), np.nan, np.float32)
    with pytest.raises(CheckpointError) as caught:
        world.load(write(tmp_path, TARGETS, tensors))
    lines = str(caught.value).splitlines()[1:]
    for part in (
        "hed.lora_A.weight: no module is called 'hed' (nearest: 'head'",
        "head: expected keys for A, B, found B",
        "layers.0.fc.weight: expected B of shape (4, 2), found (4, 3)",
        "layers.2.fc.lora_A.weight: no module is called 'layers.2.fc'",
        "head.lora_A.weight: expected a name that begins with 'base_model.model.'",
        "conv.lora_A.weight: the configuration does not adapt 'conv'",
        "layers.0.fc.bias: its module is not in modules_to_save",
        "layers.1.fc.lora_A.weight: holds NaN or infinite numbers",
    ):
        assert any(part in line for line in lines), (part, lines)
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected one of LORA, LOHA, LOKR, found 'IA3'"),
        ({"peft_type": None}, "peft_type: expected one of LORA, LOHA, LOKR, found ''"),
        ({"r": 0}, "r: expected a positive integer, found 0"),
        ({"r": True}, "r: expected a positive integer, found True"),
        ({"r": 2.0}, "r: expected a positive integer, found 2.0"),
        ({"r": 10**30}, "r: expected a positive integer"),
        ({"r": 3}, r"expected A of shape \(3, 6\), found \(2, 6\)"),
        ({"lora_alpha": "3"}, "lora_alpha: expected a number, found '3'"),
        ({"lora_alpha": 1e300}, "lora_alpha: expected a number"),
        ({"bias": "some"}, "bias: expected one of none, all, lora_only, found 'some'"),
        ({"bias": "all"}, r"head\.bias: is in bias='all', and the file has no such key"),
        ({"bias": "lora_only"}, r"layers\.1\.fc\.bias: is in bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias: is set to True, which is not implemented"),
        (
            {"trainable_token_indices": {"embed": [1]}},
            "embed: has trained tokens, and the file has",
        ),
        ({"trainable_token_indices": [1, 1]}, "expected different rows, or such by the name"),
        ({"trainable_token_indices": {"embed": [-1]}}, "expected different rows, or such by the"),
        ({"target_parameters": ["x"]}, "target_parameters: is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: is set"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying: expected true or false, found 1"),
        ({"alpha": 3}, "alpha: is set to 3, which is not implemented"),
        ({"peft_type": "LOHA"}, "lora_alpha: is set to 3, which is not implemented"),
        (
            {"peft_type": "LOHA", "alpha": 3, "lora_alpha": None, "bias": None},
            "no parameter is called",
        ),
        ({"use_qalora": True}, "use_qalora: is set"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config: is set"),
        ({"a_field_of_2031": 1}, "a_field_of_2031: is set to 1, which is not implemented"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' is not a start that leaves"),
        ({"init_lora_weights": "new"}, "init_lora_weights: 'new' is not a start that leaves"),
        ({"init_lora_weights": "olora"}, "PEFT subtracted the factors at the start"),
        ({"target_modules": None}, "target_modules: expected names of modules, found none"),
        ({"target_modules": "all-linear"}, "found 'all-linear', for which PEFT writes them"),
        ({"target_modules": [1]}, "target_modules: expected names of modules"),
        ({"target_modules": "("}, "target_modules: '\\(': no regular expression"),
        ({"target_modules": "(a*)*b"}, "repeats a repetition, which can take for ever"),
        ({"rank_pattern": {"(x|x)+y": 2}}, "rank_pattern: .* repeats a repetition"),
        ({"rank_pattern": {"fc": 0}}, "rank_pattern: expected a positive integer for 'fc'"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object"),
        ({"rank_pattern": {"(?i)fc": 2}}, "rank_pattern: .* as it sets flags"),
        ({"modules_to_save": ["(?i)fc"]}, "modules_to_save: .* as it sets flags"),
        ({"layers_pattern": "(?i)h"}, "layers_pattern: .* as it sets flags"),
        ({"modules_to_save": ["head"]}, "the configuration does not adapt 'head'"),
        ({"use_dora": True}, "expected keys for A, B, magnitude, found A, B"),
        ({"use_dora": "yes"}, "use_dora: expected true or false, found 'yes'"),
        ({"exclude_modules": ["head"]}, "the configuration does not adapt 'head'"),
    ],
)
def test_a_field_is_read_or_refused(
    world: World, tensors: Tensors, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        world.load(write(tmp_path, TARGETS | changed, tensors))


def test_fields_that_say_nothing_are_idle(world: World, tensors: Tensors, tmp_path: Path) -> None:
    idle = {
        "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
        "base_model_name_or_path": "../../somewhere",
        "inference_mode": True,
        "lora_dropout": 0.5,
        "megatron_core": "megatron.core",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "layer_replication": [],
        "loftq_config": {},
        "use_qalora": False,
        "init_lora_weights": "gaussian",
    }
    plain = world.load(write(tmp_path / "plain", TARGETS, tensors))
    other = world.load(write(tmp_path / "idle", TARGETS | idle, tensors))
    for path, entry in plain.items():
        for name, x in entry.arrays().items():
            np.testing.assert_array_equal(getattr(other[path], name), x)


def test_pickles_are_not_read(world: World, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"a \.bin file is a pickle"):
        world.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a folder with adapter_config\.json"):
        world.load(tmp_path / "nowhere")


def test_values_are_asked_for_where_they_are_needed(
    world: World, tensors: Tensors, tmp_path: Path
) -> None:
    import jax

    shapes = jax.eval_shape(lambda: world.params)
    folder = write(tmp_path / "plain", TARGETS, tensors)
    adapter = jl.peft.load(folder, shapes, NAMES, world.uses).adapter
    assert set(adapter) == {"head/kernel", "layers/w"}
    for module, size in (("head", 3), ("layers.0.fc", 4), ("layers.1.fc", 4)):
        tensors[f"{P}{module}.lora_magnitude_vector"] = np.ones(size, np.float32)
    folder = write(tmp_path / "dora", TARGETS | {"use_dora": True}, tensors)
    with pytest.raises(AdapterError, match="DoRA needs the base parameter's values"):
        jl.peft.load(folder, shapes, NAMES, world.uses)


def test_a_table_that_is_also_the_head_is_refused(tmp_path: Path) -> None:
    """PEFT's embedding is the lookup alone; here the adapter would reach the head as well."""

    def tied(p: Any, tokens: Any) -> Any:
        return p["table"][tokens] @ p["table"].T

    params = {"table": jnp.ones((5, 3))}
    uses = jl.discover(tied, params, jnp.zeros((2,), jnp.int32))
    names = [("table", "embed.weight")]
    tensors = {
        f"{P}embed.lora_embedding_A": np.ones((2, 5), np.float32),
        f"{P}embed.lora_embedding_B": np.ones((3, 2), np.float32),
    }
    folder = write(tmp_path, {"target_modules": ["embed"]}, tensors)
    with pytest.raises(CheckpointError, match="used as embedding and linear"):
        jl.peft.load(folder, params, names, uses)
    values = {f"{P}embed.weight": np.ones((5, 3), np.float32)}
    whole = {"target_modules": ["x"], "modules_to_save": ["embed"]}
    with pytest.raises(CheckpointError, match="used as embedding and linear"):
        jl.peft.load(write(tmp_path / "whole", whole, values), params, names, uses)
    full = jl.Adapter({"table": jl.FullValue(params["table"], (5, 3))})
    with pytest.raises(AdapterError, match="used as embedding and linear"):
        jl.peft.save(tmp_path / "out", full, params, names, uses)
    single = jl.discover(lambda p, t: p["table"][t], params, jnp.zeros((2,), jnp.int32))
    assert "table" in jl.peft.load(folder, params, names, single).adapter
    # Without its use it is not known to be an embedding, and the keys say that it is one.
    layout = jl.Layout((5, 3), (0,), (1,))
    with pytest.raises(CheckpointError, match="is an embedding in the file, and of kind 'linear'"):
        jl.peft.load(folder, params, names, {"table": layout})


def test_targets_are_those_of_peft() -> None:
    """The cases of PEFT's own rule that are easy to get wrong."""

    def targets(**fields: Any) -> list[str]:
        data = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q", "k"]}
        config = PeftConfig.from_json("here", data | fields)
        names = ["h.0.q", "h.1.q", "h.1.experts.0.q", "h.0.xq", "q", "h.1.k"]
        return [name for name in names if config.is_target(name)]

    assert targets() == ["h.0.q", "h.1.q", "h.1.experts.0.q", "q", "h.1.k"]
    assert targets(target_modules=["h.0.q"]) == ["h.0.q"]
    assert targets(target_modules=r"h\.\d\.(q|k)") == ["h.0.q", "h.1.q", "h.1.k"]
    assert targets(exclude_modules=["1.q"]) == ["h.0.q", "h.1.experts.0.q", "q", "h.1.k"]
    assert targets(exclude_modules=r"h\.1\..*") == ["h.0.q", "q"]
    # The first number is the layer; an exact name is taken whatever its layer.
    first = "x.h.0.q"
    data = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    layered = PeftConfig.from_json("here", data | {"layers_to_transform": 0})
    assert [layered.is_target(n) for n in (first, "x.h.1.experts.0.q", "q")] == [True, False, True]
    named = PeftConfig.from_json("here", data | {"layers_to_transform": [0], "layers_pattern": "h"})
    assert [named.is_target(n) for n in ("h.0.q", "g.0.q", "h.1.q")] == [True, False, False]


def test_a_config_that_is_no_object(world: World, tensors: Tensors, tmp_path: Path) -> None:
    write(tmp_path, TARGETS, tensors)
    file = tmp_path / "adapter_config.json"
    good = file.read_text()
    for text in ("[]", "", "{", good[:-1] + ', "r": 3}', "[" * 100000, '{"r": NaN}', "\ud800"):
        file.write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(JaxLoraError, match=r"adapter_config\.json"):
            world.load(tmp_path)
    file.write_text(good)
    assert world.load(tmp_path)
