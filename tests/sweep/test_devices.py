"""A sweep over four devices is that over one.

The number of devices is set before JAX starts, so both run in one process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jax_lora as jl

ROOT = Path(jl.__file__).parents[1]

PROGRAM = """
import importlib.util, json, sys
import jax, jax.numpy as jnp, numpy as np
import jax_lora as jl
from jax_lora.sweep import Settings, grid
from jax_lora.sweep.program import Program

spec = importlib.util.spec_from_file_location("conftest", sys.argv[1])
conftest = importlib.util.module_from_spec(spec)
sys.modules["conftest"] = conftest
spec.loader.exec_module(conftest)
problem = conftest.problem.__wrapped__()

seen = {}
epoch = Program.epoch
def watched(self, slots, number):
    slots, losses = epoch(self, slots, number)
    a = slots.trained["w1"].a
    seen[len(a.sharding.device_set)] = {
        "shards": sorted(shard.data.shape for shard in a.addressable_shards),
        "collectives": [op for op in ("all-reduce", "all-gather", "all-to-all", "permute")
                        if op in self.text()],
        "base": sorted(s.data.shape for s in self._task.params["w1"].addressable_shards),
    }
    return slots, losses
Program.epoch = watched

trials = grid(rank=(1, 2), learning_rate=(0.1, 0.2, 0.3), weight_decay=(0.01,))[:5]
def run(devices, order):
    arguments = problem.arguments | {"devices": devices}
    settings = Settings(epochs=2, batch_size=8, metric="margin", order=order)
    return jl.sweep.run(trials, **arguments, settings=settings)

worst, learned, slot_epochs = 0.0, 0.0, []
for order in ("same", "own"):
    one, four = run(jax.devices()[:1], order), run(jax.devices(), order)
    slot_epochs.append(four.slot_epochs)
    for left, right in zip(one, four):
        fresh, _ = problem.start(left.trial)
        for path in ("w1", "w2"):
            b, other = np.asarray(left.adapter[path].b), np.asarray(right.adapter[path].b)
            worst = max(worst, float(abs(b - other).max() / abs(b).max()))
            learned = max(learned, float(abs(b).max()))
        assert np.allclose(left.metrics["margin"], right.metrics["margin"], rtol=1e-5)
print(json.dumps({"worst": worst, "learned": learned, "seen": seen, "slot_epochs": slot_epochs}))
"""


@pytest.fixture(scope="module")
def result() -> Any:
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    conftest = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(conftest)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_learns_the_same(result: Any) -> None:
    """Not bitwise: a device's stack is shorter, and sums in another order."""
    assert result["worst"] < 2e-5
    assert result["learned"] > 1e-2


def test_each_device_has_its_share_of_trials_and_the_base_once(result: Any) -> None:
    """Five trials are two a device, three of the eight slots without a trial."""
    on_four = result["seen"]["4"]
    assert on_four["shards"] == [[2, 11, 2]] * 4
    assert on_four["base"] == [[11, 13]] * 4
    assert result["slot_epochs"] == [16, 16]


def test_devices_do_not_talk(result: Any) -> None:
    assert result["seen"]["4"]["collectives"] == []
