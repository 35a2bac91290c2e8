"""Adapters and weights in the files of PyTorch's world: Hugging Face PEFT, kohya, safetensors."""

from jax_lora.peft.kohya import load_kohya as load_kohya
from jax_lora.peft.names import FLAX as FLAX
from jax_lora.peft.names import Name as Name
from jax_lora.peft.names import flax_names as flax_names
from jax_lora.peft.reading import Loaded as Loaded
from jax_lora.peft.reading import load as load
from jax_lora.peft.weights import save_weights as save_weights
from jax_lora.peft.writing import save as save
