"""Base parameters on disk, and what torch calls them, where there is no function to ask."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter
from jax_lora.errors import CheckpointError, ConfigError, JaxLoraError
from jax_lora.io import load_params
from jax_lora.peft.files import CONFIG, PREFIX, TENSORS
from jax_lora.peft.names import Kind, Name, Rules
from jax_lora.peft.tensors import TensorFile, parse_json, read_json
from jax_lora.peft.weights import INDEX, WEIGHTS, open_weights

Format = Literal["peft", "kohya", "jax_lora", "weights"]
#: The axes of what torch has, by the kind of module.
_TORCH_AXES: dict[Kind, str] = {"linear": "oi", "conv1d": "io", "embedding": "io"}


@dataclasses.dataclass(frozen=True)
class Base:
    """What an adapter is for.

    Attributes:
        params: The parameters; shapes alone where no values are there.
        names: What torch calls them, with the kind and the axes of each matrix.
    """

    params: Any
    names: tuple[Name, ...]


def format_of(path: Path) -> Format:
    """What a file or a folder is: an adapter of PEFT, of kohya, a checkpoint, or weights of torch.

    Raises:
        CheckpointError: It is nothing of these.
    """
    if path.is_file():
        return "kohya"
    for file, found in ((CONFIG, "peft"), (WEIGHTS, "weights"), (INDEX, "weights")):
        if (path / file).is_file():
            return found  # type: ignore[return-value]
    if (path / "arrays").is_dir() and (path / "config").is_dir():
        return "jax_lora"
    held = "nothing" if not path.is_dir() else ", ".join(sorted(p.name for p in path.iterdir())[:9])
    raise CheckpointError(
        f"{path}: expected a folder with {CONFIG} or {WEIGHTS}, a checkpoint of jax_lora, or a "
        f"file of safetensors, found {held}"
    )


def read_rules(path: Path) -> tuple[Name, ...]:
    """Rules of names from a file: a JSON list of objects, or TOML with a table ``names`` for each.

    Raises:
        CheckpointError: The file is missing or no such file.
        ConfigError: A rule that cannot mean anything.
    """
    try:
        text = path.read_bytes()
        if path.suffix == ".toml":
            found = tomllib.loads(text.decode()).get("names")
        else:
            found = parse_json(path, b'{"names": ' + text + b"}")["names"]
    except (OSError, ValueError) as error:
        if isinstance(error, JaxLoraError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, list) or not found:
        raise CheckpointError(f"{path}: expected a list of rules, found {type(found).__name__}")
    return tuple(Name.from_json(rule) for rule in found)


def open_base(path: Path, rules: tuple[Name, ...], adapter: Path | None) -> Base:
    """The base at a path.

    Weights of torch keep their names and shapes, unless rules say what their modules are called in
    memory, or what a matrix is. Parameters of a checkpoint need a rule each.

    Raises:
        CheckpointError: It cannot be read, or what a matrix is in torch cannot be told.
        ConfigError: A checkpoint, and no rules.
    """
    found = format_of(path)
    if found in ("weights", "kohya"):
        arrays = open_weights(path)
        shapes = {name: x.shape for name, x in arrays.items()}
        return Base(arrays, tuple(torch_names(shapes, rules, adapter)))
    if found != "jax_lora":
        raise CheckpointError(f"{path}: expected the base parameters, found an adapter")
    if not rules:
        raise ConfigError(
            f"{path}: expected rules for a base that does not have torch's names; give --names, a "
            "file with the path, name, kind and axes of each"
        )
    return Base(load_params(path)[0], rules)


def shapes_of(adapter: Adapter, names: Iterable[Name]) -> Base:
    """A base of which nothing is known but what an adapter of it says."""
    shapes = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in adapter.items()}
    return Base(shapes, tuple(names))


def torch_names(
    shapes: Mapping[str, tuple[int, ...]], rules: Iterable[Name], adapter: Path | None
) -> list[Name]:
    """A rule for each parameter as torch has it on disk: its name, its kind and its axes.

    A matrix is that of a linear layer, unless an adapter of PEFT says that it is a table or one of
    GPT-2's, whose weights are ``[in, out]``, or a rule says so.

    Args:
        shapes: The shapes by name.
        rules: What is not plain: names in memory that are others than on disk, kinds and axes.
        adapter: An adapter for these parameters.

    Raises:
        CheckpointError: A square matrix that could be either.
    """
    given = Rules(rules)
    named = {}
    for path in shapes:
        decided = given.of(path)
        named[path] = (decided[0].fill(decided[1]), decided[0]) if decided else (path, None)
    from_peft = adapter is not None and format_of(adapter) == "peft"
    told = {named[path][0]: shape for path, shape in shapes.items() if not _says_kind(named[path])}
    kinds = _kinds(told, adapter) if from_peft and adapter else {}
    names = []
    for path, shape in shapes.items():
        name, rule = named[path]
        if rule is not None and rule.kind:
            names.append(dataclasses.replace(rule, path=path, name=name))
            continue
        kind, axes = _usual(shape)
        if name in kinds:
            kind = kinds[name]
            axes = _TORCH_AXES[kind]
        plain = kind is None or not name.endswith(".weight")
        names.append(Name(path, name) if plain else Name(path, name, kind, axes))
    return names


def _says_kind(named: tuple[str, Name | None]) -> bool:
    return named[1] is not None and named[1].kind is not None


def _usual(shape: tuple[int, ...]) -> tuple[Kind | None, str]:
    """What torch's weight of a shape mostly is, and its axes."""
    if len(shape) == 2:
        return "linear", _TORCH_AXES["linear"]
    if 2 < len(shape) < 6:
        return "conv", "oi" + "dhw"[2 - len(shape) :]
    return None, ""


def _kinds(shapes: Mapping[str, tuple[int, ...]], adapter: Path) -> dict[str, Kind]:
    """What the modules of an adapter are, by their weights' names, where that is not plain."""
    tensors = TensorFile.open(adapter / TENSORS).tensors
    turned = read_json(adapter / CONFIG).get("fan_in_fan_out") is True
    kinds: dict[str, Kind] = {}
    square = []
    told: set[Kind] = {"conv1d" if turned else "linear"}
    for key, stored in tensors.items():
        module, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        name = f"{module}.weight"
        if end.startswith("embedding_"):
            kinds[name] = "embedding"
        if end != "A.weight" or len(shapes.get(name, ())) != 2:
            continue
        out = tensors.get(f"{PREFIX}{module}.lora_B.weight")
        lora = (out.shape[:1] if out else ()) + stored.shape[1:]
        if shapes[name][0] == shapes[name][1]:
            square.append(name)
        elif shapes[name] == lora[::-1]:
            kinds[name] = "conv1d"
            told.add("conv1d")
        else:
            told.add("linear")
    if square and "conv1d" in told and len(told) > 1:
        raise CheckpointError(
            f"{adapter}: adapts linear layers and layers of GPT-2's kind, [in, out], and which of "
            f"them these square matrices are cannot be told: {', '.join(square[:9])}; give --names "
            'with kind = "linear", axes = "oi" or kind = "conv1d", axes = "io" for them'
        )
    return kinds | {name: "conv1d" for name in square if "conv1d" in told}
