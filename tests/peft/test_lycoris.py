"""LoHa, LoKr and Tucker's form against their formulas, in PEFT's folders and in LyCORIS's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError
from jax_lora.peft.tensors import write_tensors
from tests.peft.small import NAMES, P, World, write

Tensors = dict[str, np.ndarray]
#: The small model's modules: their torch shapes.
SHAPES = {"head": (3, 6), "layers.0.fc": (4, 4), "layers.1.fc": (4, 4), "conv": (6, 4, 2)}
CLOSE = {"rtol": 2e-5, "atol": 1e-5}


def _random(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: rng.standard_normal(x).astype(np.float32) for name, x in shapes.items()}


def _loha(module: str, rank: int, seed: int) -> tuple[Tensors, np.ndarray]:
    """Tensors of a module, and its update ``[out, *in]`` in float64."""
    out, *ins = SHAPES[module]
    a, b = (out, rank), (rank, int(np.prod(ins)))
    tensors = _random(
        np.random.default_rng(seed),
        {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b},
    )
    x = {name: y.astype(np.float64) for name, y in tensors.items()}
    update = (x["hada_w1_a"] @ x["hada_w1_b"]) * (x["hada_w2_a"] @ x["hada_w2_b"])
    return tensors, update.reshape(SHAPES[module])


def _loha_tucker(module: str, rank: int, seed: int) -> tuple[Tensors, np.ndarray]:
    out, channels, *space = SHAPES[module]
    core, a, b = (rank, rank, *space), (rank, out), (rank, channels)
    rng = np.random.default_rng(seed)
    tensors = _random(
        rng,
        {
            f"hada_{x}{k}{y}": s
            for k in "12"
            for x, y, s in (("w", "_a", a), ("w", "_b", b), ("t", "", core))
        },
    )
    x = {name: y.astype(np.float64) for name, y in tensors.items()}
    both = [
        np.einsum("ij...,ip,jr->pr...", x[f"hada_t{k}"], x[f"hada_w{k}_a"], x[f"hada_w{k}_b"])
        for k in "12"
    ]
    return tensors, both[0] * both[1]


def _lokr(
    module: str, small: tuple[int, int], seed: int, *, one: int = 0, two: int = 0, tucker: int = 0
) -> tuple[Tensors, np.ndarray]:
    """LoKr whose small matrix is of a size; of ranks ``one`` and ``two``, or whole."""
    out, channels, *space = SHAPES[module]
    large = (out // small[0], channels // small[1])
    shapes: dict[str, tuple[int, ...]] = {}
    if one:
        shapes |= {"lokr_w1_a": (small[0], one), "lokr_w1_b": (one, small[1])}
    else:
        shapes["lokr_w1"] = small
    if two:
        inner = large[1] * int(np.prod(space))
        shapes |= {"lokr_w2_a": (large[0], two), "lokr_w2_b": (two, inner)}
    elif tucker:
        shapes |= {"lokr_w2_a": (tucker, large[0]), "lokr_w2_b": (tucker, large[1])}
        shapes["lokr_t2"] = (tucker, tucker, *space)
    else:
        shapes["lokr_w2"] = (*large, *space)
    tensors = _random(np.random.default_rng(seed), shapes)
    x = {name: y.astype(np.float64) for name, y in tensors.items()}
    w1 = x["lokr_w1_a"] @ x["lokr_w1_b"] if one else x["lokr_w1"]
    if two:
        w2 = (x["lokr_w2_a"] @ x["lokr_w2_b"]).reshape(*large, *space)
    elif tucker:
        w2 = np.einsum("ij...,ip,jr->pr...", x["lokr_t2"], x["lokr_w2_a"], x["lokr_w2_b"])
    else:
        w2 = x["lokr_w2"]
    return tensors, np.kron(w1.reshape(*small, *(1,) * len(space)), w2)


def _ours(update: np.ndarray) -> np.ndarray:
    """``[out, in, *space]`` as the small model has it: ``[*space, in, out]``."""
    return np.moveaxis(update, (0, 1), (-1, -2))


def _check(adapter: jl.Adapter, expected: dict[str, np.ndarray]) -> None:
    found = jl.delta(adapter)
    for module, update in expected.items():
        path = {"head": "head/kernel", "conv": "conv/kernel"}.get(module, "layers/w")
        at: Any = int(module[7]) if path == "layers/w" else ...
        np.testing.assert_allclose(found[path][at], _ours(update), err_msg=module, **CLOSE)
        assert np.abs(update).max() > 0.1


LOHA: dict[str, dict[str, tuple[Tensors, np.ndarray]]] = {
    "all": {module: _loha(module, 2, k) for k, module in enumerate(SHAPES)},
    "tucker": {"conv": _loha_tucker("conv", 2, 0), "head": _loha("head", 2, 1)},
}
LOKR = {
    "as here": {
        "head": _lokr("head", (1, 2), 0, two=2),
        "layers.0.fc": _lokr("layers.0.fc", (2, 2), 1, two=1),
    },
    "whole": {"head": _lokr("head", (1, 2), 0), "conv": _lokr("conv", (2, 2), 1)},
    "both": {
        "head": _lokr("head", (3, 3), 0, one=2, two=2),
        "conv": _lokr("conv", (3, 2), 1, one=2, two=2),
    },
    "tucker": {"conv": _lokr("conv", (2, 4), 0, tucker=2)},
    "layers split otherwise": {
        "layers.0.fc": _lokr("layers.0.fc", (2, 2), 0, two=2),
        "layers.1.fc": _lokr("layers.1.fc", (4, 1), 1, two=2),
    },
    "a rank that repeats itself": {"head": _lokr("head", (1, 2), 0, two=7)},
}


@pytest.mark.parametrize("case", LOHA)
def test_loha(world: World, tmp_path: Path, case: str) -> None:
    tensors = {f"{P}{m}.{end}": x for m, (mine, _) in LOHA[case].items() for end, x in mine.items()}
    config = {"peft_type": "LOHA", "alpha": 3, "target_modules": list(LOHA[case])}
    config |= {"lora_alpha": None, "bias": None, "init_weights": True, "rank_dropout": 0.1}
    adapter = world.load(write(tmp_path / "peft", config, tensors))
    _check(adapter, {module: 1.5 * update for module, (_, update) in LOHA[case].items()})
    assert {type(entry) for entry in adapter.values()} == {jl.LohaFactors}
    # LyCORIS, with an alpha for one module.
    tensors = _lycoris(LOHA[case]) | {"lora_head.alpha": np.float32(1).reshape(())}
    write_tensors(tmp_path / "x.safetensors", tensors)
    again = jl.peft.load_kohya(tmp_path / "x.safetensors", world.params, NAMES, world.uses).adapter
    scales = {module: 0.5 if module == "head" else 1 for module in LOHA[case]}
    _check(again, {module: scales[module] * update for module, (_, update) in LOHA[case].items()})


@pytest.mark.parametrize("case", LOKR)
def test_lokr(world: World, tmp_path: Path, case: str) -> None:
    modules = LOKR[case]
    tensors = {f"{P}{m}.{end}": x for m, (mine, _) in modules.items() for end, x in mine.items()}
    rank = 7 if case == "a rank that repeats itself" else 2
    ranks = {m: 1 if (case, m) == ("as here", "layers.0.fc") else rank for m in modules}
    config = {"peft_type": "LOKR", "alpha": 3, "r": rank, "target_modules": list(modules)}
    config |= {"lora_alpha": None, "bias": None, "decompose_factor": 4}
    config["rank_pattern"] = {m: r for m, r in ranks.items() if r != rank}
    adapter = world.load(write(tmp_path / "peft", config, tensors))
    _check(adapter, {m: 3 / ranks[m] * update for m, (_, update) in modules.items()})
    kept = {path for path, entry in adapter.items() if isinstance(entry, jl.LokrFactors)}
    assert kept == {
        "as here": {"head/kernel", "layers/w"},
        "whole": {"head/kernel"},
        "a rank that repeats itself": {"head/kernel"},
    }.get(case, set())
    # LyCORIS: of two whole matrices the scale is 1, whatever alpha is.
    alphas = {f"lora_{m.replace('.', '_')}.alpha": np.float32([5]) for m in modules}
    write_tensors(tmp_path / "x.safetensors", _lycoris(modules) | alphas)
    again = jl.peft.load_kohya(tmp_path / "x.safetensors", world.params, NAMES, world.uses).adapter
    scales = {m: 1 if case == "whole" else 5 / ranks[m] for m in modules}
    _check(again, {m: scales[m] * update for m, (_, update) in modules.items()})


def test_products_are_not_rounded_to_a_narrow_dtype(world: World, tmp_path: Path) -> None:
    """Of bfloat16 matrices, the product that is formed when they are read is in float32."""
    shapes = {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 4)}
    drawn = _random(np.random.default_rng(0), shapes)
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in drawn.items()}
    x = {name: y.astype(np.float64) for name, y in half.items()}
    small, large = x["lokr_w1_a"] @ x["lokr_w1_b"], x["lokr_w2_a"] @ x["lokr_w2_b"]
    update = np.kron(small, large).reshape(SHAPES["conv"])
    file = {f"lora_conv.{name}": y for name, y in half.items()}
    write_tensors(tmp_path / "x.safetensors", file)
    load = jl.peft.load_kohya
    adapter = load(tmp_path / "x.safetensors", world.params, NAMES, world.uses).adapter
    _check(adapter, {"conv": update})


def _lycoris(modules: dict[str, tuple[Tensors, np.ndarray]]) -> Tensors:
    return {
        f"lora_{module.replace('.', '_')}.{end}": x
        for module, (mine, _) in modules.items()
        for end, x in mine.items()
    }


def test_a_convolution_of_kohya_in_tuckers_form(world: World, tmp_path: Path) -> None:
    shapes = {"down": (2, 4, 1), "mid": (2, 2, 2), "up": (6, 2, 1)}
    tensors = _random(np.random.default_rng(0), shapes)
    update = np.einsum(
        "oi,ijk,jc->ock", tensors["up"][..., 0], tensors["mid"], tensors["down"][..., 0]
    )
    file = {f"lora_conv.lora_{name}.weight": x for name, x in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", file)
    load = jl.peft.load_kohya
    _check(
        load(tmp_path / "x.safetensors", world.params, NAMES, world.uses).adapter, {"conv": update}
    )
    file["lora_conv.lora_mid.weight"] = np.ones((2, 2, 3), np.float32)
    write_tensors(tmp_path / "x.safetensors", file)
    with pytest.raises(CheckpointError, match=r"expected lora_mid \(2, 2, 2\), found \(2, 2, 3\)"):
        load(tmp_path / "x.safetensors", world.params, NAMES, world.uses)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("LOHA", {"hada_w1_a": (3, 1)}, r"found hada_w1_a \(3, 1\)"),
        ("LOHA", {"hada_w2_b": None}, "expected .*hada_w2_b"),
        ("LOHA", {"hada_t1": (2, 2)}, "expected .*hada_w1_a"),
        ("LOHA", {"hada_w1_b": (2, 6, 1)}, r"found .*hada_w1_b \(2, 6, 1\)"),
        ("LOKR", {"lokr_w1": (2, 2)}, "expected lokr_w1 to divide 3 outputs and 6 inputs"),
        ("LOKR", {"lokr_w2_a": (3, 1)}, r"found .*lokr_w2_a \(3, 1\)"),
        ("LOKR", {"lokr_w2_b": None}, "expected .*lokr_w2_b"),
        ("LOKR", {"lokr_w1": None}, "expected lokr_w1 and lokr_w2, or their factors"),
        ("LOKR", {"lokr_w1_a": (1, 2)}, "expected .*lokr_w1"),
    ],
)
def test_tensors_that_do_not_fit(
    world: World, tmp_path: Path, method: str, change: dict[str, Any], message: str
) -> None:
    tensors, _ = _loha("head", 2, 0) if method == "LOHA" else _lokr("head", (1, 2), 0, two=2)
    for end, shape in change.items():
        if shape is None:
            del tensors[end]
        else:
            tensors[end] = np.ones(shape, np.float32)
    config = {"peft_type": method, "alpha": 3, "target_modules": ["head"]}
    config |= {"lora_alpha": None, "bias": None}
    folder = write(tmp_path, config, {f"{P}head.{end}": x for end, x in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        world.load(folder)
    write_tensors(tmp_path / "x.safetensors", {f"lora_head.{end}": x for end, x in tensors.items()})
    with pytest.raises(CheckpointError, match=r"head\.weight: expected"):
        jl.peft.load_kohya(tmp_path / "x.safetensors", world.params, NAMES, world.uses)
