"""Image classification data as numpy arrays in memory; knows nothing of JAX or LoRA.

`load("cifar10")` reads the tensorflow-datasets copy of CIFAR-10 without TensorFlow and prepares it
first where necessary; `load("digits")` needs neither a download nor a disk; `load("auto")` takes
the first that works and says so.  Importing this package imports numpy and nothing else: the
packages that read or download data come in when they are needed.
"""

from jax_lora.data.dataset import Dataset as Dataset
from jax_lora.data.dataset import DatasetError as DatasetError
from jax_lora.data.dataset import Split as Split
from jax_lora.data.loading import NAMES as NAMES
from jax_lora.data.loading import load as load

__all__ = ["NAMES", "Dataset", "DatasetError", "Split", "load"]
