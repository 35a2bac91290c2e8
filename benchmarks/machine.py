"""What a benchmark ran on: its devices, its peak memory, and how fast it can be."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Whose programs are beside ours.
PEERS = ("torch", "peft", "transformers", "loralib", "qwix")


class JaxProbe:
    """Looks at the machine through JAX: a subject, so that JAX and its memory stay apart."""

    def hardware(self) -> dict[str, Any]:
        """The devices JAX computes on, and the processor of the host."""
        from jax_lora.experiments.environment import hardware

        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return hardware() | {"usable_cores": usable or os.cpu_count()}

    def rates(self, dtype: str, size: int, repeats: int) -> dict[str, float]:
        """FLOP/s of a product of two square matrices and bytes/s of a sum, the best of some."""
        import jax
        import jax.numpy as jnp

        x = jnp.ones((size, size), dtype)
        product, added = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + jnp.ones((), dtype))
        return _rates(
            lambda: jax.block_until_ready(product(x)),
            lambda: jax.block_until_ready(added(x)),
            (size, x.nbytes, repeats),
        )


class TorchProbe:
    """The same through PyTorch, whose library of products is another one."""

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def rates(self, dtype: str, size: int, repeats: int) -> dict[str, float]:
        """FLOP/s of a product of two square matrices and bytes/s of a sum, the best of some."""
        torch = self._torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.ones((size, size), dtype=getattr(torch, dtype), device=device)

        def finished(value: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        return _rates(
            lambda: finished(x @ x),
            lambda: finished(x + 1),
            (size, x.numel() * x.element_size(), repeats),
        )


def _rates(
    product: Callable[[], Any], added: Callable[[], Any], sizes: tuple[int, int, int]
) -> dict[str, float]:
    size, size_bytes, repeats = sizes
    product_s, added_s = (min(seconds(run) for _ in range(repeats + 1)) for run in (product, added))
    return {"flops_per_s": 2 * size**3 / product_s, "bytes_per_s": 2 * size_bytes / added_s}


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_rss(run: Callable[[], Any]) -> int | None:
    """The largest resident memory of this process while a call runs, in bytes.

    Linux only, elsewhere None. Memory that was freed before and kept by the allocator is given back
    first. It counts everything in the process: code, runtime, weights, and what the call needs.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # the peak so far is forgotten
    except (OSError, AttributeError):
        return None
    run()
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
