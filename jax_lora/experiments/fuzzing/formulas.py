"""What adapters' files say, by readers of their own: no line is shared with the library's."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    **{f"{x}{8 * n}": f"{kind}{n}" for x, kind in (("I", "i"), ("U", "u")) for n in (1, 2, 4, 8)},
    "BOOL": "?",
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_PREFIX = "base_model.model."


def tensor_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in tensors.items():
        places = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": _CODES[x.dtype], "shape": x.shape, "data_offsets": places}
        data += x.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors_of(content: bytes) -> Tensors:
    """All tensors of a safetensors file, and by the format's own package the same, if it is there.

    Raises:
        AssertionError: The package reads something else.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[begin:end], np.dtype(_DTYPES[entry["dtype"]]))
            found[name] = values.reshape(entry["shape"])
    try:
        from safetensors import deserialize
    except ModuleNotFoundError:
        return found
    theirs = dict(deserialize(content))
    assert theirs.keys() == found.keys()
    for name, entry in theirs.items():
        assert bytes(entry["data"]) == found[name].tobytes()
        assert list(entry["shape"]) == list(found[name].shape)
    return found


def peft_updates(config: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """By the name of torch's parameter, the update or the new value, in float64.

    For DoRA it is the update of its direction, with the magnitudes under the parameter's name and
    ``magnitude``; for trained tokens their values under ``rows``.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    found: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        assert key.startswith(_PREFIX)
        name = key.removeprefix(_PREFIX)
        x = value.astype(np.float64)
        part = re.fullmatch(
            r"(.*)\.((?:lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?"
            r"|(?:hada|lokr)_\w+|token_adapter\.trainable_tokens_delta|base_layer\.\w+)",
            name,
        )
        if part is None:
            found[name] = x
        elif part[2] == "base_layer.bias":
            found[f"{part[1]}.bias"] = x
        elif part[2].startswith("token_adapter"):
            found[f"{part[1]}.weight rows"] = x
        else:
            parts.setdefault(part[1], {})[part[2].removesuffix(".weight")] = x
    for module, mine in parts.items():
        update = _update(mine) * _scale(config, module)
        found[f"{module}.weight"] = update
        if "lora_magnitude_vector" in mine:
            found[f"{module}.weight magnitude"] = mine["lora_magnitude_vector"].reshape(-1)
    return found


def kohya_updates(tensors: Tensors) -> dict[str, np.ndarray]:
    """By the name of the module in the file, the update in float64."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        module, _, end = key.partition(".")
        parts.setdefault(module, {})[end] = value.astype(np.float64)
    found = {}
    for module, mine in parts.items():
        alpha = mine.pop("alpha", None)
        rank = 1
        if "lora_down.weight" in mine:
            down, up = mine["lora_down.weight"], mine["lora_up.weight"]
            rank = len(down)
            flat = up.reshape(len(up), -1)
            if "lora_mid.weight" in mine:
                core = np.einsum("ij...,jc->ic...", mine["lora_mid.weight"], down.reshape(rank, -1))
                found[module] = np.einsum("oi,i...->o...", flat, core)
            else:
                found[module] = np.einsum("or,r...->o...", flat, down)
        else:
            found[module] = _update(mine)
            ranks = [len(mine[x]) for x in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if x in mine]
            if not ranks:
                alpha = None  # LoKr of two whole matrices
            rank = ranks[0] if ranks else 1
        if alpha is not None:
            found[module] = found[module] * alpha.reshape(()) / rank
    return found


def _scale(config: Mapping[str, Any], module: str) -> float:
    def of(field: str, default: Any) -> Any:
        for pattern, value in (config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    lora = config["peft_type"] == "LORA"
    rank = of("rank_pattern", config["r"])
    alpha = of("alpha_pattern", config["lora_alpha" if lora else "alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _update(x: Mapping[str, np.ndarray]) -> np.ndarray:
    """The update as torch has it, ``[out, in]`` or a table's ``[rows, width]``, flattened so."""
    if "lora_embedding_A" in x:
        return (x["lora_embedding_B"] @ x["lora_embedding_A"]).T
    if "lora_A" in x:
        a, b = x["lora_A"], x["lora_B"]
        return np.einsum("or,r...->o...", b.reshape(len(b), -1), a)
    if "hada_w1_a" in x:
        if "hada_t1" in x:
            one, two = (
                np.einsum(
                    "ij...,ip,jr->pr...", x[f"hada_t{k}"], x[f"hada_w{k}_a"], x[f"hada_w{k}_b"]
                )
                for k in "12"
            )
            return one * two
        return (x["hada_w1_a"] @ x["hada_w1_b"]) * (x["hada_w2_a"] @ x["hada_w2_b"])
    w1 = x["lokr_w1"] if "lokr_w1" in x else x["lokr_w1_a"] @ x["lokr_w1_b"]
    if "lokr_w2" in x:
        w2 = x["lokr_w2"]
    elif "lokr_t2" in x:
        w2 = _tucker(x["lokr_t2"], x["lokr_w2_a"], x["lokr_w2_b"])
    else:
        w2 = x["lokr_w2_a"] @ x["lokr_w2_b"]
    # The directions of a convolution go along with the inputs of the second matrix.
    return np.kron(w1, w2.reshape(len(w2), w2.shape[1] if w2.ndim == 2 else -1))


def _tucker(core: np.ndarray, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return np.einsum("ij...,ip,jr->pr...", core, outer, inner)
