"""Models to try things on. They know nothing of LoRA, which is the proof that any model works."""

from jax_lora.models.mlp import MLP as MLP
from jax_lora.models.mlp import torch_default as torch_default
