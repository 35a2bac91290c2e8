"""The first steps of the article's job, in PyTorch and in jax_lora: do they compute the same?

Both start from the same weights and factors and see the same batches, the last one short: some
steps of the base, then some of the adapter beside what came out of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness import Values

STEPS, BATCH, LAST = 8, 32, 16
SIZES = {"l1": (3072, 128), "l2": (128, 128), "l3": (128, 10)}
RANK, LEARNING_RATE, MOMENTUM = 32, 0.001, 0.9

Arrays = Mapping[str, np.ndarray]


def data() -> dict[str, np.ndarray]:
    """Images in the form of CIFAR-10's, with a pattern for each class in noise."""
    draw = np.random.default_rng(0)
    count = (STEPS - 1) * BATCH + LAST
    labels = draw.integers(0, 10, count, np.int32)
    patterns = draw.normal(size=(10, 3072))
    images = np.tanh(patterns[labels] + draw.normal(size=(count, 3072)))
    pixels = np.round((images + 1) * 127.5).astype(np.uint8)
    return {"images": pixels.reshape(count, 32, 32, 3), "labels": labels}


def start() -> dict[str, np.ndarray]:
    """Kernels ``[in, out]``, biases and factors, in the article's scales."""
    draw = np.random.default_rng(1)
    found = {}
    for name, (inputs, outputs) in SIZES.items():
        for part, shape in (("kernel", (inputs, outputs)), ("bias", (outputs,))):
            values = draw.uniform(-1, 1, shape) / np.sqrt(inputs)
            found[f"{name} {part}"] = values.astype(np.float32)
        a = draw.uniform(-1, 1, (inputs, RANK)) / np.sqrt(RANK)
        found[f"{name} a"] = a.astype(np.float32)
        found[f"{name} b"] = np.zeros((RANK, outputs), np.float32)
    return found


class TorchSteps:
    """The article's program, in one of its variants."""

    def __init__(self, variant: str) -> None:
        import torch

        from benchmarks.peers import article_pytorch

        self._torch, self._article, self._variant = torch, article_pytorch, variant

    def results(self) -> Values:
        """The losses of both phases, and how far they moved each array."""
        torch, article = self._torch, self._article
        factored = self._variant != "article"
        arrays = start()
        base = article.build_base_model()
        self._put(base, arrays)
        losses = self._train(base, factored)
        lora = article.build_lora_model(base.state_dict(), factored=factored)
        with torch.no_grad():
            for name in SIZES:
                adapter = getattr(lora, f"{name}_lora")
                adapter.A.copy_(torch.from_numpy(arrays[f"{name} a"]))
                adapter.B.copy_(torch.from_numpy(arrays[f"{name} b"]))
        losses += self._train(lora, factored)
        found: dict[str, Any] = {}
        for name in SIZES:
            layer, adapter = getattr(base, name), getattr(lora, f"{name}_lora")
            found |= {f"{name} kernel": layer.weight.T, f"{name} bias": layer.bias}
            found |= {f"{name} a": adapter.A, f"{name} b": adapter.B}
        return changes(losses, {name: x.detach().numpy() for name, x in found.items()})

    def _put(self, model: Any, arrays: Arrays) -> None:
        torch = self._torch
        with torch.no_grad():
            for name in SIZES:
                layer = getattr(model, name)
                layer.weight.copy_(torch.from_numpy(arrays[f"{name} kernel"].T))
                layer.bias.copy_(torch.from_numpy(arrays[f"{name} bias"]))

    def _train(self, model: Any, fused: bool) -> list[float]:
        torch, article = self._torch, self._article
        found = data()
        # As [n, height * width * channels], the order of the kernel's inputs in jax_lora.
        images = torch.from_numpy(found["images"].reshape(len(found["labels"]), -1))
        images = images.float().div(127.5).sub(1)
        labels = torch.from_numpy(found["labels"]).long()
        batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        optimizer = article.build_optimizer(model, fused=fused)
        model = torch.compile(model) if self._variant == "compiled" else model
        return article.train_steps(model, optimizer, batches)


class OurSteps:
    """jax_lora's, as its script runs them."""

    def results(self) -> Values:
        """The losses of both phases, and how far they moved each array."""
        import jax
        import jax.numpy as jnp

        import jax_lora as jl
        from jax_lora.experiments.options import TrainOptions
        from jax_lora.experiments.phases import predict_base, predict_lora
        from jax_lora.models import MLP

        arrays = start()
        model = MLP(tuple(outputs for _, outputs in SIZES.values()))
        options = TrainOptions(learning_rate=LEARNING_RATE, momentum=MOMENTUM)
        params: Any = {
            "params": {n: {p: arrays[f"{n} {p}"] for p in ("kernel", "bias")} for n in SIZES}
        }
        params, losses = self._train(predict_base(model), options.optimizer(), params, None)
        entries = {
            f"params/{name}/kernel": jl.LoraFactors(
                jnp.asarray(arrays[f"{name} a"]),
                jnp.asarray(arrays[f"{name} b"]),
                jnp.float32(1),
                jl.Layout(shape, in_axes=(0,), out_axes=(1,)),
            )
            for name, shape in SIZES.items()
        }
        optimizer = jl.optim.lora_optimizer(options.optimizer())
        adapter, more = self._train(predict_lora(model), optimizer, jl.Adapter(entries), params)
        found: dict[str, Any] = {}
        for name in SIZES:
            found |= {f"{name} {part}": x for part, x in params["params"][name].items()}
            entry = adapter[f"params/{name}/kernel"]
            found |= {f"{name} a": entry.a, f"{name} b": entry.b}
        return changes(losses + more, jax.tree.map(np.asarray, found))

    def _train(
        self, predict: Any, optimizer: Any, trained: Any, frozen: Any
    ) -> tuple[Any, list[float]]:
        import jax

        from jax_lora.experiments.fit import losses_of
        from jax_lora.training import TrainState, epoch_over_arrays, in_order, train_step

        found = data()
        arrays = {"image": found["images"].reshape(len(found["labels"]), -1)}
        arrays["label"] = found["labels"]
        step = train_step(losses_of(predict, 255), optimizer)
        state = TrainState.create(trained, optimizer, frozen)
        run = jax.jit(lambda state, *data: epoch_over_arrays(step, state, *data))
        state, metrics = run(state, arrays, in_order(len(found["labels"]), BATCH))
        return state.trained, np.asarray(metrics["loss"]).tolist()


def changes(losses: list[float], after: Arrays) -> Values:
    """The losses, and how far each array has moved."""
    before = start()
    moved = {f"change of {n}": after[n].astype(np.float64) - before[n] for n in before}
    return {"losses": np.array(losses)} | moved
