"""The transformer of the step benchmark: its sizes, its weights, and what a step of it costs.

All frameworks compute this function, and start from these arrays: pre-norm layers with RMS
normalisation, causal attention with heads of width 64, a GELU network four times as wide, no
biases, a head that is not tied, and the cross-entropy of the next token. The six matrices of each
layer are adapted. The strength is 1 (alpha = rank), because `nnx.LoRA` has none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

#: The adapted matrices of a layer, with their widths in units of the model's.
MATRICES = {
    **dict.fromkeys(("query", "key", "value", "out"), (1, 1)),
    "up": (1, 4),
    "down": (4, 1),
}
EPSILON = 1e-6
HEAD_WIDTH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One case of the benchmark.

    Attributes:
        width: The model's width.
        depth: Its number of layers.
        tokens: Tokens in a sequence.
        batch: Sequences in a step.
        rank: The adapters' rank.
        scanned: The layers are stacked and scanned where a framework can; otherwise a Python loop.
        dtype: Of weights and activations; factors and optimizer are float32.
        vocabulary: Different tokens.
        learning_rate: Adam's.
        optimize: How much XLA optimises: 0 where only the results matter.
    """

    width: int = 512
    depth: int = 8
    tokens: int = 512
    batch: int = 1
    rank: int = 8
    scanned: bool = True
    dtype: str = "float32"
    vocabulary: int = 1024
    learning_rate: float = 1e-3
    optimize: bool = True

    def __str__(self) -> str:
        how = "scanned" if self.scanned else "unrolled"
        sequences = f"{self.batch} x " if self.batch > 1 else ""
        words = f"width {self.width}, {self.depth} layers {how}, {sequences}{self.tokens} tokens"
        return f"{words}, rank {self.rank}" + ("" if self.dtype == "float32" else f", {self.dtype}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // min(HEAD_WIDTH, self.width)

    @property
    def head_width(self) -> int:
        """The width of each."""
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each adapted matrix of a layer."""
        return {name: (i * self.width, o * self.width) for name, (i, o) in MATRICES.items()}

    @functools.cached_property
    def flops(self) -> int:
        """What a LoRA step cannot do without, two for each multiply-add.

        Forward, every product once; backward, once more for the gradient of its input, and the
        products of attention, both of whose sides have a gradient, twice; the factors' products
        three times. No gradient of a frozen weight, nothing for what is elementwise.
        """
        count = self.batch * self.tokens
        frozen = sum(i * o for i, o in self.shapes().values()) * self.depth
        frozen += self.width * self.vocabulary
        factors = sum(i + o for i, o in self.shapes().values()) * self.depth * self.rank
        attention = 2 * self.tokens * self.width * self.depth
        return 2 * count * (2 * frozen + 3 * factors + 3 * attention)


def weights(task: Task) -> dict[str, np.ndarray]:
    """The frozen weights by path, float32, those of the layers stacked: ``[depth, in, out]``."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-2]))

    found = {"embedding": draw.standard_normal((task.vocabulary, task.width), np.float32)}
    found["head"] = normal(task.width, task.vocabulary)
    found |= {f"layers/{name}": normal(task.depth, *s) for name, s in task.shapes().items()}
    norms = {f"layers/{name}": (task.depth, task.width) for name in ("norm1", "norm2")}
    for name, shape in (norms | {"norm": (task.width,)}).items():
        found[name] = 1 + np.float32(0.1) * draw.standard_normal(shape, np.float32)
    return found


def factors(task: Task) -> dict[str, np.ndarray]:
    """``a: [depth, in, r]`` and ``b: [depth, r, out]`` of each matrix, as after some training."""
    draw = np.random.default_rng(1)
    found = {}
    for name, (width, outputs) in task.shapes().items():
        a = draw.standard_normal((task.depth, width, task.rank), np.float32)
        b = draw.standard_normal((task.depth, task.rank, outputs), np.float32)
        found[f"{name} a"] = a / np.float32(math.sqrt(width))
        found[f"{name} b"] = b * np.float32(0.1 / math.sqrt(task.rank))
    return found


def tokens(task: Task) -> np.ndarray:
    """The batch, int32 ``[batch, tokens]``."""
    draw = np.random.default_rng(2)
    return draw.integers(task.vocabulary, size=(task.batch, task.tokens), dtype=np.int32)


def unstacked(arrays: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """One layer's part of the stacked arrays, by its name within the layer."""
    prefix = "layers/"
    return {
        name.removeprefix(prefix): array[layer]
        for name, array in arrays.items()
        if name.startswith(prefix) or " " in name
    }
