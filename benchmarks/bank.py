"""A bank: a batch with an adapter for each example beside the same batch on one adapter.

A transformer of four layers has a thousand adapters resident in a bank, of rank 8 for all of its
matrices. Shown are, as medians of ratios in one run, the time of a batch of 64 examples with 64
different adapters over that of the same batch on one adapter by `apply`; and the times of adding
and replacing an adapter, with what they compile, which is counted.

With --forms, the products themselves instead: the two forms that the library has beside two that it
has not, the product with all slots of which each example keeps its own (one-hot), and the ragged
product of the examples sorted by slot.

Usage:
    python benchmarks/bank.py --save benchmarks/results/bank.json
    python benchmarks/bank.py --forms --save benchmarks/results/bank-forms.json
    python benchmarks/bank.py --slots 8 --width 32 --tokens 1 2 --repeats 2 --batch 4

Expected: a mixed batch within 1.3 times the batch on one adapter; an adapter added or replaced in
less than 5 ms, compiling nothing.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_lora as jl
from jax_lora.experiments.environment import hardware, versions
from jax_lora.interpreter.mixed import MixedProduct
from jax_lora.virtual import Selected

LAYERS, HEAD, RANK = 4, 64, 8
RATIO, WRITE_MS = 1.3, 5.0
#: Beside the wall time stands that of the processor, which depends less on what else it does.
PROCESSOR = "_processor"
WRITES = ("add_ms", "replace_ms", "add_processor_ms", "replace_processor_ms")
#: Adapters with values of their own; the slots have them in turn.
DISTINCT = 16
#: Examples, rows of each, slots, inputs (as many as outputs), for rank 8.
SIZES = (
    *((64, rows, slots, 512) for slots in (1000, 32, 8) for rows in (1, 16, 64)),
    (512, 1, 8, 2048),
)
FORMS = ("gather", "fused", "one_hot", "ragged")
#: Forms that take more arithmetic than this are left out.
_MOST_FLOPS = 3e9


def count_compilations() -> Callable[[], int]:
    """How many programs XLA has compiled since."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(found)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm over the last axis."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def layer(p: Any, x: jax.Array) -> jax.Array:
    """Causal attention and a perceptron: ``[n, t, width] -> [n, t, width]``."""
    n, t, width = x.shape
    head = min(HEAD, width)
    h = norm(x, p["norm1"])
    q, k, v = ((h @ p[name]).reshape(n, t, width // head, head) for name in ("q", "k", "v"))
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(head)
    scores = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9))
    x = x + jnp.einsum("nhqk,nkhd->nqhd", scores, v).reshape(n, t, width) @ p["out"]
    return x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"]) @ p["down"]


def model(params: Any, x: jax.Array) -> jax.Array:
    """All layers."""
    for p in params:
        x = layer(p, x)
    return x


def make_model(width: int, rng: np.random.Generator) -> tuple[Any, list[jl.Adapter]]:
    """The base, and adapters of all matrices in it, in which nothing is zero."""

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) / math.sqrt(shape[-2]))

    shapes = dict.fromkeys(("q", "k", "v", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    norms = {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}
    params = [
        norms | {name: normal(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)
    ]
    example = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    plan = jl.plan(model, params, example, config=jl.LoraConfig(rank=RANK))
    fresh: Any = jl.init(jax.random.key(0), params, plan)
    adapters = [
        jl.Adapter(
            {
                path: dataclasses.replace(f, a=normal(*f.a.shape), b=normal(*f.b.shape))
                for path, f in fresh.items()
            }
        )
        for _ in range(DISTINCT)
    ]
    return params, adapters


def measure_bank(
    width: int, slots: int, batch: int, tokens: Sequence[int], repeats: int
) -> dict[str, Any]:
    """What writing takes, and the batches of each length."""
    rng, compiled = np.random.default_rng(0), count_compilations()
    params, adapters = make_model(width, rng)
    bank = jl.Bank.empty(adapters[0], slots)
    bank = bank.add("0", adapters[0])
    jax.block_until_ready(bank.entries)
    before = compiled()
    times: dict[str, list[float]] = {name: [] for name in WRITES}

    def timed(kind: str, write: Callable[..., jl.Bank], slot: int) -> jl.Bank:
        start, start_cpu = time.perf_counter(), time.process_time()
        bank = write(f"{slot}", adapters[slot % DISTINCT])
        jax.block_until_ready(bank.entries)
        times[f"{kind}_ms"].append(1e3 * (time.perf_counter() - start))
        times[f"{kind}{PROCESSOR}_ms"].append(1e3 * (time.process_time() - start_cpu))
        return bank

    for slot in range(1, slots):
        bank = timed("add", bank.add, slot)
    for slot in rng.integers(slots, size=max(repeats, 100)):
        bank = timed("replace", bank.replace, int(slot))
    writing: dict[str, Any] = {"compiled": compiled() - before}
    writing |= {name: spread(found) for name, found in times.items()}
    batches = [
        measure_batch(params, adapters, bank, rng, batch, length, repeats) for length in tokens
    ]
    sizes = {"bank_bytes": bank.nbytes, "adapter_bytes": adapters[0].nbytes}
    return {"writing": writing, "batches": batches, **sizes}


def measure_batch(
    params: Any,
    adapters: list[jl.Adapter],
    bank: jl.Bank,
    rng: np.random.Generator,
    batch: int,
    tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """The times of a batch of this length, in turns: mixed, on one adapter, and on none."""
    width = params[0]["norm1"].shape[0]
    x = jnp.asarray(rng.standard_normal((batch, tokens, width), np.float32))
    names = [f"{slot}" for slot in rng.permutation(bank.slots)[:batch]]
    ids = bank.ids((names * batch)[:batch])
    mixed, single, base = jax.jit(jl.apply_bank(model)), jax.jit(jl.apply(model)), jax.jit(model)
    runs = {
        "mixed": lambda: mixed(params, bank, ids, x),
        "single": lambda: single(params, adapters[0], x),
        "base": lambda: base(params, x),
    }
    out = np.asarray(runs["mixed"]())
    errors = []
    for k in range(0, batch, max(1, batch // 8)):
        own = np.asarray(single(params, adapters[ids[k] % DISTINCT], x))[k]
        errors.append(float(np.abs(out[k] - own).max() / np.abs(own).max()))
    times = in_turns(runs, max(5, min(5 * repeats, 16 * repeats // tokens)))

    def ratios(of: str) -> dict[str, float]:
        pairs = zip(times[f"mixed{of}"], times[f"single{of}"], strict=True)
        return spread([a / b for a, b in pairs])

    return {
        "tokens": tokens,
        "rounds": len(times["mixed"]),
        "adapters": len(set(ids.tolist())),
        "ratio": ratios(""),
        "processor_ratio": ratios(PROCESSOR),
        "largest_error": max(errors),
        **{f"{name}_ms": spread(found) for name, found in times.items()},
    }


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """The times of each, in milliseconds, one after the other so that all see the same machine.

    Beside the wall time of each stands that of the processor.
    """
    times: dict[str, list[float]] = {name + of: [] for name in runs for of in ("", PROCESSOR)}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start, start_processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
            times[name + PROCESSOR].append(1e3 * (time.process_time() - start_processor))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and within which values the middle half of all lies."""
    low, high = np.quantile(values, (0.25, 0.75))
    return {"median": statistics.median(values), "low": float(low), "high": float(high)}


def one_hot(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array) -> jax.Array:
    """The products with the factors of all slots, of which each example keeps its own."""
    chosen = jax.nn.one_hot(ids, a.shape[0], dtype=x.dtype)
    h = jnp.einsum("npi,sri,ns->npsr", x, a, chosen)
    return jnp.einsum("npsr,sro->npo", h, b)


def ragged(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array) -> jax.Array:
    """Ragged products of the examples in the order of their slots."""
    n, rows, _ = x.shape
    order = jnp.argsort(ids)
    sizes = rows * jnp.bincount(ids, length=a.shape[0]).astype(jnp.int32)
    h = lax.ragged_dot(x[order].reshape(n * rows, -1), jnp.swapaxes(a, 1, 2), sizes)
    y = lax.ragged_dot(h, b, sizes).reshape(n, rows, -1)
    return jnp.zeros_like(y).at[order].set(y)


def form_of_ours(name: str) -> Callable[..., jax.Array]:
    """``gather`` or ``fused`` of the library."""
    down = MixedProduct("npi", "n", "ri", "npr", jnp.float32)
    up = MixedProduct("npr", "n", "ro", "npo", jnp.float32)

    def run(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array) -> jax.Array:
        h = getattr(down, name)(x, Selected(a, ids))
        return getattr(up, name)(h, Selected(b, ids))

    return run


def measure_forms(repeats: int, sizes: Sequence[tuple[int, int, int, int]]) -> list[dict[str, Any]]:
    """The times of ``(x a) b`` in each form, all of which agree; None for those left out."""
    results, rng = [], np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    for examples, rows, slots, width in sizes:
        x, a, b = (normal(*n, width) for n in ((examples, rows), (slots, RANK), (slots, RANK)))
        ids = jnp.asarray(rng.integers(slots, size=examples), jnp.int32)
        forms = {"gather": form_of_ours("gather")}
        if rows == 1:
            forms["fused"] = form_of_ours("fused")
        if 4 * examples * rows * slots * RANK * width < _MOST_FLOPS:
            forms |= {"one_hot": one_hot, "ragged": ragged}
        compiled = {
            name: jax.jit(form).lower(x, a, b, ids).compile() for name, form in forms.items()
        }
        expected = np.asarray(compiled["gather"](x, a, b, ids))
        for run in compiled.values():
            close = np.abs(np.asarray(run(x, a, b, ids)) - expected).max()
            assert close <= 1e-5 * np.abs(expected).max()
        runs = {name: functools.partial(run, x, a, b, ids) for name, run in compiled.items()}
        times = in_turns(runs, repeats)
        found = {name: spread(times[name]) if name in times else None for name in FORMS}
        shape = {"examples": examples, "rows": rows, "slots": slots, "width": width}
        results.append({**shape, **{f"{name}_ms": value for name, value in found.items()}})
    return results


def table_of_batches(results: dict[str, Any]) -> str:
    """The batches as a table of Markdown."""
    lines = [
        "| tokens | mixed / one adapter | processor's time | mixed | one adapter | no adapter |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for x in results["batches"]:
        ratios = (x["ratio"], x["processor_ratio"])
        times = (f"{x[name]['median']:.1f} ms" for name in ("mixed_ms", "single_ms", "base_ms"))
        shown = (f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in ratios)
        lines.append(f"| {' | '.join([str(x['tokens']), *shown, *times])} |")
    return "\n".join(lines)


def table_of_forms(results: list[dict[str, Any]]) -> str:
    """The forms as a table of Markdown, in milliseconds."""
    lines = [f"| examples | rows | slots | width | {' | '.join(FORMS)} |", "| --- " * 8 + "|"]
    for x in results:
        sizes = [str(x[name]) for name in ("examples", "rows", "slots", "width")]
        found = [x[f"{name}_ms"] for name in FORMS]
        cells = ["-" if one is None else f"{one['median']:.2f}" for one in found]
        lines.append(f"| {' | '.join(sizes + cells)} |")
    return "\n".join(lines)


def verdict(results: dict[str, Any]) -> str:
    """What was expected and what was found."""
    worst = max(x["ratio"]["median"] for x in results["batches"])
    writing = results["writing"]
    slowest = max(writing[name]["median"] for name in ("add_ms", "replace_ms"))
    return "\n".join(
        (
            f"expected at most {RATIO} times one adapter, got at most {worst:.2f}: "
            + ("reached" if worst <= RATIO else "missed"),
            f"expected less than {WRITE_MS} ms to write and 0 compilations, got {slowest:.2f} ms "
            f"and {writing['compiled']}: "
            + ("reached" if slowest < WRITE_MS and not writing["compiled"] else "missed"),
        )
    )


def main(argv: Sequence[str] | None = None) -> Any:
    """Measures, prints, saves if asked, and returns what was measured."""
    parser = argparse.ArgumentParser(description="A bank of adapters, and mixed batches.")
    parser.add_argument("--forms", action="store_true", help="the products alone, in every form")
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--save", type=Path, help="JSON file for all times")
    args = parser.parse_args(argv)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    machine, found = hardware() | {"load_average_before": load}, versions()
    print(", ".join(f"{key} {value}" for key, value in (machine | found).items()), flush=True)
    names = ["repeats"] if args.forms else ["slots", "width", "batch", "tokens", "repeats"]
    saved: dict[str, Any] = {
        "hardware": machine,
        "versions": found,
        "settings": {name: getattr(args, name) for name in names} | {"rank": RANK},
    }
    if args.forms:
        results: Any = measure_forms(args.repeats, SIZES)
        print(table_of_forms(results))
    else:
        results = measure_bank(args.width, args.slots, args.batch, args.tokens, args.repeats)
        print(table_of_batches(results))
        print(verdict(results))
        saved["expected"] = {"ratio": RATIO, "write_ms": WRITE_MS, "compiled": 0}
    if args.save is not None:
        args.save.write_text(json.dumps(saved | {"results": results}, indent=2) + "\n")
        print(f"saved to {args.save}")
    return results


if __name__ == "__main__":
    main()
