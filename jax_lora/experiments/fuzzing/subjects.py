"""What is fuzzed: small valid folders of every format, and whether what was loaded is right."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.adapter import leaves_by_path
from jax_lora.experiments.fuzzing.formulas import (
    Tensors,
    kohya_updates,
    peft_updates,
    tensor_bytes,
    tensors_of,
)
from jax_lora.experiments.fuzzing.mutations import Files
from jax_lora.peft.weights import open_weights

Name = jl.peft.Name
_P = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Subject:
    """One kind of folder.

    Attributes:
        name: For reports.
        files: A valid folder.
        donor: Another.
        load: Reads such a folder with the library.
        judge: What is wrong with what was loaded from a folder; empty if nothing is.
    """

    name: str
    files: Files
    donor: Files
    load: Callable[[Path], Any]
    judge: Callable[[Any, Path], str]


def _params(rng: np.random.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "table": normal(7, 4),
        "layers": {"w": normal(2, 4, 4), "b": normal(2, 4)},
        "conv": {"kernel": normal(2, 4, 6)},
        "head": {"kernel": normal(6, 3), "bias": normal(3)},
    }


_BASE = _params(np.random.default_rng(0))
_NAMES = (
    Name("table", "embed.weight", "embedding"),
    Name("layers/w", "layers.{layer}.fc.weight", "linear", "io"),
    Name("layers/b", "layers.{layer}.fc.bias"),
    Name("conv/kernel", "conv.weight", "conv", "wio"),
    Name("head/kernel", "head.weight", "linear", "io"),
    Name("head/bias", "head.bias"),
)
_SAME: Callable[[Any], Any] = lambda x: x  # noqa: E731
#: By torch's name: our path, the place in the stack, and how torch has what we have.
_PLACES: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "embed.weight": ("table", ..., _SAME),
    **{f"layers.{k}.fc.weight": ("layers/w", k, np.transpose) for k in range(2)},
    **{f"layers.{k}.fc.bias": ("layers/b", k, _SAME) for k in range(2)},
    "conv.weight": ("conv/kernel", ..., lambda x: x.transpose(2, 1, 0)),
    "head.weight": ("head/kernel", ..., np.transpose),
    "head.bias": ("head/bias", ..., _SAME),
}
_SHAPES = {"head": (3, 6), "layers.0.fc": (4, 4), "layers.1.fc": (4, 4), "conv": (6, 4, 2)}


def subjects() -> list[Subject]:
    """One of every format and variant."""
    found = [
        _folder_of_peft(name, seeded[0], seeded[1])
        for name, seeded in ((n, (make(1), make(2))) for n, make in _PEFT.items())
    ]
    more = (_file_of_kohya, _folder_of_weights, _checkpoint_of_adapter, _checkpoint_of_params)
    return [*found, *(make() for make in more)]


def _lora(seed: int, **dtypes: Any) -> tuple[dict[str, Any], Tensors]:
    draw = _Draw(seed)
    tensors = {}
    for module, (out, *ins) in _SHAPES.items():
        rank = 3 if module == "layers.1.fc" else 2
        ones = (1,) * (len(ins) - 1)
        tensors[f"{_P}{module}.lora_A.weight"] = draw(rank, *ins, dtype=dtypes.get("dtype"))
        tensors[f"{_P}{module}.lora_B.weight"] = draw(out, rank, *ones, dtype=dtypes.get("dtype"))
    config = {
        "target_modules": ["head", "fc", "conv"],
        "rank_pattern": {r"layers\.1\.fc": 3},
        "alpha_pattern": {"^layers.0": 2, "head": 7.5},
        "use_rslora": seed % 2 == 0,
    }
    return config, tensors


def _half(seed: int) -> tuple[dict[str, Any], Tensors]:
    return _lora(seed, dtype=(jnp.bfloat16, np.float16)[seed % 2])


def _dora(seed: int) -> tuple[dict[str, Any], Tensors]:
    config, tensors = _lora(seed)
    draw = _Draw(seed + 10)
    for module, (out, *ins) in _SHAPES.items():
        shape = (1, out, 1) if len(ins) > 1 else (out,)
        tensors[f"{_P}{module}.lora_magnitude_vector"] = draw(*shape)
    return config | {"use_dora": True, "target_modules": r"(head|conv|layers\.\d+\.fc)"}, tensors


def _whole(seed: int) -> tuple[dict[str, Any], Tensors]:
    """Modules and biases that are trained whole, rows of a table, and one layer of two."""
    draw = _Draw(seed)
    tensors = {
        f"{_P}layers.1.fc.lora_A.weight": draw(2, 4),
        f"{_P}layers.1.fc.lora_B.weight": draw(4, 2),
        f"{_P}layers.1.fc.base_layer.bias": draw(4),
        f"{_P}head.weight": draw(3, 6),
        f"{_P}head.bias": draw(3),
        f"{_P}embed.token_adapter.trainable_tokens_delta": draw(3, 4),
    }
    config = {
        "target_modules": ["fc"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "modules_to_save": ["head"],
        "bias": "lora_only",
        "trainable_token_indices": {"embed": [1, 6, 3]},
    }
    return config, tensors


def _table(seed: int) -> tuple[dict[str, Any], Tensors]:
    draw = _Draw(seed)
    tensors = {
        f"{_P}embed.lora_embedding_A": draw(2, 7),
        f"{_P}embed.lora_embedding_B": draw(4, 2),
    }
    return {"target_modules": ["embed"], "exclude_modules": ["head"]}, tensors


def _loha(seed: int) -> tuple[dict[str, Any], Tensors]:
    draw = _Draw(seed)
    tensors = {}
    for module in ("head", "layers.0.fc", "layers.1.fc"):
        out, *ins = _SHAPES[module]
        for k in "12":
            tensors[f"{_P}{module}.hada_w{k}_a"] = draw(out, 2)
            tensors[f"{_P}{module}.hada_w{k}_b"] = draw(2, int(np.prod(ins)))
    for k in "12":
        tensors[f"{_P}conv.hada_w{k}_a"], tensors[f"{_P}conv.hada_w{k}_b"] = draw(2, 6), draw(2, 4)
        tensors[f"{_P}conv.hada_t{k}"] = draw(2, 2, 2)
    config = {"peft_type": "LOHA", "alpha": 3, "target_modules": ["head", "fc", "conv"]}
    return config, tensors


def _lokr(seed: int) -> tuple[dict[str, Any], Tensors]:
    draw = _Draw(seed)
    tensors = {
        f"{_P}head.lokr_w1": draw(1, 2),
        f"{_P}head.lokr_w2_a": draw(3, 2),
        f"{_P}head.lokr_w2_b": draw(2, 3),
        f"{_P}layers.0.fc.lokr_w1_a": draw(2, 2),
        f"{_P}layers.0.fc.lokr_w1_b": draw(2, 2),
        f"{_P}layers.0.fc.lokr_w2": draw(2, 2),
        f"{_P}layers.1.fc.lokr_w1": draw(4, 1),
        f"{_P}layers.1.fc.lokr_w2": draw(1, 4),
        f"{_P}conv.lokr_w1": draw(2, 2),
        f"{_P}conv.lokr_w2": draw(3, 2, 2),
    }
    config = {"peft_type": "LOKR", "alpha": 3, "target_modules": ["head", "fc", "conv"]}
    return config, tensors


_PEFT: dict[str, Callable[[int], tuple[dict[str, Any], Tensors]]] = {
    "peft lora": _lora,
    "peft half": _half,
    "peft dora": _dora,
    "peft whole": _whole,
    "peft table": _table,
    "peft loha": _loha,
    "peft lokr": _lokr,
}


class _Draw:
    """Normal tensors, one after another."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: Any = None) -> np.ndarray:
        return self._rng.standard_normal(shape).astype(dtype or np.float32)


def _folder_of_peft(
    name: str, one: tuple[dict[str, Any], Tensors], other: tuple[dict[str, Any], Tensors]
) -> Subject:
    def files(config: dict[str, Any], tensors: Tensors) -> Files:
        defaults: dict[str, Any] = {"peft_type": "LORA", "r": 2, "task_type": None}
        if config.get("peft_type", "LORA") == "LORA":
            defaults |= {"lora_alpha": 3, "bias": "none", "use_dora": False, "lora_dropout": 0.1}
        text = json.dumps(defaults | config, indent=2)
        return {_CONFIG: text.encode(), _TENSORS: tensor_bytes(tensors)}

    def judge(loaded: Any, folder: Path) -> str:
        config = json.loads((folder / _CONFIG).read_text())
        tensors = tensors_of((folder / _TENSORS).read_bytes())
        expected = peft_updates(config, tensors)
        rows = {f"{m}.weight": k for m, k in _rows_of(config).items()}
        return _difference(loaded.adapter, expected, rows)

    def load(folder: Path) -> Any:
        return jl.peft.load(folder, _BASE, _NAMES)

    return Subject(name, files(*one), files(*other), load, judge)


def _rows_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    found = config.get("trainable_token_indices") or {}
    return found if isinstance(found, dict) else {"embed": found}


def _file_of_kohya() -> Subject:
    def files(seed: int) -> Files:
        draw = _Draw(seed)
        tensors = {
            "lora_head.lora_down.weight": draw(2, 6),
            "lora_head.lora_up.weight": draw(3, 2),
            "lora_head.alpha": draw(),
            "lora_layers_0_fc.hada_w1_a": draw(4, 2),
            "lora_layers_0_fc.hada_w1_b": draw(2, 4),
            "lora_layers_0_fc.hada_w2_a": draw(4, 2),
            "lora_layers_0_fc.hada_w2_b": draw(2, 4),
            "lora_layers_0_fc.alpha": draw(1),
            "lora_layers_1_fc.lokr_w1": draw(2, 2),
            "lora_layers_1_fc.lokr_w2_a": draw(2, 1),
            "lora_layers_1_fc.lokr_w2_b": draw(1, 2),
            "lora_conv.lora_down.weight": draw(2, 4, 1),
            "lora_conv.lora_mid.weight": draw(2, 2, 2),
            "lora_conv.lora_up.weight": draw(6, 2, 1),
        }
        return {"x.safetensors": tensor_bytes(tensors)}

    def judge(loaded: Any, folder: Path) -> str:
        found = kohya_updates(tensors_of((folder / "x.safetensors").read_bytes()))
        short = {
            f"lora_{m.rpartition('.')[0].replace('.', '_')}": m for m in _PLACES if "weight" in m
        }
        return _difference(loaded.adapter, {short[m]: x for m, x in found.items()}, {})

    def load(folder: Path) -> Any:
        return jl.peft.load_kohya(folder / "x.safetensors", _BASE, _NAMES)

    return Subject("kohya", files(1), files(2), load, judge)


def _folder_of_weights() -> Subject:
    """Whole parameters in three files, with the index that says which has what."""
    index_name = "model.safetensors.index.json"

    def files(seed: int) -> Files:
        draw = _Draw(seed)
        found: Files = {}
        index: dict[str, str] = {}
        for k in range(3):
            tensors = {f"layers.{k}.fc.weight": draw(4, 3), f"layers.{k}.fc.bias": draw(4)}
            found[f"model-{k}.safetensors"] = tensor_bytes(tensors)
            index |= dict.fromkeys(tensors, f"model-{k}.safetensors")
        found[index_name] = json.dumps({"metadata": {}, "weight_map": index}).encode()
        return found

    def load(folder: Path) -> Any:
        return {name: np.asarray(x) for name, x in open_weights(folder).items()}

    def judge(loaded: Any, folder: Path) -> str:
        index = json.loads((folder / index_name).read_text())["weight_map"]
        if loaded.keys() != index.keys():
            return "has other tensors than the index"
        for name, file in index.items():
            expected = tensors_of((folder / file).read_bytes())[name]
            if loaded[name].dtype != expected.dtype or wrong(loaded[name], expected):
                return f"{name}: has other numbers"
        return ""

    def wrong(x: np.ndarray, y: np.ndarray) -> bool:
        return x.shape != y.shape or x.tobytes() != y.tobytes()

    return Subject("weights", files(1), files(2), load, judge)


def _difference(
    adapter: jl.Adapter, expected: Mapping[str, np.ndarray], rows: Mapping[str, list[int]]
) -> str:
    """How an adapter differs from what it should be, by torch's names; empty if it does not."""
    bases = leaves_by_path(_BASE)
    names = {name.partition(" ")[0] for name in expected}
    paths = {_PLACES[name][0] for name in names}
    if set(adapter) != paths:
        return f"adapts {sorted(adapter)} and not {sorted(paths)}"
    for name, (path, at, turned) in _PLACES.items():
        if path not in paths:
            continue
        entry, base = adapter[path], bases[path].astype(np.float64)
        update, value, more = _numbers(entry, base)
        if f"{name} rows" in expected:
            wanted = base.copy()
            wanted[rows[name]] = expected[f"{name} rows"]
            wrong = _far(value, wanted)
        elif name not in expected:
            wrong = _far(update[at], np.zeros_like(update[at]))
        elif isinstance(entry, (jl.FullValue, jl.RowValues)):
            wrong = _far(turned(value[at]), expected[name])
        else:
            wrong = _far(turned(update[at]), expected[name].reshape(turned(update[at]).shape))
            magnitude = expected.get(f"{name} magnitude")
            if not wrong and (magnitude is None) is not (more is None):
                wrong = "is DoRA in one of both alone"
            elif not wrong and magnitude is not None and more is not None:
                wrong = _far(more[at], magnitude)
        if wrong:
            return f"{name}: {wrong}"
    return ""


def _numbers(entry: Any, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The update, the new value, and DoRA's magnitudes, in float64; of DoRA the direction's."""
    x = {name: np.asarray(y).astype(np.float64) for name, y in entry.arrays().items()}
    if isinstance(entry, jl.FullValue):
        return x["value"] - base, x["value"], None
    if isinstance(entry, jl.RowValues):
        value = base.copy()
        value[list(entry.rows)] = x["value"]
        return value - base, value, None
    layout = entry.layout
    shape = (*layout.stack, layout.fan_in, -1), (*layout.stack, -1, layout.fan_out)
    if isinstance(entry, jl.LohaFactors):
        both = [x[f"a{k}"].reshape(shape[0]) @ x[f"b{k}"].reshape(shape[1]) for k in "12"]
        update = both[0] * both[1]
    elif isinstance(entry, jl.LokrFactors):
        product = x["a"] @ x["b"]
        update = np.stack(
            [np.kron(c, ab) for c, ab in zip(_flat(x["c"]), _flat(product), strict=True)]
        )
    else:
        update = x["a"].reshape(shape[0]) @ x["b"].reshape(shape[1])
    update = update.reshape(
        *layout.stack, *(layout.shape[i] for i in (*layout.in_axes, *layout.out_axes))
    )
    order = (*layout.stack_axes, *layout.in_axes, *layout.out_axes)
    update = x["scale"] * update.transpose([order.index(i) for i in range(len(order))])
    more = x.get("magnitude")
    if more is not None:
        norm = np.sqrt((base**2).sum(layout.in_axes))
        assert not _far(x["base_norm"], norm)
    return update, base + update, more


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])


def _far(found: np.ndarray, expected: np.ndarray) -> str:
    if found.shape != expected.shape:
        return f"shape {found.shape} and not {expected.shape}"
    size = float(np.abs(expected).max(initial=0))
    error = float(np.abs(found - expected).max(initial=0))
    # A part that is tiny beside the largest may be rounded away where layers have other scales.
    return f"off by {error:g} beside {size:g}" if not error <= 1e-5 * size + 1e-37 else ""


def _adapter(seed: int) -> jl.Adapter:
    draw = _Draw(seed)
    full = jl.Layout((6, 4), (0,), (1,))
    stack = jl.Layout((2, 4, 3), (1,), (2,), (0,))
    scale = jnp.float32(1 / 3)

    def x(*shape: int, dtype: Any = None) -> jax.Array:
        return jnp.asarray(draw(*shape, dtype=dtype))

    half = jnp.bfloat16
    norms = {"magnitude": x(2, 3), "base_norm": x(2, 3)}
    return jl.Adapter(
        {
            "p/l1/kernel": jl.LoraFactors(x(6, 2), x(2, 4), scale, full),
            "p/l2/kernel": jl.LoraFactors(
                x(2, 4, 3, dtype=half), x(2, 3, 3, dtype=half), scale, stack
            ),
            "p/l3/kernel": jl.DoraFactors(x(2, 4, 1), x(2, 1, 3), scale, stack, **norms),
            "p/l4/kernel": jl.LohaFactors(x(6, 2), x(2, 4), x(6, 2), x(2, 4), scale, full),
            "p/l4/bias": jl.FullValue(x(4), (4,)),
            "p/embedding": jl.RowValues(x(2, 4), (1, 5), full),
        }
    )


def _saved(save: Callable[[Path], None]) -> Files:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "x"
        save(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def _checkpoint_of_adapter() -> Subject:
    config = jl.LoraConfig(rank=2, alpha=0.1, targets=(jl.Rule("**/kernel", variant="dora"),))
    adapters = [_adapter(seed) for seed in (1, 2)]
    files = [
        _saved(lambda path, k=k, x=x: jl.io.save_adapter(path, x, config, {"seed": k}))  # type: ignore[misc]
        for k, x in enumerate(adapters)
    ]

    def judge(loaded: Any, folder: Path) -> str:
        adapter, lora, metadata = loaded
        document = json.loads((folder / "config" / "metadata").read_text())
        if metadata != document["metadata"]:
            return "has other metadata"
        kept = {name: _listed(x) for name, x in (document["lora"] or {}).items()}
        stored = {name: _listed(x) for name, x in lora.to_json().items()} if lora else {}
        if any(stored.get(name) != x for name, x in kept.items()):
            return "has another configuration"
        if set(adapter) != set(document["entries"]):
            return "has other entries"
        for path, entry in adapter.items():
            if problems := entry.problems():
                return f"{path}: {problems[0]}"
            static = {"variant": entry.NAME}
            for field in dataclasses.fields(entry):
                if field.metadata.get("static"):
                    value = getattr(entry, field.name)
                    layout = isinstance(value, jl.Layout)
                    static[field.name] = dataclasses.asdict(value) if layout else value
            if json.loads(json.dumps(static)) != document["entries"][path]:
                return f"{path}: has other static fields"
        arrays = {f"{path}/{n}": x for path, e in adapter.items() for n, x in e.arrays().items()}
        return _other_bits(arrays, document["arrays"])

    return Subject("checkpoint of an adapter", files[0], files[1], jl.io.load_adapter, judge)


def _checkpoint_of_params() -> Subject:
    trees = []
    for seed in (1, 2):
        draw = _Draw(seed)
        trees.append(
            {
                "params": {"l1": {"kernel": draw(6, 4), "bias": draw(4, dtype=jnp.bfloat16)}},
                "list": [draw(3), np.arange(3, dtype=np.uint8), np.array([True, False])],
                "empty": {},
                "odd": np.array([np.nan, -0.0, np.inf], np.float32),
            }
        )
    files = [_saved(lambda path, x=x: jl.io.save_params(path, x, {"a": 1})) for x in trees]  # type: ignore[misc]
    structures = {str(jax.tree.structure(x)) for x in trees}

    def judge(loaded: Any, folder: Path) -> str:
        params, metadata = loaded
        document = json.loads((folder / "config" / "metadata").read_text())
        if metadata != document["metadata"]:
            return "has other metadata"
        if str(jax.tree.structure(params)) not in structures:
            return f"has another structure: {jax.tree.structure(params)}"
        return _other_bits(leaves_by_path(params), document["arrays"])

    return Subject("checkpoint of parameters", files[0], files[1], jl.io.load_params, judge)


def _listed(value: Any) -> Any:
    """A single pattern is a list of one."""
    return [value] if isinstance(value, str) else value


def _other_bits(arrays: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """Whether arrays are those that were described when they were written."""
    if arrays.keys() != described.keys():
        return "has other arrays"
    for name, x in arrays.items():
        y = np.ascontiguousarray(np.asarray(x))
        found = {
            "shape": list(np.shape(x)),
            "dtype": str(y.dtype),
            "crc32": zlib.crc32(y.tobytes()),
        }
        if found != described[name]:
            return f"{name}: has other numbers"
    return ""
