"""An adapter in Hugging Face PEFT, for `benchmarks.adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from benchmarks.adapters import Held, two_adapters
from benchmarks.harness import Values
from benchmarks.peers.torch_model import Transformer, fill
from benchmarks.transformer import MATRICES, Task, tokens

#: A number as a name would be taken out of the names of the layers when it is saved.
ADAPTERS = ("first", "second")


class Peft(Held):
    """PEFT's model with two adapters, and ``read``, what was loaded."""

    def __init__(self, task: Task) -> None:
        config = peft.LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=list(MATRICES))
        model: Any = fill(task, Transformer(task))
        self._model = peft.get_peft_model(model, config, adapter_name=ADAPTERS[0])
        self._model.add_adapter(ADAPTERS[1], config)
        self._blocks = model.layers
        for name, arrays in zip(ADAPTERS, two_adapters(task), strict=True):
            self._fill(name, arrays)
        self._tokens = torch.from_numpy(tokens(task).astype(np.int64))

    def _fill(self, adapter: str, arrays: Mapping[str, np.ndarray]) -> None:
        for name in MATRICES:
            for k, block in enumerate(self._blocks):
                for ab, parameter in zip("ab", self._pair(block, name, adapter), strict=True):
                    value = np.ascontiguousarray(arrays[f"{name} {ab}"][k].T)
                    parameter.data = torch.from_numpy(value)

    def _pair(self, block: Any, name: str, adapter: str) -> Any:
        layer = getattr(block, name)
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def loss(self, which: int) -> float:
        """The loss, after `set_adapter`."""
        self._model.set_adapter(ADAPTERS[which])
        with torch.inference_mode():
            return float(self._model(self._tokens))

    def merge(self) -> None:
        """In place."""
        self._model.merge_adapter([ADAPTERS[0]])

    def merged(self) -> Values:
        """The weights; then the adapter is taken out again."""
        found = {
            name: self._stacked(getattr(b, name).base_layer.weight for b in self._blocks)
            for name in MATRICES
        }
        self._model.unmerge_adapter()
        return found

    def _stacked(self, tensors: Any) -> np.ndarray:
        return np.stack([tensor.detach().double().numpy().T for tensor in tensors])

    def save(self, folder: Path) -> None:
        """PEFT's own."""
        self._model.save_pretrained(
            folder, selected_adapters=[ADAPTERS[0]], save_embedding_layers=False
        )

    def load(self, folder: Path) -> None:
        """As another adapter."""
        if "read" in self._model.peft_config:
            self._model.delete_adapter("read")
        self._model.load_adapter(folder / ADAPTERS[0], adapter_name="read")

    def loaded(self) -> Values:
        """That."""
        found = {}
        for name in MATRICES:
            pairs = [self._pair(block, name, "read") for block in self._blocks]
            for ab, tensors in zip("ab", zip(*pairs, strict=True), strict=True):
                found[f"{name} {ab}"] = self._stacked(tensors)
        return found
