"""The transformer in PyTorch, and its training step: for PEFT and loralib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import machine
from benchmarks.harness import Sample, Values, changes
from benchmarks.transformer import EPSILON, MATRICES, Task, factors, tokens, unstacked, weights

#: ``make(inputs, outputs)``: a linear layer without bias.
Linear = Callable[[int, int], nn.Module]


def plain_linear(inputs: int, outputs: int) -> nn.Module:
    """What is adapted afterwards, or not at all."""
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, task: Task, linear: Linear) -> None:
        super().__init__()
        self.heads = task.heads
        for name, shape in task.shapes().items():
            setattr(self, name, linear(*shape))
        self.norm1, self.norm2 = (nn.RMSNorm(task.width, EPSILON) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, width]`` to the same."""
        h = self.norm1(x)
        q, k, v = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        # PyTorch's own: it never holds all scores, which the JAX programs do.
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A language model; called, it gives the loss."""

    def __init__(self, task: Task, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, task.width)
        self.layers = nn.ModuleList(Block(task, linear) for _ in range(task.depth))
        self.norm = nn.RMSNorm(task.width, EPSILON)
        self.head = plain_linear(task.width, task.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of the next token, of ``[batch, length]``."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def fill(task: Task, model: Transformer) -> Transformer:
    """Give a model the task's weights, frozen."""
    arrays = weights(task)

    def put(parameter: Any, array: np.ndarray) -> None:
        parameter.data = torch.from_numpy(np.ascontiguousarray(array)).to(parameter.dtype)

    put(model.embedding.weight, arrays["embedding"])
    put(model.norm.weight, arrays["norm"])
    put(model.head.weight, arrays["head"].T)
    for k, block in enumerate(model.layers):
        for name, array in unstacked(arrays, k).items():
            put(getattr(block, name).weight, array.T if name in MATRICES else array)
    return model.to(getattr(torch, task.dtype)).requires_grad_(False)


class TorchSubject:
    """Checks and runs a training step.

    Args:
        task: The task.
        model: The model, adapted.
        pair_of: From an adapted layer to its ``A: [r, in]`` and ``B: [out, r]``.
        compiled: Whether `torch.compile` is applied to the model.
    """

    def __init__(
        self,
        task: Task,
        model: Transformer,
        pair_of: Callable[[Any], tuple[nn.Parameter, nn.Parameter]],
        compiled: bool = False,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._task, self._layers, self._pair_of = task, model.layers, pair_of
        self._start()
        self._model: Any = model.to(self._device)
        self._compile = compiled
        trained = [p for p in model.parameters() if p.requires_grad]
        self._make_optimizer = lambda: torch.optim.Adam(trained, task.learning_rate, fused=True)
        self._optimizer = self._make_optimizer()
        self._tokens = torch.from_numpy(tokens(task).astype(np.int64)).to(self._device)

    def _pairs(self) -> dict[str, list[nn.Parameter]]:
        pairs: dict[str, list[nn.Parameter]] = {}
        for block in self._layers:
            for name in MATRICES:
                for ab, parameter in zip("ab", self._pair_of(getattr(block, name)), strict=True):
                    pairs.setdefault(f"{name} {ab}", []).append(parameter)
        return pairs

    def _start(self) -> None:
        arrays = factors(self._task)
        for name, parameters in self._pairs().items():
            for layer, parameter in enumerate(parameters):
                value = torch.from_numpy(np.ascontiguousarray(arrays[name][layer].T))
                parameter.data = value.to(self._device, torch.float32)
                parameter.requires_grad_(True)

    def build(self) -> Sample:
        """The first step, with `torch.compile` if it is applied; eager PyTorch builds nothing."""
        if not self._compile:
            return {}
        torch.compiler.reset()
        model = self._model
        self._model = torch.compile(getattr(model, "_orig_mod", model))
        return {"build_s": machine.seconds(lambda: self._run(1))}

    def counts(self) -> dict[str, float]:
        """Nothing that PyTorch would count."""
        return {}

    def _host(self) -> Values:
        return {
            name: np.stack([p.detach().cpu().double().numpy().T for p in parameters])
            for name, parameters in self._pairs().items()
        }

    def results(self, steps: int) -> Values:
        """The losses of the first steps, and how far they moved the trained arrays."""
        self._start()
        self._optimizer = self._make_optimizer()
        before = self._host()
        losses = [float(self._advance()) for _ in range(steps)]
        after = self._host()
        return changes(losses, before, after)

    def _advance(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._model(self._tokens)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def step(self, count: int = 1) -> Sample:
        """Run some steps; returns the seconds of one."""
        return {"step_s": machine.seconds(lambda: self._run(count)) / count}

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._advance()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """The largest memory of the process, and of the device, while it steps."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        peak = machine.peak_rss(lambda: self._run(2))
        found = {} if peak is None else {"peak_rss_bytes": float(peak)}
        if self._device.type == "cuda":
            found["peak_device_bytes"] = float(torch.cuda.max_memory_allocated())
        return found
