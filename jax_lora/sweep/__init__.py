"""Sweeps: many adapters of the same parameters trained at once, in one compiled program.

`grid` makes `Trial`s, `run` trains them under some `Settings`, and `Results` is a table with the
best adapter in it.
"""

from jax_lora.sweep.results import Outcome as Outcome
from jax_lora.sweep.results import Results as Results
from jax_lora.sweep.running import run as run
from jax_lora.sweep.settings import Halving as Halving
from jax_lora.sweep.settings import Settings as Settings
from jax_lora.sweep.trials import Trial as Trial
from jax_lora.sweep.trials import grid as grid
