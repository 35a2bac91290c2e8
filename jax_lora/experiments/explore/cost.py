"""What training costs in bytes: counted from compiled programs, trees, and files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jax_lora as jl
from jax_lora.experiments.explore.study import Study
from jax_lora.models import MLP
from jax_lora.training import Batch, TrainState, train_step

#: A network that is compiled but never run: as wide as those LoRA is made for.
WIDE, WIDE_RANK = (4096, 4096, 4096, 4096), 8
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGD with momentum": lambda: optax.sgd(0.001, momentum=0.9),
    "Adam": lambda: optax.adam(0.001),
}


def measure(study: Study) -> dict[str, Any]:
    """Bytes of LoRA and of full fine-tuning, of the base and of a wide network."""
    adapter = jl.init(jax.random.key(0), study.params, study.plan(study.config()))
    example = study.example
    model = MLP(WIDE)
    inputs = jax.ShapeDtypeStruct((example.shape[0], WIDE[0]), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    plan = jl.plan(model.apply, params, inputs, config=study.config(rank=WIDE_RANK))
    wide = jax.eval_shape(lambda: jl.init(jax.random.key(0), params, plan))
    return {
        "base": {
            "name": "-".join(map(str, (example.shape[1], *study.model.features))),
            "rank": study.options.rank,
            **_of(study, study.model, study.params, adapter, example),
            "files": _files(study.params, adapter),
        },
        "wide": {
            "name": "-".join(map(str, (WIDE[0], *WIDE))),
            "rank": WIDE_RANK,
            **_of(study, model, params, wide, inputs),
        },
    }


def _of(
    study: Study, model: MLP, params: Any, adapter: jl.Adapter, inputs: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Both ways to train one network."""
    batch: Any = Batch(
        {"image": inputs, "label": jax.ShapeDtypeStruct(inputs.shape[:1], np.int32)},
        jax.ShapeDtypeStruct(inputs.shape[:1], np.float32),  # type: ignore[arg-type]
    )
    adapted = jl.apply(model.apply)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def full_loss(params: Any, frozen: None, data: Any) -> jax.Array:
        return loss(model.apply(params, data["image"]), data["label"])

    def lora_loss(adapter: Any, params: Any, data: Any) -> jax.Array:
        return loss(adapted(params, adapter, data["image"]), data["label"])

    options = dict(study.compiler_options)
    return {
        "params": _elements(params),
        "trained": adapter.trainable_params,
        "full": _bytes(full_loss, params, None, batch, lambda optimizer: optimizer, options),
        "lora": _bytes(lora_loss, adapter, params, batch, jl.optim.lora_optimizer, options),
    }


def _bytes(
    loss_fun: Any, trained: Any, frozen: Any, batch: Batch, labelled: Any, options: Any
) -> dict[str, Any]:
    """The bytes of one way to train.

    ``gradients`` are the outputs of the compiled gradient but for the loss, ``working`` is what it
    needs beside arguments and outputs: activations above all. ``step`` is all that the compiled
    training step holds at once: arguments, what it needs, and outputs that reuse no argument.
    """

    def mean(trained: Any, frozen: Any, data: Any) -> jax.Array:
        return loss_fun(trained, frozen, data).mean()

    gradient = jax.jit(jax.value_and_grad(mean), compiler_options=options)
    memory: Any = gradient.lower(trained, frozen, batch.data).compile().memory_analysis()
    found: dict[str, Any] = {
        "gradients": memory.output_size_in_bytes - 4,
        "working": memory.temp_size_in_bytes,
        "optimizer": {},
        "step": {},
    }
    for name, make in OPTIMIZERS.items():
        optimizer = labelled(make())
        state = jax.eval_shape(
            lambda t, f, optimizer=optimizer: TrainState.create(t, optimizer, f), trained, frozen
        )
        step = jax.jit(train_step(loss_fun, optimizer), donate_argnums=0, compiler_options=options)
        memory = step.lower(state, batch).compile().memory_analysis()
        found["optimizer"][name] = _nbytes(state.opt_state)
        found["step"][name] = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return found


def _files(params: Any, adapter: jl.Adapter) -> dict[str, int]:
    """Bytes on disk of a whole model and of an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        jl.io.save_params(Path(folder) / "full", params)
        jl.io.save_adapter(Path(folder) / "lora", adapter)
        return {
            name: sum(f.stat().st_size for f in (Path(folder) / name).rglob("*") if f.is_file())
            for name in ("full", "lora")
        }


def _elements(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _nbytes(tree: Any) -> int:
    sizes = (int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return sum(sizes)
