"""Files of kohya's scripts and of LyCORIS: one file, a few tensors and an alpha by module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.errors import CheckpointError
from jax_lora.peft.files import listed
from jax_lora.peft.lycoris import (
    LOHA,
    LOKR,
    loha,
    loha_problem,
    lokr,
    lokr_problem,
    lokr_rank,
    tucker,
)
from jax_lora.peft.names import Name
from jax_lora.peft.parts import Contents, Part, build
from jax_lora.peft.places import Place, places_of
from jax_lora.peft.reading import Loaded
from jax_lora.peft.source import check_pair, read_numbers, unknown
from jax_lora.peft.tensors import TensorFile

_LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
_ENDS = frozenset({*_LORA, *LOHA, *LOKR, "alpha"})


def load_kohya(
    file: str | Path,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any] | None = None,
    *,
    prefix: str = "lora_",
) -> Loaded:
    """Read a file of kohya's scripts or of LyCORIS: LoRA, LoHa or LoKr.

    A module ``unet.down_blocks.0.to_q`` is called ``lora_unet_down_blocks_0_to_q`` there. The scale
    is ``alpha / rank``, and 1 for a module without ``alpha`` and for LoKr of two whole matrices.
    What else there is (``dora_scale``, whose norm is over one axis or the other, whole differences)
    is refused by the names of its keys.

    Args:
        file: A safetensors file.
        params: The base parameters.
        names: What torch calls each parameter, as rules; see `Name`.
        layouts: The roles of the parameters' axes, as for `load`.
        prefix: What comes before a module's name, such as ``"lora_"`` or ``"lycoris_"``.

    Returns:
        The adapter, the strings that the file keeps beside it, and our path by torch's name.

    Raises:
        CheckpointError: The file is missing or damaged, or keys or shapes do not fit; all of them
            at once.
        ConfigError: The rules do not fit the parameters.
    """
    stored = TensorFile.open(Path(file).expanduser().absolute())
    places = places_of(params, names, layouts)
    problems: list[str] = []
    called: dict[str, str] = {}
    for name, place in places.items():
        if place.is_weight:
            short = prefix + place.module.replace(".", "_")
            if short in called:
                problems.append(
                    f"{name}: would be called {short!r}, and so would {called[short]!r}"
                )
            called[short] = name
    found: dict[str, dict[str, str]] = {}
    for key in sorted(stored.tensors):
        module, _, end = key.partition(".")
        if end not in _ENDS:
            problems.append(f"{key}: expected a key of LoRA, LoHa or LoKr, such as {_LORA[0]}")
        elif module not in called:
            problems.append(f"{key}: {unknown('module', module, called, problems)}")
        else:
            found.setdefault(called[module], {})[end] = key
    parts: dict[str, Part] = {}
    for name, keys in found.items():
        try:
            parts[name] = _Module(stored, places[name], keys).part()
        except CheckpointError as error:
            problems.append(str(error))
    if not found and not problems:
        problems.append("expected keys of LoRA, found none")
    if problems:
        raise CheckpointError(
            f"{file}: the adapter does not fit these parameters:\n  {listed(problems)}"
        )
    contents = Contents(parts)
    adapter = build(str(file), params, places, contents)
    used = {name: places[name].path for name in contents.names}
    return Loaded(adapter, dict(stored.metadata), used)


@dataclasses.dataclass(frozen=True)
class _Module:
    """One module's keys, by what they end with."""

    file: TensorFile
    place: Place
    keys: Mapping[str, str]

    def part(self) -> Part:
        """The update.

        Raises:
            CheckpointError: What is wrong with it.
        """
        place = self.place
        if problem := place.problem_of_factors():
            raise CheckpointError(f"{place.path}: {problem}")
        if place.kind == "embedding":
            raise CheckpointError(f"{place.module}: expected no embedding in this format")
        ends = set(self.keys) - {"alpha"}
        if ends and ends <= set(LOHA):
            return self._loha()
        if ends and ends <= set(LOKR):
            return self._lokr()
        if not {*_LORA[:2]} <= ends <= set(_LORA):
            raise CheckpointError(
                f"{place.module}: expected lora_down and lora_up, or the tensors of LoHa or LoKr, "
                f"found {', '.join(sorted(self.keys))}"
            )
        return self._lora()

    def _lora(self) -> Part:
        place, shapes = self.place, self._shapes()
        down, up, mid = (shapes.get(end) or () for end in _LORA)
        rank = down[0] if down else 0
        if mid:  # the directions are the core's, and down has the channels alone
            expected = (rank, rank, *place.torch_ins[1:])
            ones = (1,) * len(expected[2:])
            if place.kind != "conv" or mid != expected or down[2:] != ones:
                raise CheckpointError(f"{place.name}: expected lora_mid {expected}, found {mid}")
            down = (*down[:2], *expected[2:])
        wrong = check_pair(place, rank, down, up) if rank else [f"{place.module}: its rank is 0"]
        if wrong:
            raise CheckpointError("\n  ".join(wrong))
        arrays = self._arrays()
        a, b = arrays[_LORA[0]], arrays[_LORA[1]]
        if mid:
            a = tucker(arrays[_LORA[2]], a.reshape(rank, -1))
        return Part({"a": place.a_from_torch(a), "b": place.b_from_torch(b)}, self._scale(rank))

    def _loha(self) -> Part:
        shapes = self._shapes()
        outer = shapes.get("hada_w1_a", ())
        rank = outer[0 if "hada_t1" in shapes else 1] if len(outer) == 2 else 0
        if problem := loha_problem(self.place, shapes, rank) if rank else "its rank is 0":
            raise CheckpointError(f"{self.place.name}: {problem}")
        return loha(self.place, self._arrays(), self._scale(rank))

    def _lokr(self) -> Part:
        shapes = self._shapes()
        if problem := lokr_problem(self.place, shapes, None):
            raise CheckpointError(f"{self.place.name}: {problem}")
        rank = lokr_rank(shapes)
        return lokr(self.place, self._arrays(), self._scale(rank) if rank else 1.0)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {end: self.file.tensors[x].shape for end, x in self.keys.items() if end != "alpha"}
        if self.place.kind == "conv":
            return shapes
        # A convolution of one pixel is a linear layer.
        single = [end for end in (*_LORA[:2], "lokr_w2") if set(shapes.get(end, ())[2:]) == {1}]
        return shapes | {end: shapes[end][:2] for end in single}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {end: self._read(end) for end in self.keys if end != "alpha"}

    def _scale(self, rank: int) -> float:
        key = self.keys.get("alpha")
        if key is None:
            return 1.0
        if math.prod(self.file.tensors[key].shape) != 1:
            raise CheckpointError(f"{key}: expected one number")
        return float(self._read("alpha").reshape(())) / rank

    def _read(self, end: str) -> np.ndarray:
        problems: list[str] = []
        value = read_numbers(self.file, self.keys[end], problems)
        if value is None:
            raise CheckpointError(problems[0])
        return value
