"""Adapters for Hugging Face PEFT, and for what reads its files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.errors import AdapterError, expect_type
from jax_lora.peft.config import PeftConfig, adapter_config
from jax_lora.peft.files import CONFIG, PREFIX, TENSORS, listed, new_folder, write_json
from jax_lora.peft.modules import Factors, split
from jax_lora.peft.names import Name
from jax_lora.peft.parts import has_values
from jax_lora.peft.places import UNSURE, Place, places_of
from jax_lora.peft.tensors import write_tensors
from jax_lora.variants import DoraFactors, FullValue, RowValues

#: PEFT's own word for an adapter that is all `modules_to_save`; an empty list it refuses.
NO_TARGETS = "dummy-target-modules"


def save(
    folder: str | Path,
    adapter: Adapter,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any] | None = None,
    *,
    flat: bool = True,
    base_model: str | None = None,
    task_type: str | None = None,
    dropout: float = 0.0,
) -> dict[str, str]:
    """Write an adapter that PEFT and what reads its files load.

    By default it is flat, which every reader gets right: all modules have the largest rank, padded
    with zeros, and one scale: it is in ``B``, and ``r = lora_alpha``. The factors keep their dtype;
    where the scale would be rounded in it, it is in ``lora_alpha`` if all modules have the same,
    and else ``B`` is in float32. Other variants become LoRA where they
    are a product of factors; values trained whole become ``modules_to_save``, and what their
    modules have besides is taken from ``params``, but biases beside factors become PEFT's
    ``bias``; rows of a table that is the head, too, become trained tokens. If one entry is DoRA,
    the others are written as DoRA of the same update, as PEFT has one setting for all.

    Args:
        folder: A folder that does not exist yet, or is empty.
        adapter: The adapter.
        params: The base parameters; their shapes alone will do if no values are needed.
        names: What torch calls each parameter, as rules; see `Name`.
        layouts: The roles of the parameters' axes, as for `load`: an embedding or a convolution is
            told from a linear layer by its use, or by its rule.
        flat: False to keep ranks and scales as they are, in ``rank_pattern`` and
            ``alpha_pattern``.
        base_model: The base's name, for ``base_model_name_or_path``.
        task_type: PEFT's, such as ``"CAUSAL_LM"``.
        dropout: PEFT's ``lora_dropout``, which acts only in training.

    Returns:
        By the name of each of torch's parameters that the file adapts, our path.

    Raises:
        AdapterError: Entries that have no name, or that PEFT cannot have; all of them at once.
        CheckpointError: The folder holds something, or it cannot be written.
        ConfigError: The rules do not fit the parameters.
    """
    expect_type("an adapter", adapter, Adapter)
    check_fits(params, adapter)
    layouts = {path: adapter[path] for path in adapter} | dict(layouts or {})
    export = _Export(places_of(params, names, layouts), leaves_by_path(params))
    dora = any(isinstance(entry, DoraFactors) for entry in adapter.values())
    for path, entry in adapter.items():
        export.add(path, entry, dora=dora)
    export.complete()
    if export.problems:
        raise AdapterError(
            f"{folder}: PEFT cannot have this adapter as it is:\n  {listed(export.problems)}"
        )
    document, tensors = export.files(flat=flat)
    document |= {
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "lora_dropout": dropout,
        "use_dora": dora,
    }
    with new_folder(folder) as partial:
        write_tensors(partial / TENSORS, tensors)
        write_json(partial / CONFIG, document)
    return {name: export.places[name].path for name in export.names}


@dataclasses.dataclass
class _Export:
    """What goes into the files, by the name of torch's parameter.

    Attributes:
        places: Torch's parameters among ours.
        leaves: The base parameters.
        factors: Of adapted modules.
        values: Of modules that are trained whole.
        biases: That are trained without their weights.
        tokens: Rows of tables, and their values.
        problems: What PEFT cannot have.
        bias: PEFT's word for which biases are trained.
    """

    places: Mapping[str, Place]
    leaves: Mapping[str, Any]
    factors: dict[str, Factors] = dataclasses.field(default_factory=dict)
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    biases: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    bias: str = "none"

    def __post_init__(self) -> None:
        self._of: dict[str, list[Place]] = {}
        for place in self.places.values():
            self._of.setdefault(place.path, []).append(place)

    @property
    def names(self) -> list[str]:
        """Of all parameters in the files."""
        return sorted({*self.factors, *self.values, *self.biases, *self.tokens})

    def _modules(self, names: Iterable[str]) -> set[str]:
        return {self.places[name].module for name in names}

    def add(self, path: str, entry: Any, *, dora: bool) -> None:
        """Take in an entry of the adapter."""
        mine = self._of.get(path, [])
        if not mine:
            self.problems.append(f"{path}: no rule names it")
        elif isinstance(entry, FullValue):
            if problem := mine[0].problem_of_value(tied=False):
                self.problems.append(f"{path}: {problem}")
            else:
                self.values |= {place.name: place.read(entry.value) for place in mine}
        elif isinstance(entry, RowValues) and mine[0].is_tied:
            # Factors would reach the table alone; the rows that PEFT trains are those of both.
            value = np.asarray(entry.value).reshape(len(entry.rows), -1)
            self.tokens[mine[0].name] = (entry.rows, value)
        elif problem := _unfit(mine[0], entry):
            self.problems.append(f"{path}: {problem}")
        else:
            w = self.leaves[path]
            needed = not entry.LINEAR or dora
            if needed and not has_values(w) and not isinstance(entry, DoraFactors):
                self.problems.append(f"{path}: expected the base parameter's values, got its shape")
                return
            w = w if has_values(w) else None
            self.factors |= split(path, entry, w, mine, dora=dora)

    def complete(self) -> None:
        """Add what PEFT keeps beside what is trained: the rest of a module, or other biases."""
        adapted = self._modules(self.factors)
        whole = self._modules(name for name in self.values if not self.places[name].is_bias)
        single = {
            name
            for name in self.values
            if self.places[name].is_bias and self.places[name].module not in whole
        }
        beside = {name for name in single if self.places[name].module in adapted}
        if beside:
            self.bias = "lora_only" if beside == single else "all"
            self.biases = {name: self.values.pop(name) for name in sorted(single)}
            of = adapted if self.bias == "lora_only" else self._modules(self.places) - whole
            for name, place in self.places.items():
                if place.is_bias and place.module in of and name not in self.biases:
                    self._from_base(name, self.biases, f"bias={self.bias!r} keeps them all")
        modules = self._modules(self.values)
        for name, place in self.places.items():
            if place.module not in modules or name in self.values:
                continue
            if name in self.factors:
                self.problems.append(
                    f"{name}: has factors, and another parameter of its module is trained whole, "
                    "where PEFT knows only whole modules"
                )
            else:
                self._from_base(name, self.values, "PEFT keeps the whole module")
        self._check_saved()

    def _from_base(self, name: str, into: dict[str, np.ndarray], why: str) -> None:
        place = self.places[name]
        leaf = self.leaves[place.path]
        if not has_values(leaf):
            self.problems.append(f"{place.path}: expected its values, as {why}")
        elif problem := place.problem_of_value():
            self.problems.append(f"{place.path}: {problem}")
        else:
            into[name] = place.read(leaf)

    def _check_saved(self) -> None:
        """PEFT takes every module whose name ends with one in ``modules_to_save``."""
        saved = sorted(self._modules(self.values))
        for name in sorted(self._all_modules()):
            ends = [end for end in saved if name.endswith(end) and name != end]
            if ends:
                self.problems.append(
                    f"{name}: would be trained whole, too: its name ends with {ends[0]!r}"
                )

    def _all_modules(self) -> set[str]:
        modules = set()
        for place in self.places.values():
            parts = place.module.split(".")
            modules |= {".".join(parts[: k + 1]) for k in range(len(parts))}
        return modules

    def files(self, *, flat: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The configuration, and the tensors by key."""
        rank = max((x.rank for x in self.factors.values()), default=1)
        alpha: float = rank
        if flat and self.factors:
            folded = {name: x.folded() for name, x in self.factors.items()}
            rounded = any(x.b.dtype != self.factors[name].b.dtype for name, x in folded.items())
            scales = {x.scale for x in self.factors.values()}
            if rounded and len(scales) == 1:
                alpha = _alpha(scales.pop(), rank)
            else:
                self.factors = folded
        rank_pattern: dict[str, int] = {}
        alpha_pattern: dict[str, float] = {}
        if not flat and self.factors:
            kept = {
                self.places[name].module: (x.rank, _alpha(x.scale, x.rank))
                for name, x in self.factors.items()
            }
            (rank, alpha), _ = Counter(kept.values()).most_common(1)[0]
            for module in sorted(kept):
                if kept[module] != (rank, alpha):
                    # PEFT tries a pattern on the ends of names, too, unless it begins with a caret.
                    pattern = f"^{re.escape(module)}"
                    rank_pattern[pattern], alpha_pattern[pattern] = kept[module]
        saved = sorted(self._modules(self.values))
        document = adapter_config(
            rank=rank,
            alpha=alpha,
            targets=self._targets(saved),
            saved=saved,
            bias=self.bias,
            tokens={self.places[name].module: rows for name, (rows, _) in self.tokens.items()},
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            fan_in_fan_out=any(self.places[name].kind == "conv1d" for name in self.factors),
        )
        return document, self._tensors(rank if flat else None)

    def _tensors(self, rank: int | None) -> dict[str, np.ndarray]:
        """All tensors by their keys; the factors padded to a rank, if there is one."""
        tensors: dict[str, np.ndarray] = {}
        for name, x in self.factors.items():
            start = PREFIX + self.places[name].module
            ends = ("lora_A.weight", "lora_B.weight")
            if self.places[name].kind == "embedding":
                ends = ("lora_embedding_A", "lora_embedding_B")
            padded = x.padded(rank or x.rank)
            tensors |= {f"{start}.{end}": y for end, y in zip(ends, padded, strict=True)}
            if x.magnitude is not None:
                tensors[f"{start}.lora_magnitude_vector"] = x.magnitude
        adapted = self._modules(self.factors)
        for name, value in self.biases.items():
            module = self.places[name].module
            inside = "base_layer." if module in adapted else ""
            tensors[f"{PREFIX}{module}.{inside}bias"] = value
        for name, (_, value) in self.tokens.items():
            module = self.places[name].module
            tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = value
        return tensors | {PREFIX + name: value for name, value in self.values.items()}

    def _targets(self, saved: list[str]) -> tuple[str, ...] | str:
        """The full names, or, where they also end other names, one expression for them."""
        targets = sorted(self._modules(self.factors))
        if not targets:
            return NO_TARGETS
        config = PeftConfig(1, 1.0, tuple(targets), saved=tuple(saved))
        if not any(config.is_target(module) for module in self._all_modules() - set(targets)):
            return tuple(targets)
        return "(" + "|".join(re.escape(module) for module in targets) + ")"


def _unfit(place: Place, entry: Any) -> str:
    """Why a parameter is no module that PEFT can adapt; empty if it is one."""
    if not place.is_weight:
        return f"expected the name of a weight, it is {place.name!r}"
    layout = getattr(entry, "layout", None)
    if layout is None or place.layout != layout:
        return f"its axes are {layout} in the adapter and {place.layout} in layouts"
    return place.problem_of_factors() or ("" if place.sure else UNSURE)


def _alpha(scale: float, rank: int) -> float:
    """PEFT's alpha: an integer if it is one to within the rounding of float32."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-7) else alpha
