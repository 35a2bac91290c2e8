"""Adapters, parameters and trainings on disk."""

from jax_lora.io.checkpoint import SavedAdapter as SavedAdapter
from jax_lora.io.checkpoint import load_adapter as load_adapter
from jax_lora.io.checkpoint import load_params as load_params
from jax_lora.io.checkpoint import save_adapter as save_adapter
from jax_lora.io.checkpoint import save_params as save_params
from jax_lora.io.fingerprints import fingerprint as fingerprint
from jax_lora.io.manager import Checkpoints as Checkpoints
from jax_lora.io.resuming import Position as Position
from jax_lora.io.resuming import Restored as Restored
