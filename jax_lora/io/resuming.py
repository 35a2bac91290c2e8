"""What a training needs to go on, as the items of a checkpoint, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.config import LoraConfig
from jax_lora.errors import CheckpointError
from jax_lora.io import files, guards, state
from jax_lora.io.checkpoint import adapter_parts, check_base
from jax_lora.io.entries import static_of
from jax_lora.io.fingerprints import Fingerprint, fingerprint

_OPTIMIZER, _KEYS = "optimizer", "keys"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the data a training is, and what its order depends on beside the key.

    Attributes:
        epoch: The epoch, counted from 0.
        step: The steps of it that are done.
        batch_size: Examples in a step.
        examples: Examples in the data set.
    """

    epoch: int
    step: int
    batch_size: int
    examples: int


_POSITION = tuple(field.name for field in dataclasses.fields(Position))


@dataclasses.dataclass(frozen=True)
class Restored:
    """A training as it was saved.

    Attributes:
        step: The number of steps done.
        trained: The adapter, or the parameters.
        opt_state: The optimizer's state.
        position: Where in the data it was, if that was saved.
        keys: The PRNG keys by name.
        metrics: The metrics it was saved with; None for one that was not finite.
        metadata: The facts it was saved with.
    """

    step: int
    trained: Any
    opt_state: Any
    position: Position | None
    keys: dict[str, jax.Array]
    metrics: dict[str, float | None]
    metadata: dict[str, Any]


class Run:
    """What stays the same while a training goes on.

    Args:
        base: The parameters beside the adapter, if there are some.
        config: The configuration of the adapter.
        settings: What else has to be the same when it is resumed.
    """

    def __init__(self, base: Any, config: LoraConfig | None, settings: Mapping[str, Any]):
        self.base, self.config, self.settings = base, config, files.plain("run", settings)
        self.fingerprint: Fingerprint | None = None if base is None else fingerprint(base)

    def pack(
        self, folder: Path, trained: Any, opt_state: Any, keys: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The items of a checkpoint, and their document.

        Raises:
            CheckpointError: A leaf is no array.
            AdapterError: The adapter does not fit the base.
        """
        if isinstance(trained, Adapter):
            arrays, document = adapter_parts(folder, trained, self.config)
            if self.base is not None:
                check_fits(self.base, trained)
        else:
            arrays, document = trained, {"format": files.PARAMS}
        packed = {_OPTIMIZER: state.pack(opt_state), _KEYS: state.pack(dict(keys))}
        items = {files.ARRAYS: arrays}
        if training := {name: leaves for name, (leaves, _) in packed.items() if leaves}:
            items[files.TRAINING] = training
        for tree in items.values():
            files.check_storable(folder, tree)
        kept = {"run": self.settings, "impls": {name: impls for name, (_, impls) in packed.items()}}
        return items, document | {"base": self.fingerprint, "state": kept}

    def unpack(
        self,
        folder: Path,
        document: Mapping[str, Any],
        items: Mapping[str, Any],
        trained: Any,
        opt_state: Any,
    ) -> Restored:
        """A training of the structure of ``trained`` and ``opt_state``, from what `read` returned.

        Raises:
            CheckpointError: It is of another run; names all that differs.
            AdapterError: The base is another one.
        """
        if problems := self._problems(document, trained, opt_state):
            raise CheckpointError(
                f"{folder}: expected a checkpoint of the same run, found one that differs; resume "
                "with what it was saved with, or begin another training:\n  "
                + "\n  ".join(problems)
            )
        if self.base is not None:
            with guards.as_it_was_written(folder):
                saved = document["base"]
                check_base(folder, saved, self.base, "begin another training on this one")
        shapes = {path: leaf.shape for path, leaf in leaves_by_path(trained).items()}
        shardings = state.shardings_of(trained, self.base)

        def placed(arrays: Any) -> dict[str, jax.Array]:
            return state.place(leaves_by_path(arrays), shapes, shardings)

        training, kept = items.get(files.TRAINING, {}), document["state"]
        keys = placed(training.get(_KEYS, {}))
        for name, impl in kept["impls"][_KEYS].items():
            keys[name] = jax.random.wrap_key_data(keys[name], impl=impl)
        optimizer = placed(training.get(_OPTIMIZER, {}))
        return Restored(
            step=kept["step"],
            trained=state.unpack(trained, placed(items[files.ARRAYS]), {}),
            opt_state=state.unpack(opt_state, optimizer, kept["impls"][_OPTIMIZER]),
            position=Position(**kept["position"]) if kept["position"] else None,
            keys=keys,
            metrics=kept["metrics"],
            metadata=document["metadata"],
        )

    def _problems(self, document: Mapping[str, Any], trained: Any, opt_state: Any) -> list[str]:
        kinds = {files.ADAPTER: "an adapter", files.PARAMS: "parameters"}
        kind = files.ADAPTER if isinstance(trained, Adapter) else files.PARAMS
        if document["format"] != kind:
            return [f"saved {kinds[document['format']]}, now {kinds[kind]}"]
        kept = document["state"]
        problems = _differences(kept["run"], self.settings)
        lora = document.get("lora")
        if self.config is not None and lora is not None:
            problems += _differences(lora, files.plain("config", self.config.to_json()), "config.")
        if problems:
            return problems  # of which other shapes are what follows
        problems += state.mismatches(trained, document[files.ARRAYS], {})
        if isinstance(trained, Adapter):
            then = {path: x for path, x in document["entries"].items() if path in trained}
            now = {path: static_of(trained[path]) for path in then}
            problems += _differences(then, files.plain("entries", now))
        start = f"{_OPTIMIZER}/"
        items = document.get(files.TRAINING, {}).items()
        saved = {path.removeprefix(start): what for path, what in items if path.startswith(start)}
        impls = kept["impls"][_OPTIMIZER]
        lines = state.mismatches(opt_state, saved, impls, leaves_by_path(trained))
        return problems + [f"optimizer state {line}" for line in lines]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document and the items of a training checkpoint, checked.

    Raises:
        CheckpointError: It is damaged, or no such checkpoint.
    """
    document = read_document(folder)
    names = [name for name in (files.ARRAYS, files.TRAINING) if name in document]
    return document, {name: files.read_arrays(folder, document, name) for name in names}


def read_document(folder: Path) -> dict[str, Any]:
    """The document of a training checkpoint, checked.

    Raises:
        CheckpointError: It is damaged, or no such checkpoint.
    """
    document = files.read_document(folder, files.ADAPTER, files.PARAMS)
    if "state" not in document:
        raise CheckpointError(
            f"{folder}: expected a checkpoint of a training, found {document['format']!r} alone"
        )
    with guards.as_it_was_written(folder):
        kept = document["state"]
        numbers = {*kept["metrics"].values()} - {None}
        whole = (kept["step"], *(kept["position"] or {}).values())
        if not all(isinstance(x, float) for x in numbers) or any(type(x) is not int for x in whole):
            raise ValueError("a number is none")
        Position(**kept["position"] or dict.fromkeys(_POSITION, 0))
        if str(kept["step"]) != folder.name:
            raise ValueError(f"it is of step {kept['step']}")
        dict(kept["run"])
        if document["format"] == files.ADAPTER:
            dict(document["lora"] or {})
            {path: dict(entry) for path, entry in document["entries"].items()}
        for name in (_OPTIMIZER, _KEYS):
            dict(kept["impls"][name])
    return document


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each name whose value is not the same."""
    none = "nothing"
    return [
        f"{prefix}{name}: saved {old!r}, now {new!r}"
        for name in sorted({*then, *now})
        if (old := then.get(name, none)) != (new := now.get(name, none))
        and json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True)  # NaN is no other
    ]
