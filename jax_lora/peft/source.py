"""One folder of PEFT: which key is whose, and what its tensors say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_lora.adapter import leaves_by_path
from jax_lora.errors import CheckpointError, near_misses
from jax_lora.peft.config import PeftConfig
from jax_lora.peft.files import CONFIG, PREFIX, TENSORS
from jax_lora.peft.lycoris import LOHA, LOKR, loha, loha_problem, lokr, lokr_problem
from jax_lora.peft.parts import Part, has_values
from jax_lora.peft.places import Place
from jax_lora.peft.tensors import FLOATS, TensorFile, read_json

#: What a key of an adapted module ends with, by method.
_PARTS = {
    "LORA": {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_embedding_A": "embedding A",
        ".lora_embedding_B": "embedding B",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".base_layer.weight": "base",
    },
    "LOHA": {f".{name}": name for name in LOHA},
    "LOKR": {f".{name}": name for name in LOKR},
}
_ROWS = ".token_adapter.trainable_tokens_delta"
#: The bias of the layer within an adapted module, and those within one that is trained whole.
_BIAS = ".base_layer.bias"
_BIASES = (_BIAS, ".modules_to_save.bias", ".original_module.bias")


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


def unknown(what: str, name: str, known: Iterable[str], problems: list[str]) -> str:
    """That nothing is called so, and what is nearly: not for the thousandth, which takes long."""
    nearest = f" ({near_misses(name, known)})" if len(problems) < 20 and len(name) < 300 else ""
    return f"no {what} is called {name!r}{nearest}"


class Found(NamedTuple):
    """The keys of a file, by the name of torch's parameter.

    Attributes:
        parts: Of what an update is made of, by what each is.
        values: Of values of whole parameters.
        rows: Of trained rows.
        copies: Of copies of a value.
    """

    parts: dict[str, dict[str, str]]
    values: dict[str, str]
    rows: dict[str, str]
    copies: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter's folder, of which configuration and header have been read.

    Attributes:
        path: The folder.
        config: What the configuration says.
        stored: All that it holds.
        file: The tensors.
        places: Torch's parameters among ours.
    """

    path: Path
    config: PeftConfig
    stored: dict[str, Any]
    file: TensorFile
    places: Mapping[str, Place]

    @classmethod
    def open(cls, folder: str | Path, places: Mapping[str, Place]) -> Source:
        """Read a folder's configuration and header.

        Raises:
            CheckpointError: A file is missing or damaged, or the configuration is refused.
        """
        path = Path(folder).expanduser().absolute()
        try:
            _check_folder(folder, path)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from error
        stored = read_json(path / CONFIG)
        config = PeftConfig.from_json(str(path / CONFIG), stored)
        return cls(path, config, stored, TensorFile.open(path / TENSORS), places)

    def sort_keys(self, problems: list[str]) -> Found:
        """Every key with its parameter, and every parameter that is meant with its keys."""
        found = Found({}, {}, {}, {})
        modules = {place.module: name for name, place in self.places.items() if place.is_weight}
        for key in sorted(self.file.tensors):
            if not key.startswith(PREFIX):
                problems.append(f"{key}: expected a name that begins with {PREFIX!r}")
            else:
                self._sort(key, key.removeprefix(PREFIX), modules, found, problems)
        config, places = self.config, self.places
        for module, name in modules.items():
            known = places[name].layout is not None
            if known and name not in found.parts and config.is_target(module):
                problems.append(
                    f"{module}: the configuration adapts it, and the file has no such key"
                )
            if name not in found.rows and "" not in config.tokens and config.rows_of(module):
                problems.append(f"{module}: has trained tokens, and the file has no such key")
        if "" in config.tokens and len(found.rows) != 1:
            problems.append(f"expected trained tokens of one table, found {len(found.rows)}")
        for name, place in places.items():
            meant = "modules_to_save" if config.is_saved(place.module) else ""
            if not meant and place.is_bias and config.has_bias(place.module):
                meant = f"bias={config.bias!r}"
            if meant and name not in found.values:
                problems.append(f"{name}: is in {meant}, and the file has no such key")
        return found

    def _sort(
        self,
        key: str,
        rest: str,
        modules: Mapping[str, str],
        found: Found,
        problems: list[str],
    ) -> None:
        parts = _PARTS[self.config.method]
        end = next((end for end in (*parts, _ROWS) if rest.endswith(end)), None)
        if end is None:
            self._sort_value(key, rest, found, problems)
            return
        module = rest.removesuffix(end)
        if module not in modules:
            problems.append(f"{key}: {unknown('module', module, modules, problems)}")
        elif end == _ROWS:
            if self.config.rows_of(module) is None:
                problems.append(f"{key}: the configuration trains no tokens of {module!r}")
            found.rows[modules[module]] = key
        elif not self.config.is_target(module):
            problems.append(f"{key}: the configuration does not adapt {module!r}")
        else:
            mine = found.parts.setdefault(modules[module], {})
            if parts[end] in mine:
                problems.append(f"{key}: {mine[parts[end]]!r} is the same")
            mine[parts[end]] = key

    def _sort_value(self, key: str, rest: str, found: Found, problems: list[str]) -> None:
        wrapped = next((end for end in _BIASES if rest.endswith(end)), "")
        name = f"{rest.removesuffix(wrapped)}.bias" if wrapped else rest
        place = self.places.get(name)
        if place is None:
            problems.append(f"{key}: {unknown('parameter', name, self.places, problems)}")
        elif self.config.is_saved(place.module):
            if not wrapped:
                found.values[name] = key
            elif self.config.bias == "all" and wrapped != _BIAS:
                # PEFT then keeps the biases of what wraps such a module, too.
                found.copies.setdefault(name, []).append(key)
            else:
                problems.append(f"{key}: its module is in modules_to_save")
        elif not place.is_bias:
            problems.append(f"{key}: its module is not in modules_to_save")
        elif not self.config.has_bias(place.module):
            problems.append(
                f"{key}: its module is not in modules_to_save, and bias is {self.config.bias!r}"
            )
        elif wrapped != (_BIAS if self.config.is_target(place.module) else ""):
            # In a module that is adapted the bias is that of the layer within.
            problems.append(f"{key}: expected {_BIAS!r} of adapted modules, and of no others")
        else:
            found.values[name] = key

    def read_parts(self, found: Found, problems: list[str], params: Any) -> dict[str, Part]:
        """The update of every module."""
        parts = {}
        leaves = leaves_by_path(params) if any("base" in p for p in found.parts.values()) else {}
        for name, keys in found.parts.items():
            place = self.places[name]
            if problem := self._problem_of(place):
                problems.append(f"{place.path}: {problem}")
                continue
            read = self._lora if self.config.method == "LORA" else self._product
            part = read(place, keys, problems, leaves)
            if part is not None:
                parts[name] = part
        return parts

    def _problem_of(self, place: Place) -> str:
        if problem := place.problem_of_factors():
            return problem
        if self.config.method != "LORA" and place.kind == "embedding":
            return f"expected no embedding, which {self.config.method} does not have"
        return ""

    def _lora(
        self, place: Place, keys: Mapping[str, str], problems: list[str], leaves: Mapping[str, Any]
    ) -> Part | None:
        name, module, dora = place.name, place.module, self.config.dora
        table = "embedding " if "embedding A" in keys or "embedding B" in keys else ""
        wanted = {f"{table}A", f"{table}B"} | ({"magnitude"} if dora else set())
        if set(keys) - {"base"} != wanted:
            problems.append(
                f"{module}: expected keys for {', '.join(sorted(wanted))}, found "
                f"{', '.join(sorted(keys))}"
            )
            return None
        if bool(table) != (place.kind == "embedding"):
            what = "an embedding" if table else "no embedding"
            problems.append(f"{name}: is {what} in the file, and of kind {place.kind!r} here")
            return None
        shape = {part: self.file.tensors[key].shape for part, key in keys.items()}
        rank = self.config.rank_of(module)
        wrong = check_pair(place, rank, shape[f"{table}A"], shape[f"{table}B"])
        expected = place.magnitude_shapes()
        if dora and shape["magnitude"] not in expected:
            wrong.append(f"{name}: expected magnitudes {expected[0]}, found {shape['magnitude']}")
        if "base" in keys and shape["base"] != place.torch_shape:
            wrong.append(
                f"{name}: expected its base_layer of shape {place.torch_shape}, found "
                f"{shape['base']}; was it resized? Resize the base parameter, too"
            )
        if wrong:
            problems += wrong
            return None
        arrays = {part: read_numbers(self.file, key, problems) for part, key in keys.items()}
        a, b = arrays[f"{table}A"], arrays[f"{table}B"]
        if a is None or b is None:
            return None
        base = arrays.get("base")
        if base is not None and not _same_base(place, base, leaves[place.path]):
            problems.append(
                f"{name}: the file holds another base_layer for it; put that into the base "
                "parameters, or leave it out of the file"
            )
        magnitude = arrays.get("magnitude")
        return Part(
            {"a": place.a_from_torch(a), "b": place.b_from_torch(b)},
            self.config.scale_of(module),
            None if magnitude is None else magnitude.reshape(-1),
        )

    def _product(
        self, place: Place, keys: Mapping[str, str], problems: list[str], leaves: Mapping[str, Any]
    ) -> Part | None:
        check, make = (loha_problem, loha) if self.config.method == "LOHA" else (lokr_problem, lokr)
        shapes = {part: self.file.tensors[key].shape for part, key in keys.items()}
        if problem := check(place, shapes, self.config.rank_of(place.module)):
            problems.append(f"{place.name}: {problem}")
            return None
        read = {part: read_numbers(self.file, key, problems) for part, key in keys.items()}
        arrays = {part: x for part, x in read.items() if x is not None}
        return (
            make(place, arrays, self.config.scale_of(place.module))
            if len(arrays) == len(read)
            else None
        )

    def read_values(self, found: Found, problems: list[str]) -> dict[str, np.ndarray]:
        """The value of every parameter that is trained whole."""
        values = {}
        for name, key in found.values.items():
            place, shape = self.places[name], self.file.tensors[key].shape
            if problem := place.problem_of_value(tied=False):
                problems.append(f"{place.path}: {problem}")
            elif shape != place.torch_shape:
                problems.append(f"{key}: expected shape {place.torch_shape}, found {shape}")
            elif (value := read_numbers(self.file, key, problems)) is not None:
                values[name] = value
                for copy in found.copies.get(name, ()):
                    # That of the original module is the base's, which is not used.
                    used = copy.endswith(".modules_to_save.bias")
                    if used and not np.array_equal(self.file.read(copy), value):
                        problems.append(f"{copy}: differs from {key}")
        return values

    def read_rows(
        self, found: Found, problems: list[str], params: Any
    ) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        """The trained rows of every table, and of heads that torch ties to it."""
        rows: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
        leaves = leaves_by_path(params) if found.rows else {}
        for name, key in found.rows.items():
            place, shape = self.places[name], self.file.tensors[key].shape
            mine = self.config.rows_of(place.module) or ()
            if problem := place.problem_of_factors(tied=True):
                problems.append(f"{place.path}: {problem}")
                continue
            count, *width = place.torch_shape
            if shape != (len(mine), *width) or any(k >= count for k in mine):
                problems.append(
                    f"{key}: expected {len(mine)} rows of a table of shape {place.torch_shape}, "
                    f"found {shape}, the rows {list(mine)[:9]}"
                )
            elif (value := read_numbers(self.file, key, problems)) is not None:
                rows |= dict.fromkeys([name, *self._heads(place, leaves)], (mine, value))
        return rows

    def _heads(self, place: Place, leaves: Mapping[str, Any]) -> list[str]:
        """Heads with a table's values, which torch ties to it: they have its trained tokens."""
        if place.is_tied or not has_values(leaves[place.path]):
            return []
        table = place.read(leaves[place.path])
        return [
            name
            for name, other in self.places.items()
            if other.is_weight
            and other.kind == "linear"
            and other.torch_shape == place.torch_shape
            and (other.path, other.index) != (place.path, place.index)
            and ("" in self.config.tokens or not self.config.rows_of(other.module))
            and _same_base(other, table, leaves[other.path])
        ]


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


def _same_base(place: Place, base: np.ndarray, leaf: Any) -> bool:
    """Whether a base that a file holds is ours, to the rounding of the narrower dtype."""
    if not has_values(leaf):
        return False
    ours = place.read(leaf)
    narrow = min(base.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    return bool((base.astype(narrow) == ours.astype(narrow)).all())
