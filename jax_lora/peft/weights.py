"""Whole parameters, merged or not, as the safetensors that PyTorch's libraries load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.algebra import merge
from jax_lora.errors import CheckpointError
from jax_lora.peft.files import listed, new_folder, write_json
from jax_lora.peft.names import Name
from jax_lora.peft.parts import has_values
from jax_lora.peft.places import Place, places_of
from jax_lora.peft.tensors import DTYPES, StoredArray, TensorFile, read_json, write_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def save_weights(
    folder: str | Path,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any] | None = None,
    *,
    adapter: Adapter | None = None,
    shard_bytes: int = 5_000_000_000,
) -> dict[str, str]:
    """Write parameters under torch's names and in torch's shapes, with an adapter merged into them.

    Up to ``shard_bytes`` they are one file, ``model.safetensors``. Above it they are several, with
    ``model.safetensors.index.json`` that says which has what: what ``from_pretrained`` of
    transformers reads. One shard at a time is in memory, and so are merged parameters.

    Args:
        folder: A folder that does not exist yet, or is empty.
        params: The parameters.
        names: What torch calls each parameter, as rules; see `Name`.
        layouts: The roles of the parameters' axes, as for `load`.
        adapter: What is merged into each parameter when it is written, as `jl.merge` does.
        shard_bytes: The most that one file holds, unless a single parameter is larger.

    Returns:
        Our path by torch's name.

    Raises:
        CheckpointError: Parameters without a name, or without what their transposition needs; all
            of them at once. Or the folder holds something, or cannot be written.
        AdapterError: The adapter does not fit the parameters.
        ConfigError: The rules do not fit the parameters.
    """
    if adapter is not None:
        check_fits(params, adapter)
    places = places_of(params, names, layouts)
    leaves = leaves_by_path(params)
    problems = _problems(places, leaves, adapter or {})
    if type(shard_bytes) is not int or shard_bytes < 1:
        problems.append(f"expected shard_bytes to be a positive integer, got {shard_bytes!r}")
    if problems:
        raise CheckpointError(f"{folder}: cannot be written:\n  {listed(problems)}")
    # Those of one parameter together, so that a stacked one is merged once.
    sizes = {
        name: math.prod(place.torch_shape) * np.dtype(leaves[place.path].dtype).itemsize
        for name, place in sorted(places.items(), key=lambda x: (x[1].path, x[0]))
    }
    shards = _shards(sizes, shard_bytes)
    held: dict[str, str] = {}
    with new_folder(folder) as partial:
        for k, shard in enumerate(shards):
            file = WEIGHTS
            if len(shards) > 1:
                file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            held |= dict.fromkeys(shard, file)
            write_tensors(partial / file, _tensors(shard, places, leaves, adapter))
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": held}
            write_json(partial / INDEX, index)
    return {name: places[name].path for name in held}


def open_weights(path: str | Path) -> dict[str, StoredArray]:
    """The tensors of a safetensors file, or of a folder as `save_weights` writes it, by name.

    Nothing but the headers is read: a tensor is when its values are asked for.

    Raises:
        CheckpointError: A file is missing or damaged, or the index and the files do not agree; an
            index that names anything but files beside it.
    """
    where = Path(path).expanduser().absolute()
    if not where.is_dir():
        return _arrays(TensorFile.open(where))
    if not (where / INDEX).is_file():
        return _arrays(TensorFile.open(where / WEIGHTS))
    index = read_json(where / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(map(_is_beside, index.values())):
        raise CheckpointError(
            f"{where / INDEX}: expected a weight_map that names files of this folder by tensor, "
            "found something else"
        )
    found: dict[str, StoredArray] = {}
    problems = []
    for name in sorted(set(index.values())):
        arrays = _arrays(TensorFile.open(where / name))
        odd = arrays.keys() ^ {x for x, file in index.items() if file == name}
        problems += [f"{x}: is in only one of the index and {name}" for x in sorted(odd)]
        found |= arrays
    if problems:
        raise CheckpointError(f"{where / INDEX}: does not fit its files:\n  {listed(problems)}")
    return found


def _arrays(file: TensorFile) -> dict[str, StoredArray]:
    return {name: StoredArray(file, name) for name in file.tensors}


def _is_beside(name: Any) -> bool:
    """Whether a name from a file is that of a file in the same folder, and no path out of it."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _problems(
    places: Mapping[str, Place], leaves: Mapping[str, Any], adapter: Mapping[str, Any]
) -> list[str]:
    named = {place.path for place in places.values()}
    problems = [f"{path}: no rule names it" for path in leaves if path not in named]
    for path in sorted(named):
        if not has_values(leaves[path]):
            problems.append(f"{path}: expected an array, got its shape")
            continue
        dtype = np.dtype(leaves[path].dtype)
        if dtype not in DTYPES.values():
            problems.append(f"{path}: expected a dtype that safetensors has, got {dtype}")
        elif dtype == np.float64 and path in adapter and not jax.config.read("jax_enable_x64"):
            problems.append(f"{path}: is float64, which jax merges only with jax_enable_x64")
    return problems + [f"{x.path}: {y}" for x in places.values() if (y := x.problem_of_value())]


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, as many together as fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _tensors(
    shard: Iterable[str],
    places: Mapping[str, Place],
    leaves: Mapping[str, Any],
    adapter: Adapter | None,
) -> dict[str, np.ndarray]:
    tensors = {}
    path, value = "", None
    for name in shard:
        place = places[name]
        if place.path != path:
            path = place.path
            value = _value(leaves[path], adapter, path)
        tensors[name] = place.read(value)
    return tensors


def _value(leaf: Any, adapter: Adapter | None, path: str) -> np.ndarray:
    """The parameter, merged if it is adapted."""
    value = np.asarray(leaf)
    if adapter is None or path not in adapter:
        return value
    return np.asarray(merge({path: jnp.asarray(value)}, Adapter({path: adapter[path]}))[path])
