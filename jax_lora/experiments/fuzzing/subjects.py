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
from jax_lora.experiments.fuzzing.differences import difference
from jax_lora.experiments.fuzzing.examples import BASE, NAMES, PEFT, PLACES, Draw
from jax_lora.experiments.fuzzing.formulas import (
    Tensors,
    kohya_updates,
    peft_updates,
    tensor_bytes,
    tensors_of,
)
from jax_lora.experiments.fuzzing.mutations import Files
from jax_lora.peft.weights import open_weights

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


def subjects() -> list[Subject]:
    """One of every format and variant."""
    found = [
        _folder_of_peft(name, seeded[0], seeded[1])
        for name, seeded in ((n, (make(1), make(2))) for n, make in PEFT.items())
    ]
    more = (
        *(_file_of_kohya, _folder_of_weights),
        *(_checkpoint_of_adapter, _checkpoint_of_params, _checkpoint_of_training),
    )
    return [*found, *(make() for make in more)]


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
        return difference(loaded.adapter, expected, rows)

    def load(folder: Path) -> Any:
        return jl.peft.load(folder, BASE, NAMES)

    return Subject(name, files(*one), files(*other), load, judge)


def _rows_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    found = config.get("trainable_token_indices") or {}
    return found if isinstance(found, dict) else {"embed": found}


def _file_of_kohya() -> Subject:
    def files(seed: int) -> Files:
        draw = Draw(seed)
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
            f"lora_{m.rpartition('.')[0].replace('.', '_')}": m for m in PLACES if "weight" in m
        }
        return difference(loaded.adapter, {short[m]: x for m, x in found.items()}, {})

    def load(folder: Path) -> Any:
        return jl.peft.load_kohya(folder / "x.safetensors", BASE, NAMES)

    return Subject("kohya", files(1), files(2), load, judge)


def _folder_of_weights() -> Subject:
    """Whole parameters in three files, with the index that says which has what."""
    index_name = "model.safetensors.index.json"

    def files(seed: int) -> Files:
        draw = Draw(seed)
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


def _adapter(seed: int) -> jl.Adapter:
    draw = Draw(seed)
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
        draw = Draw(seed)
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


def _checkpoint_of_training() -> Subject:
    step = 3
    states = []
    for seed in (1, 2):
        draw = Draw(seed)
        trained = jl.Adapter({"p/l1/kernel": _adapter(seed)["p/l1/kernel"]})
        momentum = jax.tree.map(lambda x, draw=draw: jnp.asarray(draw(*x.shape)), trained)
        states.append((trained, {"momentum": momentum, "count": jnp.asarray(seed, jnp.int32)}))

    def save(path: Path, state: Any) -> None:
        with jl.io.Checkpoints(path) as checkpoints:
            position = jl.io.Position(epoch=1, step=1, batch_size=2, examples=4)
            keys = {"data": jax.random.key(step)}
            metrics, metadata = {"loss": 0.5}, {"losses": [1.0, 0.5]}
            checkpoints.save(
                step, *state, position=position, keys=keys, metrics=metrics, metadata=metadata
            )

    files = [_saved(lambda path, x=x: save(path, x)) for x in states]  # type: ignore[misc]

    def load(folder: Path) -> Any:
        return jl.io.Checkpoints(folder).restore(*states[0])

    def judge(loaded: Any, folder: Path) -> str:
        document = json.loads((folder / str(step) / "config" / "metadata").read_text())
        state = document["state"]
        told = {name: getattr(loaded, name) for name in ("step", "metrics")}
        told["position"] = dataclasses.asdict(loaded.position) if loaded.position else None
        if loaded.step != step or loaded.metadata != document["metadata"]:
            return "has another step or other metadata"
        if odd := [name for name, x in told.items() if x != state[name]]:
            return f"has another {odd[0]}"
        arrays = {f"p/l1/kernel/{n}": x for n, x in loaded.trained["p/l1/kernel"].arrays().items()}
        if problem := _other_bits(arrays, document["arrays"]):
            return problem
        keys = {name: jax.random.key_data(x) for name, x in loaded.keys.items()}
        training = leaves_by_path({"optimizer": loaded.opt_state, "keys": keys})
        return _other_bits(training, document["training"])

    return Subject("checkpoint of a training", files[0], files[1], load, judge)


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
