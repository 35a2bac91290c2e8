"""jax_lora on the NNX module."""

from __future__ import annotations

from typing import Any

from flax import nnx

from benchmarks.compiled import JaxSubject
from benchmarks.peers.nnx_model import model_of
from benchmarks.peers.ours import adapt
from benchmarks.transformer import Task
from jax_lora.adapter import leaves_by_path


def subject(task: Task) -> JaxSubject:
    """The step."""
    graph, params = nnx.split(model_of(task))
    # Some versions of Flax end a variable's path with its attribute, "value".
    paths = {path.removesuffix("/value"): path for path in leaves_by_path(params)}

    def fun(params: Any, tokens: Any) -> Any:
        return nnx.merge(graph, params)(tokens)

    def path_of(name: str, layer: int | None) -> str:
        return paths[f"layers/{name}/kernel" if layer is None else f"layers/{layer}/{name}/kernel"]

    return adapt(task, fun, params, path_of)
