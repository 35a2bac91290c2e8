"""Adapters and parameters on disk."""

from jax_lora.io.checkpoint import load_adapter as load_adapter
from jax_lora.io.checkpoint import load_params as load_params
from jax_lora.io.checkpoint import save_adapter as save_adapter
from jax_lora.io.checkpoint import save_params as save_params
