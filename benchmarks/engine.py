"""What `jl.apply` costs: beside the plain model, and beside LoRA written into the model by hand.

Each model is one plain JAX function, and three programs are its gradient:

* `plain`: with respect to all of the model's parameters, without LoRA.
* `by hand`: with respect to the factors, of the model with ``x W + s (x a) b`` written out.
* `apply`: with respect to the adapter, of ``jl.apply`` on the plain function. That includes the
  gradient of each `scale`, which the program by hand has as a constant.

First the last two must agree: the loss, and the gradient of every factor. Then each program is
traced, lowered and compiled from nothing (new functions, JAX's caches cleared, no persistent
cache), and the two with LoRA are run. Programs take turns, so that a busy moment of the machine
does not fall on one of them alone; a ratio is the median of the ratios of single turns, beside
their quartiles. Nothing is asserted about times: the ratios are printed beside what is expected.

Usage:
    python benchmarks/engine.py --save benchmarks/results/engine-cpu.json
    python benchmarks/engine.py --models mlp cnn --repeats 5
    python benchmarks/engine.py --quick
"""

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_lora as jl
from jax_lora.adapter import path_of
from jax_lora.experiments.environment import hardware, versions

# Ratios that we mean to stay within.
TARGET_COMPILE = 1.25  # tracing, lowering and compiling, of the plain gradient's
TARGET_RUN = 1.05  # running, of the time by hand
# Between the gradients of a factor: the largest difference over the largest element.
TOLERANCE = 1e-4

PLAIN, HAND, OURS = "plain", "by hand", "apply"
STAGES = ("trace", "lower", "compile")


class Factored(NamedTuple):
    """A weight of the programs by hand; a pytree, so it is scanned like a plain weight."""

    w: jax.Array
    a: jax.Array
    b: jax.Array


SCALE = 0.5
Weight = jax.Array | Factored


def dense(x: jax.Array, weight: Any) -> jax.Array:
    """A matrix product."""
    if isinstance(weight, Factored):
        return x @ weight.w + SCALE * ((x @ weight.a) @ weight.b)
    return x @ weight


def experts(x: jax.Array, weight: Any) -> jax.Array:
    """A matrix product for each expert: ``x: [experts, tokens, in]``."""
    product = "eti,eio->eto"
    if isinstance(weight, Factored):
        update = jnp.einsum(product, jnp.einsum(product, x, weight.a), weight.b)
        return jnp.einsum(product, x, weight.w) + SCALE * update
    return jnp.einsum(product, x, weight)


def conv(x: jax.Array, weight: Any, stride: int) -> jax.Array:
    """A convolution of images ``[batch, height, width, channels]``."""

    def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    if isinstance(weight, Factored):
        update = convolve(convolve(x, weight.a, stride), weight.b[None, None], 1)
        return convolve(x, weight.w, stride) + SCALE * update
    return convolve(x, weight, stride)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of ``-log p[label]``."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -chosen.mean()


def mlp(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of a multilayer perceptron."""
    *hidden, last = params["layers"]
    for layer in hidden:
        x = jax.nn.relu(dense(x, layer["kernel"]) + layer["bias"])
    return cross_entropy(dense(x, last["kernel"]) + last["bias"], labels)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS normalisation."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def block(params: Any, x: jax.Array) -> jax.Array:
    """A pre-norm transformer layer on ``[batch, length, width]``, with heads of width 64."""
    batch, length, width = x.shape
    size = min(64, width)
    h = norm(x, params["norm1"])
    q, k, v = (
        dense(h, params[name]["kernel"]).reshape(batch, length, width // size, size)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
    causal = jnp.tril(jnp.ones((length, length), bool))
    attention = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape)
    x = x + dense(mixed, params["out"]["kernel"])
    h = norm(x, params["norm2"])
    return x + dense(jax.nn.gelu(dense(h, params["up"]["kernel"])), params["down"]["kernel"])


def language_loss(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The loss of the next token, from the last layer's output."""
    logits = dense(norm(x, params["norm"]), params["head"]["kernel"])
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


def unrolled_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The loss of a language model whose layers are a Python loop."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = block(layer, x)
    return language_loss(params, x, tokens)


def scanned_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The same with stacked layers, scanned."""
    x, _ = lax.scan(
        lambda x, layer: (block(layer, x), None), params["embedding"][tokens], params["layers"]
    )
    return language_loss(params, x, tokens)


def remat_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The same, each layer's activations computed again for the gradient."""
    layer_fun = jax.checkpoint(block)
    x, _ = lax.scan(
        lambda x, layer: (layer_fun(layer, x), None), params["embedding"][tokens], params["layers"]
    )
    return language_loss(params, x, tokens)


def cnn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of a convolutional network."""
    x = images
    for i, layer in enumerate(params["convs"]):
        x = jax.nn.relu(conv(x, layer["kernel"], 1 if i == 0 else 2) + layer["bias"])
    return cross_entropy(dense(x.mean((1, 2)), params["head"]["kernel"]), labels)


def mixture(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of layers of experts; each token goes to one, as far as the expert has room."""
    for layer in params["layers"]:
        gates = jax.nn.softmax(x @ layer["router"])
        count = gates.shape[-1]
        room = 2 * x.shape[0] // count
        chosen = jax.nn.one_hot(gates.argmax(-1), count, dtype=x.dtype)
        place = (jnp.cumsum(chosen, axis=0) - 1) * chosen
        places = jax.nn.one_hot(place.sum(-1).astype(jnp.int32), room, dtype=x.dtype)
        dispatch = jnp.einsum("te,tp->tep", chosen, places)
        combine = dispatch * gates[..., None]
        h = jnp.einsum("tep,ti->epi", dispatch, x)
        h = jax.nn.relu(experts(h, layer["up"]["kernel"]))
        x = x + jnp.einsum("tep,epo->to", combine, experts(h, layer["down"]["kernel"]))
    return cross_entropy(dense(x, params["head"]["kernel"]), labels)


@dataclass(frozen=True)
class Model:
    """A model with random parameters and data.

    Attributes:
        what: What it is, in words.
        loss: ``loss(params, *batch)``; a parameter may be a `Factored`.
        params: The parameters.
        batch: The other arguments.
        rank: The rank of every adapted weight: each one that is called ``kernel``.
    """

    what: str
    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]
    rank: int


class Draw:
    """Reproducible random arrays."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def kernel(self, *shape: int, fan_in: int | None = None) -> dict[str, jax.Array]:
        """A weight with standard deviation ``1/sqrt(fan_in)``; its last two axes are in, out."""
        deviation = 1 / math.sqrt(shape[-2] if fan_in is None else fan_in)
        return {"kernel": self.normal(*shape, deviation=deviation)}

    def normal(self, *shape: int, deviation: float = 1.0) -> jax.Array:
        """Normal float32 numbers."""
        return jnp.asarray(deviation * self._rng.normal(size=shape), jnp.float32)

    def integers(self, high: int, *shape: int) -> jax.Array:
        """Integers from 0 to below ``high``."""
        return jnp.asarray(self._rng.integers(high, size=shape), jnp.int32)


def make_mlp(quick: bool) -> Model:
    """The multilayer perceptron."""
    draw = Draw()
    batch, sizes = (4, (6, 8, 8, 5)) if quick else (256, (1024, 2048, 2048, 1024))
    layers = [draw.kernel(i, o) | {"bias": jnp.zeros(o)} for i, o in pairwise(sizes)]
    x, labels = draw.normal(batch, sizes[0]), draw.integers(sizes[-1], batch)
    what = f"MLP {'-'.join(map(str, sizes))}, batch {batch}"
    return Model(what, mlp, {"layers": layers}, (x, labels), 2 if quick else 16)


def make_transformer(loss: Callable[..., jax.Array], how: str, quick: bool) -> Model:
    """A transformer, with stacked layers unless they are unrolled."""
    draw = Draw()
    depth, width, length, batch, vocabulary = (2, 8, 6, 2, 11) if quick else (4, 512, 128, 8, 1024)
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}

    def layer() -> Any:
        norms = {name: jnp.ones(width) for name in ("norm1", "norm2")}
        return norms | {name: draw.kernel(*shape) for name, shape in shapes.items()}

    layers: Any = [layer() for _ in range(depth)]
    if loss is not unrolled_transformer:
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    params = {
        "embedding": draw.normal(vocabulary, width),
        "head": draw.kernel(width, vocabulary),
        "norm": jnp.ones(width),
        "layers": layers,
    }
    what = f"transformer, {depth} layers {how}, width {width}, {batch} x {length} tokens"
    tokens = draw.integers(vocabulary, batch, length)
    return Model(what, loss, params, (tokens,), 2 if quick else 16)


def make_cnn(quick: bool) -> Model:
    """The convolutional network."""
    draw = Draw()
    batch, size, channels = (2, 8, (3, 4, 5)) if quick else (32, 32, (3, 64, 128, 256))
    convs = [
        draw.kernel(3, 3, i, o, fan_in=9 * i) | {"bias": jnp.zeros(o)}
        for i, o in pairwise(channels)
    ]
    params = {"convs": convs, "head": draw.kernel(channels[-1], 100)}
    images, labels = draw.normal(batch, size, size, channels[0]), draw.integers(100, batch)
    what = f"CNN, 3x3 {'-'.join(map(str, channels))}, {batch} images {size}x{size}"
    return Model(what, cnn, params, (images, labels), 2 if quick else 16)


def make_mixture(quick: bool) -> Model:
    """The mixture of experts."""
    draw = Draw()
    depth, count, width, tokens = (1, 2, 6, 8) if quick else (2, 8, 512, 512)
    layers = [
        {
            "router": draw.normal(width, count, deviation=1 / math.sqrt(width)),
            "up": draw.kernel(count, width, 2 * width),
            "down": draw.kernel(count, 2 * width, width),
        }
        for _ in range(depth)
    ]
    params = {"layers": layers, "head": draw.kernel(width, 100)}
    what = f"mixture, {depth} layers of {count} experts, width {width}, {tokens} tokens"
    batch = (draw.normal(tokens, width), draw.integers(100, tokens))
    return Model(what, mixture, params, batch, 2 if quick else 16)


MODELS: dict[str, Callable[[bool], Model]] = {
    "mlp": make_mlp,
    "transformer": lambda quick: make_transformer(unrolled_transformer, "unrolled", quick),
    "scan": lambda quick: make_transformer(scanned_transformer, "scanned", quick),
    "remat": lambda quick: make_transformer(remat_transformer, "scanned and rematerialised", quick),
    "cnn": make_cnn,
    "mixture": make_mixture,
}


def make_adapter(model: Model) -> jl.Adapter:
    """An adapter for every kernel, with a random ``b``: at zero, ``a`` would have no gradient."""
    config = jl.LoraConfig(model.rank, SCALE, "**/kernel", scaling="alpha")
    plan = jl.plan(model.loss, model.params, *model.batch, config=config)
    fresh = jax.eval_shape(lambda: jl.init(jax.random.key(0), model.params, plan))
    draw = Draw()
    return jl.Adapter(
        {
            path: jl.LoraFactors(
                draw.normal(*f.a.shape, deviation=f.layout.fan_in**-0.5),
                draw.normal(*f.b.shape, deviation=0.3),
                jnp.float32(SCALE),
                f.layout,
            )
            for path, f in fresh.items()
        }
    )


def program(kind: str, model: Model, adapter: jl.Adapter) -> tuple[Callable[..., Any], Any]:
    """A new function, gradient and loss, with its first argument: what it differentiates."""

    def plain(params: Any, params_again: Any, *batch: Any) -> Any:
        del params_again
        return model.loss(params, *batch)

    def by_hand(factors: Any, params: Any, *batch: Any) -> Any:
        def with_factors(key_path: Any, w: jax.Array) -> Weight:
            path = path_of(key_path)
            return Factored(w, *factors[path]) if path in factors else w

        return model.loss(jax.tree_util.tree_map_with_path(with_factors, params), *batch)

    def with_apply(adapter: jl.Adapter, params: Any, *batch: Any) -> Any:
        # The loss in a function of its own: what one run caches by the function, no other finds.
        return jl.apply(lambda params, *batch: model.loss(params, *batch))(params, adapter, *batch)

    functions = {PLAIN: plain, HAND: by_hand, OURS: with_apply}
    firsts = {
        PLAIN: model.params,
        HAND: {path: (adapter[path].a, adapter[path].b) for path in adapter},
        OURS: adapter,
    }
    return jax.value_and_grad(functions[kind]), firsts[kind]


def check(model: Model, adapter: jl.Adapter, **compiler_options: Any) -> float:
    """Compares the program by hand with `apply`.

    Args:
        model: The model.
        adapter: Its adapter.
        **compiler_options: XLA's, for all three programs.

    Returns:
        The largest relative difference of the losses and of the factors' gradients.

    Raises:
        SystemExit: It is above `TOLERANCE`, or the adapter does not change the loss.
    """
    found: dict[str, tuple[np.ndarray, Any]] = {}
    for kind in (HAND, OURS):
        function, first = program(kind, model, adapter)
        jitted = jax.jit(function, compiler_options=compiler_options)
        found[kind] = jax.tree.map(np.asarray, jitted(first, model.params, *model.batch))
    (loss, factors), (our_loss, ours) = found[HAND], found[OURS]
    jitted = jax.jit(model.loss, compiler_options=compiler_options)
    base = float(jitted(model.params, *model.batch))
    differences = {"the loss": float(abs(our_loss - loss) / abs(loss))}
    for path, (a, b) in factors.items():
        for name, want, got in (("a", a, ours[path].a), ("b", b, ours[path].b)):
            error = np.abs(got - want).max() / np.abs(want).max()
            differences[f"the gradient of {path} {name}"] = float(error)
    wrong = [f"{name}: {error:.1e}" for name, error in differences.items() if not error < TOLERANCE]
    if wrong:
        raise SystemExit(
            f"{model.what}: expected `apply` to be within {TOLERANCE} of the program by hand, "
            f"got relative differences of\n  " + "\n  ".join(wrong)
        )
    if abs(base - loss) <= 10 * TOLERANCE * abs(base):
        raise SystemExit(f"{model.what}: expected the adapter to change the loss, got {loss}")
    return max(differences.values())


@dataclass(frozen=True)
class Built:
    """A program built from nothing.

    Attributes:
        trace_s: Seconds to trace it to a jaxpr.
        lower_s: Seconds from there to StableHLO.
        compile_s: Seconds from there to machine code.
        cpu_s: Seconds that this process computed in all of that, on all cores: what a busy
            machine changes least.
    """

    trace_s: float
    lower_s: float
    compile_s: float
    cpu_s: float

    @property
    def total_s(self) -> float:
        """Everything before the first run."""
        return self.trace_s + self.lower_s + self.compile_s


def build(kind: str, model: Model, adapter: jl.Adapter) -> tuple[Built, Any, dict[str, float]]:
    """Builds a program from nothing.

    Returns:
        The times, the compiled program, and what can be counted in it.
    """
    jax.clear_caches()
    gc.collect()
    function, first = program(kind, model, adapter)
    jitted = jax.jit(function)
    cpu = time.process_time()
    times = [time.perf_counter()]
    traced = jitted.trace(first, model.params, *model.batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    cpu = time.process_time() - cpu
    cost = compiled.cost_analysis()
    counts = {
        "stablehlo_lines": float(len(lowered.as_text().splitlines())),
        "dot_generals": float(lowered.as_text().count("stablehlo.dot_general")),
        "flops": float((cost[0] if isinstance(cost, list) else cost)["flops"]),
        "temp_bytes": float(compiled.memory_analysis().temp_size_in_bytes),
    }
    trace_s, lower_s, compile_s = (b - a for a, b in pairwise(times))
    return Built(trace_s, lower_s, compile_s, cpu), compiled, counts


@dataclass(frozen=True)
class Spread:
    """The median of a list, and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratios of single turns."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


@dataclass(frozen=True)
class Result:
    """All that was measured of one model.

    Attributes:
        name: One of `MODELS`.
        what: What it is, in words.
        difference: The largest relative difference of `apply` from the program by hand.
        counts: By program, what can be counted in it.
        built: By program, the times of every turn.
        run_s: By program with LoRA, the seconds of every run.
        ratios: What is compared with the targets, and some more.
    """

    name: str
    what: str
    difference: float
    counts: dict[str, dict[str, float]]
    built: dict[str, list[Built]]
    run_s: dict[str, list[float]]
    ratios: dict[str, Spread]


def measure(name: str, model: Model, repeats: int, runs: int) -> Result:
    """Checks and measures one model, each program first once without counting it."""
    adapter = make_adapter(model)
    difference = check(model, adapter)
    kinds = [PLAIN, HAND, OURS]
    built: dict[str, list[Built]] = {kind: [] for kind in kinds}
    counts: dict[str, dict[str, float]] = {}
    compiled: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
            times, compiled[kind], counts[kind] = build(kind, model, adapter)
            if turn:
                built[kind].append(times)
    run_s: dict[str, list[float]] = {kind: [] for kind in (HAND, OURS)}
    for turn in range(runs + 1):
        for kind in (HAND, OURS) if turn % 2 else (OURS, HAND):
            _, first = program(kind, model, adapter)
            start = time.perf_counter()
            jax.block_until_ready(compiled[kind](first, model.params, *model.batch))
            if turn:
                run_s[kind].append(time.perf_counter() - start)

    def of_builds(over: str, under: str, name: str = "total_s") -> Spread:
        return ratios(*([getattr(b, name) for b in built[kind]] for kind in (over, under)))

    found = {
        "build, apply / plain": of_builds(OURS, PLAIN),
        "that in CPU time": of_builds(OURS, PLAIN, "cpu_s"),
        "build, by hand / plain": of_builds(HAND, PLAIN),
        "that one in CPU time": of_builds(HAND, PLAIN, "cpu_s"),
        "build, apply / by hand": of_builds(OURS, HAND),
        "run, apply / by hand": ratios(run_s[OURS], run_s[HAND]),
    }
    return Result(name, model.what, difference, counts, built, run_s, found)


def table(results: Sequence[Result]) -> str:
    """The results as Markdown tables: what the targets are about, and what it is made of."""
    heads = ["model", *results[0].ratios, "FLOPs, apply / by hand", "temp. bytes, apply / by hand"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for result in results:
        ours, hand = result.counts[OURS], result.counts[HAND]
        cells = [result.name, *map(str, result.ratios.values())]
        cells += [f"{ours[name] / hand[name]:.3f}" for name in ("flops", "temp_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    heads = ["model", "program", *(f"{stage}, ms" for stage in STAGES), "all, ms"]
    heads += ["StableHLO lines", "products", "run, ms"]
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for result in results:
        for kind in (PLAIN, HAND, OURS):
            stages = [
                statistics.median(getattr(b, f"{stage}_s") for b in result.built[kind])
                for stage in (*STAGES, "total")
            ]
            cells = [result.name, kind, *(f"{1e3 * s:.0f}" for s in stages)]
            cells += [f"{result.counts[kind][n]:.0f}" for n in ("stablehlo_lines", "dot_generals")]
            run = result.run_s.get(kind)
            cells.append(f"{1e3 * statistics.median(run):.1f}" if run else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def expectations(results: Sequence[Result]) -> str:
    """What was expected, and what was measured."""
    lines = []
    for what, target in (
        ("build, apply / plain", TARGET_COMPILE),
        ("run, apply / by hand", TARGET_RUN),
    ):
        for result in results:
            got = result.ratios[what].median
            verdict = "reached" if got <= target else "missed"
            lines.append(
                f"{what}, {result.name}: expected at most {target}, got {got:.2f}: {verdict}"
            )
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, from `argv` or from `sys.argv`."""
    parser = argparse.ArgumentParser(
        description="The cost of jl.apply, beside the plain model and LoRA written by hand."
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all"
    )
    parser.add_argument("--repeats", type=_positive, default=9, help="how often each is compiled")
    parser.add_argument("--runs", type=_positive, default=25, help="how often each is run")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, and only check that they agree"
    )
    parser.add_argument("--save", type=Path, help="JSON file for all times and counts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures, prints, saves if asked, and returns what was measured."""
    args = parse_args(argv)
    if args.quick:
        for name in args.models:
            model = MODELS[name](True)
            # Compiling takes longer than running here.
            difference = check(model, make_adapter(model), xla_backend_optimization_level=0)
            print(f"{name}: {model.what}: differs by {difference:.1e}")
        print(f"`apply` and LoRA by hand agree within {TOLERANCE}; nothing was timed")
        return []
    # A program from a persistent cache would not be compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    if args.save is not None:
        # Now, rather than after all the runs.
        args.save.parent.mkdir(parents=True, exist_ok=True)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    machine, found = hardware() | {"load_average_before": load}, versions()
    print(", ".join(f"{key} {value}" for key, value in (machine | found).items()), flush=True)
    results = []
    for name in args.models:
        results.append(measure(name, MODELS[name](False), args.repeats, args.runs))
        print(f"{name}: {results[-1].what}, difference {results[-1].difference:.1e}", flush=True)
    print(f"\nratios: medians of {args.repeats} builds and {args.runs} runs (quartiles)\n")
    print(table(results) + "\n")
    print(expectations(results))
    if args.save is not None:
        saved = {
            "hardware": machine,
            "versions": found,
            "settings": {"repeats": args.repeats, "runs": args.runs, "tolerance": TOLERANCE},
            "expected": {
                "build, apply / plain": TARGET_COMPILE,
                "run, apply / by hand": TARGET_RUN,
            },
            "models": [asdict(result) for result in results],
        }
        args.save.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"saved to {args.save}")
    return results


if __name__ == "__main__":
    main()
