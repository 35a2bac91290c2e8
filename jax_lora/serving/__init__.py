"""Inference in this process with many adapters of one base: batches of requests, futures back."""

from jax_lora.serving.folder import AdapterFolder as AdapterFolder
from jax_lora.serving.server import Server as Server
from jax_lora.serving.server import ServerConfig as ServerConfig
from jax_lora.serving.server import Stats as Stats
