"""Adapters that Hugging Face PEFT wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_lora.adapter import Adapter, leaves_by_path
from jax_lora.errors import CheckpointError, near_misses
from jax_lora.peft.config import PeftConfig
from jax_lora.peft.entries import Factors, build, has_values, problem_of_value
from jax_lora.peft.files import CONFIG, PREFIX, TENSORS
from jax_lora.peft.names import Name, Place, places_of
from jax_lora.peft.tensors import FLOATS, TensorFile, read_json

#: What a key of a LoRA module ends with.
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "base",
}


class Loaded(NamedTuple):
    """What `load` returns.

    Attributes:
        adapter: The adapter.
        config: What ``adapter_config.json`` holds: the base's name, the rate of dropout, and so on.
        names: By the name of each of torch's parameters that the file adapts, our path.
    """

    adapter: Adapter
    config: dict[str, Any]
    names: dict[str, str]


def load(
    folder: str | Path,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any],
    *,
    start: str | Path | None = None,
) -> Loaded:
    """Read an adapter that PEFT wrote: ``adapter_config.json`` and safetensors.

    Every key of the file has to belong to a parameter of ``params``, and every module that the
    configuration names has to have its keys: all that does not fit is one error. The factors keep
    their dtype. Where the layers of a stacked parameter have different ranks, the smaller are
    padded with zeros; where they have different scales, these are taken into ``b``; a layer that
    the file does not adapt has zeros, which do not move in training either. Modules that are
    trained whole (``modules_to_save``) become values of variant ``full``.

    Args:
        folder: The folder with both files.
        params: The base parameters.
        names: What torch calls each parameter, as rules; see `Name`. A pair is a rule, too.
        layouts: The roles of the parameters' axes: ``jl.discover(fun, params, x)``,
            ``plan.targets``, or `Layout` by path.
        start: For an adapter that started from parts of the base (PiSSA, OLoRA, CorDA, LoRA-GA),
            which PEFT subtracts from the base: a folder with the adapter as it was then. The
            result is the difference of both, for the base as it was before.

    Raises:
        CheckpointError: A file is missing or damaged, a field of the configuration is set that is
            not implemented, or keys, shapes or ranks do not fit; all of them at once.
        ConfigError: The rules do not fit the parameters.
        AdapterError: The base parameters' values are needed, and there are only shapes.
    """
    path, config, stored, file = _open(folder)
    places = places_of(params, names, layouts)
    problems: list[str] = []
    found = _sort_keys(file, config, places, problems)
    first: dict[str, Factors] = {}
    if config.start and start is None:
        problems.append(
            f"{CONFIG}: init_lora_weights is {config.start!r}: PEFT subtracted the factors at the "
            "start from the base, so that on the plain base this adapter is another model; pass "
            "start=, a folder with the adapter before training, or convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif start is not None:
        first = _read_start(start, config, places, problems)
    factors = _read_factors(file, config, places, found, problems, params)
    if start is not None and first.keys() != factors.keys():
        odd = sorted(first.keys() ^ factors.keys())
        problems += [f"{name}: is only in one of the adapter and its start" for name in odd]
    for name in sorted(factors.keys() & first.keys()):
        then, now = first[name], factors[name]
        if (then.a.shape, then.scale) != (now.a.shape, now.scale):
            problems.append(f"{name}: has another rank or scale than at the start")
        else:
            factors[name] = dataclasses.replace(now, a0=then.a, b0=then.b)
    values = _read_values(file, config, places, found, problems)
    if problems:
        raise CheckpointError(
            f"{path}: the adapter does not fit these parameters:\n  " + "\n  ".join(problems)
        )
    adapter = build(str(path), params, places, factors, values)
    used = {name: places[name].path for name in sorted({*factors, *values})}
    return Loaded(adapter, stored, used)


def check_pair(place: Place, rank: int, a: tuple[int, ...], b: tuple[int, ...]) -> list[str]:
    """What is wrong with the shapes of a module's factors."""
    problems = []
    for letter, found, expected in (
        ("A", a, place.a_shape(rank)),
        ("B", b, place.b_shape(rank)),
    ):
        if found != expected:
            problems.append(f"{place.name}: expected {letter} of shape {expected}, found {found}")
    return problems


def read_numbers(file: TensorFile, key: str, problems: list[str]) -> np.ndarray | None:
    """A tensor of finite numbers; None, with the problem noted, if it is something else."""
    if file.tensors[key].dtype not in FLOATS:
        problems.append(f"{key}: expected {', '.join(FLOATS)}, found {file.tensors[key].dtype}")
        return None
    value = file.read(key)
    wide = value.astype(np.float32) if value.dtype.itemsize < 4 else value
    if not np.isfinite(wide).all():
        problems.append(f"{key}: holds NaN or infinite numbers")
        return None
    if value.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        problems.append(f"{key}: is float64, which jax has only with jax_enable_x64")
        return None
    return value


def _open(folder: str | Path) -> tuple[Path, PeftConfig, dict[str, Any], TensorFile]:
    path = Path(folder).expanduser().absolute()
    try:
        _check_folder(folder, path)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    stored = read_json(path / CONFIG)
    config = PeftConfig.from_json(str(path / CONFIG), stored)
    return path, config, stored, TensorFile.open(path / TENSORS)


def _check_folder(folder: str | Path, path: Path) -> None:
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.glob("[!.]*/")) if path.parent.is_dir() else []
        beside = f"; beside it: {', '.join(near[:9])}" if near else ""
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG}, found none{beside}")
    if not (path / TENSORS).is_file():
        pickled = " (a .bin file is a pickle, which can run any code: it is never read)"
        held = ", ".join(sorted(p.name for p in path.iterdir())[:9]) or "nothing"
        raise CheckpointError(
            f"{folder}: expected {TENSORS}, found {held}{pickled if '.bin' in held else ''}"
        )


class _Found(NamedTuple):
    """The keys of a file: of factors, by torch's parameter and part, and of whole values."""

    factors: dict[str, dict[str, str]]
    values: dict[str, str]


def _sort_keys(
    file: TensorFile, config: PeftConfig, places: Mapping[str, Place], problems: list[str]
) -> _Found:
    """Every key with its parameter, and every parameter that is meant with its keys."""
    found = _Found({}, {})
    modules = {place.module: name for name, place in places.items() if place.is_weight}
    for key in sorted(file.tensors):
        if not key.startswith(PREFIX):
            problems.append(f"{key}: expected a name that begins with {PREFIX!r}")
            continue
        rest = key.removeprefix(PREFIX)
        end = next((end for end in _PARTS if rest.endswith(end)), None)
        if end is None:
            if rest not in places:
                problems.append(f"{key}: {unknown('parameter', rest, places, problems)}")
            elif not config.is_saved(places[rest].module):
                problems.append(f"{key}: its module is not in modules_to_save")
            else:
                found.values[rest] = key
            continue
        module = rest.removesuffix(end)
        if module not in modules:
            problems.append(f"{key}: {unknown('module', module, modules, problems)}")
        elif not config.is_target(module):
            problems.append(f"{key}: the configuration does not adapt {module!r}")
        else:
            parts = found.factors.setdefault(modules[module], {})
            if _PARTS[end] in parts:
                problems.append(f"{key}: {parts[_PARTS[end]]!r} is the same")
            parts[_PARTS[end]] = key
    for module, name in modules.items():
        known = places[name].layout is not None
        if known and name not in found.factors and config.is_target(module):
            problems.append(f"{module}: the configuration adapts it, and the file has no such key")
    for name, place in places.items():
        if config.is_saved(place.module) and name not in found.values:
            problems.append(f"{name}: is in modules_to_save, and the file has no such key")
    return found


def _read_factors(
    file: TensorFile,
    config: PeftConfig,
    places: Mapping[str, Place],
    found: _Found,
    problems: list[str],
    params: Any,
) -> dict[str, Factors]:
    factors = {}
    leaves = leaves_by_path(params) if any("base" in p for p in found.factors.values()) else {}
    for name, parts in found.factors.items():
        place = places[name]
        table = "embedding " if "embedding A" in parts or "embedding B" in parts else ""
        wanted = {f"{table}A", f"{table}B"} | ({"magnitude"} if config.dora else set())
        if set(parts) - {"base"} != wanted:
            problems.append(
                f"{place.module}: expected keys for {', '.join(sorted(wanted))}, found "
                f"{', '.join(sorted(parts))}"
            )
            continue
        if problem := place.problem_of_factors():
            problems.append(f"{place.path}: {problem}")
            continue
        if bool(table) != (place.kind == "embedding"):
            what = "an embedding" if table else "no embedding"
            problems.append(f"{name}: is {what} in the file, and of kind {place.kind!r} here")
            continue
        shape = {part: file.tensors[key].shape for part, key in parts.items()}
        rank = config.rank_of(place.module)
        wrong = check_pair(place, rank, shape[f"{table}A"], shape[f"{table}B"])
        expected = place.magnitude_shapes()
        if config.dora and shape["magnitude"] not in expected:
            wrong.append(f"{name}: expected magnitudes {expected[0]}, found {shape['magnitude']}")
        if "base" in parts and shape["base"] != place.torch_shape:
            wrong.append(
                f"{name}: expected its base_layer of shape {place.torch_shape}, found "
                f"{shape['base']}; was it resized? Resize the base parameter, too"
            )
        if wrong:
            problems += wrong
            continue
        arrays = {part: read_numbers(file, key, problems) for part, key in parts.items()}
        a, b = arrays[f"{table}A"], arrays[f"{table}B"]
        if a is None or b is None:
            continue
        base = arrays.get("base")
        if base is not None and not _same_base(place, base, leaves[place.path]):
            problems.append(
                f"{name}: the file holds another base_layer for it; put that into the base "
                "parameters, or leave it out of the file"
            )
        scale = config.scale_of(place.module)
        factors[name] = Factors(a, b, scale, arrays.get("magnitude"))
    return factors


def _read_start(
    folder: str | Path, config: PeftConfig, places: Mapping[str, Place], problems: list[str]
) -> dict[str, Factors]:
    if config.start == "":
        problems.append(
            "start: expected none, as init_lora_weights leaves the base as it is and nothing is to "
            "be subtracted"
        )
    path, then, _, file = _open(folder)
    mine: list[str] = []
    found = _sort_keys(file, then, places, mine)
    factors = _read_factors(file, then, places, found, mine, {})
    problems += [f"{path.name}: {problem}" for problem in mine]
    return factors


def _read_values(
    file: TensorFile,
    config: PeftConfig,
    places: Mapping[str, Place],
    found: _Found,
    problems: list[str],
) -> dict[str, np.ndarray]:
    values = {}
    for name, key in found.values.items():
        place, shape = places[name], file.tensors[key].shape
        if problem := problem_of_value(place, tied=True):
            problems.append(f"{place.path}: {problem}")
        elif shape != place.torch_shape:
            problems.append(f"{key}: expected shape {place.torch_shape}, found {shape}")
        elif (value := read_numbers(file, key, problems)) is not None:
            values[name] = value
    return values


def _same_base(place: Place, base: np.ndarray, leaf: Any) -> bool:
    """Whether a base that a file holds is ours, to the rounding of the narrower dtype."""
    if not has_values(leaf):
        return False
    ours = place.to_torch(np.asarray(leaf)[place.where])
    narrow = min(base.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    return bool((base.astype(narrow) == ours.astype(narrow)).all())


def unknown(what: str, name: str, known: Iterable[str], problems: list[str]) -> str:
    """That nothing is called so, and what is nearly: not for the thousandth, which takes long."""
    nearest = f" ({near_misses(name, known)})" if len(problems) < 20 and len(name) < 300 else ""
    return f"no {what} is called {name!r}{nearest}"
