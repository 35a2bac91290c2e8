"""The trials of one program: some at a time on the device, the others waiting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter
from jax_lora.config import LoraConfig
from jax_lora.sweep.program import Program, Slots, Task
from jax_lora.sweep.results import Outcome
from jax_lora.sweep.settings import Settings
from jax_lora.sweep.stacking import pad, stack, structure_of, trim, unstack, widest
from jax_lora.sweep.trials import CONFIGURED, Trial, is_number

#: No epoch has this number, so that no shuffle has the key of what is random in the loss.
NOISE = 2**32 - 1
#: What takes a line about each epoch.
Log = Callable[[str], object]


@dataclasses.dataclass
class Run:
    """A trial on its way.

    Attributes:
        trial: The trial.
        config: The configuration of its adapter.
        adapter: The adapter; in a group it is filled up to the group's ranks.
        order_key: The key of its own shuffles.
        opt_state: The state of its optimizer.
        loss: See `Outcome`.
        metrics: See `Outcome`.
        stopped: See `Outcome`.
    """

    trial: Trial
    config: LoraConfig
    adapter: Adapter
    order_key: jax.Array
    opt_state: Any = None
    loss: list[float] = dataclasses.field(default_factory=list)
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    stopped: str = ""

    def __post_init__(self) -> None:
        self._shapes = jax.eval_shape(lambda adapter: adapter, self.adapter)

    @property
    def size(self) -> int:
        """The elements of its adapter, at its own rank."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._shapes))

    @property
    def noise_key(self) -> jax.Array:
        """The key of what is random in its loss."""
        return jax.random.fold_in(self.order_key, NOISE)

    def record(self, metrics: dict[str, float]) -> None:
        """Add what was measured."""
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)

    def outcome(self) -> Outcome:
        """What became of it.

        Raises:
            ConfigError: The zeros that its adapter was filled up with have moved.
        """
        return Outcome(
            self.trial,
            self.config,
            trim(self.adapter, self._shapes),
            tuple(self.loss),
            {name: tuple(values) for name, values in self.metrics.items()},
            self.stopped,
        )


class Group:
    """Runs whose adapters have one structure, and their program.

    Args:
        runs: The runs.
        task: What they share.
        settings: How they are trained.
        devices: The devices.
        order_key: The key of the shuffles that they share; None if each has its own.
        log: What takes a line about each epoch, or None.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        task: Task,
        settings: Settings,
        devices: Sequence[jax.Device],
        order_key: jax.Array | None,
        log: Log | None,
    ):
        wanted = min(settings.slots or len(runs), len(runs))
        slots = -(-wanted // len(devices)) * len(devices)
        trials, shapes = [run.trial for run in runs], widest([run.adapter for run in runs])
        self.program = Program(task, settings, trials, slots, devices)
        self.program.check_names(trials[0])
        smallest = min(runs, key=lambda run: run.size)
        if smallest.size < max(run.size for run in runs):
            self.program.check_padding(smallest.trial, smallest.adapter, shapes)
        for run in runs:
            run.adapter = pad(run.adapter, shapes)
            run.opt_state = self.program.start(run.trial, run.adapter)
        self.slot_epochs = 0
        self._runs, self._order_key, self._log = runs, order_key, log
        self._noisy = task.noisy

    def train(self, first: int, last: int) -> None:
        """Train those that have not stopped, from one epoch to another."""
        running, slots = [run for run in self._runs if not run.stopped], self.program.slots
        for start in range(0, len(running), slots):
            self._train(running[start : start + slots], first, last)

    def _train(self, runs: Sequence[Run], first: int, last: int) -> None:
        slots = self._loaded(runs)
        if first == 0:
            self._measure(runs, slots)
        for epoch in range(first, last):
            slots, losses = self.program.epoch(slots, epoch)
            self.slot_epochs += self.program.slots
            for run, column in zip(runs, losses.T, strict=False):
                run.loss.append(float(column.mean()))
            self._measure(runs, slots)
            if self._log is not None:
                self._log(_line(runs, epoch))
        trained = unstack((slots.trained, slots.opt_state), len(runs))
        for run, (adapter, opt_state) in zip(runs, trained, strict=True):
            run.adapter, run.opt_state = adapter, opt_state
            if not math.isfinite(run.loss[-1]):
                run.stopped = "diverged"

    def _loaded(self, runs: Sequence[Run]) -> Slots:
        """The state of some runs, one in each slot."""
        # Where there is no run left, the first one is there again; nobody looks at it.
        filled = [*runs, *[runs[0]] * (self.program.slots - len(runs))]
        keys = self._order_key
        if keys is None:
            keys = jnp.stack([run.order_key for run in filled])
        return self.program.load(
            [run.trial for run in filled],
            stack([run.adapter for run in filled]),
            stack([run.opt_state for run in filled]),
            keys,
            jnp.stack([run.noise_key for run in filled]) if self._noisy else None,
        )

    def _measure(self, runs: Sequence[Run], slots: Slots) -> None:
        found = self.program.measure(slots)
        for number, run in enumerate(runs):
            run.record({name: float(values[number]) for name, values in found.items()})


def grouped(runs: Sequence[Run], pad: float) -> list[list[Run]]:
    """The runs that can be one program, in the order of their first.

    Args:
        runs: The runs.
        pad: The size of the largest adapter of a program as a multiple of its smallest.
    """
    alike: dict[Hashable, list[Run]] = {}
    for run in runs:
        static = frozenset(
            (name, value)
            for name, value in run.trial.hyperparameters.items()
            if name not in CONFIGURED and not is_number(value)
        )
        alike.setdefault((structure_of(run.adapter), static), []).append(run)
    groups: list[list[Run]] = []
    for members in alike.values():
        smallest = math.inf
        for run in sorted(members, key=lambda run: run.size):
            if run.size > pad * smallest or smallest == math.inf:
                groups.append([])
                smallest = run.size
            groups[-1].append(run)
    return groups


def _line(runs: Sequence[Run], epoch: int) -> str:
    """What an epoch of some runs came to: the span of each number over the runs."""
    columns = {"loss": [run.loss[-1] for run in runs]}
    columns |= {name: [run.metrics[name][-1] for run in runs] for name in runs[0].metrics}
    spans = (f"{name} {min(c):.4f}-{max(c):.4f}" for name, c in columns.items())
    return f"[{len(runs)} trials, epoch {epoch + 1}] {'  '.join(spans)}"
