"""What is compiled: the base is there once, and what trials share is computed once."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.sweep import Settings, grid
from jax_lora.sweep.program import Program, Task
from jax_lora.sweep.stacking import stack

TRIALS, BATCH, RANK = 5, 8, 3
W1, W2 = (11, 13), (13, 4)
# An instruction of compiled HLO, "%name = f32[6,5]{1,0} add(...".
_INSTRUCTION = re.compile(r"= f32\[([\d,]+)\]\S* ([\w\-]+)\(")


def sizes(program: str) -> Counter[int]:
    """How many instructions make so many floating-point numbers."""
    found = [dims for dims, _ in _INSTRUCTION.findall(program)]
    return Counter(int(np.prod([int(n) for n in dims.split(",")])) for dims in found)


def products(program: str, *shape: int) -> int:
    """How many matrix products have so many elements; a name of XLA's library counts as one."""
    size = int(np.prod(shape))
    return sum(
        op in ("dot", "custom-call") and int(np.prod([int(n) for n in dims.split(",")])) == size
        for dims, op in _INSTRUCTION.findall(program)
    )


def compiled(problem: Any, order: str, **values: Any) -> str:
    """The compiled epoch of some trials."""
    trials = grid(
        learning_rate=(0.1,), weight_decay=(0.0,), seed=range(TRIALS), rank=(RANK,), **values
    )
    settings = Settings(epochs=1, batch_size=BATCH, order=order)  # type: ignore[arg-type]
    devices = jax.local_devices()[:1]
    options = problem.arguments["compiler_options"]
    task = Task(
        problem.loss,
        problem.params,
        problem.train,
        False,
        problem.optimizer,
        compiler_options=options,
    ).placed(devices)
    program = Program(task, settings, trials, TRIALS, devices)
    adapters = [problem.start(trial)[0] for trial in trials]
    states = [program.start(t, a) for t, a in zip(trials, adapters, strict=True)]
    keys = jax.random.split(jax.random.key(0), TRIALS)
    slots = program.load(
        trials, stack(adapters), stack(states), keys if order == "own" else keys[0]
    )
    program.epoch(slots, 0)
    return program.text()


@pytest.fixture(scope="module")
def programs(problem: Any) -> dict[str, str]:
    return {
        "same": compiled(problem, "same"),
        "own": compiled(problem, "own"),
        # Negative control: every trial trains whole parameters of its own.
        "full": compiled(problem, "same", variant=("full",)),
    }


def test_the_sizes_tell_arrays_apart() -> None:
    """No array of a sweep but a copy of the base for every trial has as many elements."""
    others = [TRIALS * n * RANK for n in (*W1, *W2)]
    others += [TRIALS * BATCH * n for n in (*W1, *W2, RANK)] + [37 * 11]
    assert not {TRIALS * np.prod(W1), TRIALS * np.prod(W2)} & set(others)


@pytest.mark.parametrize("order", ["same", "own"])
def test_nothing_has_the_size_of_a_base_for_every_trial(
    programs: dict[str, str], order: str
) -> None:
    found = sizes(programs[order])
    for shape in (W1, W2):
        copies = TRIALS * int(np.prod(shape))
        assert found[copies] == 0
        assert sizes(programs["full"])[copies] > 0


def test_what_trials_share_is_computed_once(programs: dict[str, str]) -> None:
    """``x W1`` is one product of the batch with the same batches; each trial's own otherwise."""
    assert products(programs["same"], BATCH, W1[1]) == 1
    assert products(programs["own"], BATCH, W1[1]) == 0
    shared, own = (products(programs[o], TRIALS, BATCH, W1[1]) for o in ("same", "own"))
    assert own == shared + 1  # for (x a) b, and for the gradient of its output


def test_trials_are_traced(problem: Any) -> None:
    """Hyperparameters are arguments: other numbers give the same program."""
    seen = []

    def optimizer(trial: Any) -> Any:
        seen.append(isinstance(trial.learning_rate, jax.core.Tracer))
        return problem.optimizer(trial)

    trials = grid(learning_rate=(0.1, 0.2), weight_decay=(0.0,))
    arguments = problem.arguments | {"optimizer": optimizer, "metric_fun": None}
    results = jl.sweep.run(trials, **arguments, settings=Settings(epochs=1, batch_size=BATCH))
    assert results.compilations == 1
    assert any(seen)
    apart = jnp.abs(results[0].adapter["w1"].b - results[1].adapter["w1"].b)
    assert apart.max() > 0
