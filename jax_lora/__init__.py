"""LoRA for JAX: an adapter is a value; `apply` makes any JAX function take it as an argument."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_lora.adapter import Adapter as Adapter
from jax_lora.adapter import Layout as Layout
from jax_lora.algebra import delta as delta
from jax_lora.algebra import drop as drop
from jax_lora.algebra import merge as merge
from jax_lora.algebra import negate as negate
from jax_lora.algebra import scale as scale
from jax_lora.algebra import select as select
from jax_lora.algebra import unmerge as unmerge
from jax_lora.apply_bank import apply_bank as apply_bank
from jax_lora.bank import Bank as Bank
from jax_lora.combine import combine as combine
from jax_lora.config import LoraConfig as LoraConfig
from jax_lora.discover import discover as discover
from jax_lora.dropout import dropout as dropout
from jax_lora.errors import AdapterError as AdapterError
from jax_lora.errors import CheckpointError as CheckpointError
from jax_lora.errors import ConfigError as ConfigError
from jax_lora.errors import JaxLoraError as JaxLoraError
from jax_lora.errors import MaterializeError as MaterializeError
from jax_lora.errors import TargetError as TargetError
from jax_lora.extract import extract as extract
from jax_lora.extract import resize as resize
from jax_lora.from_data import init_eva as init_eva
from jax_lora.from_data import init_lora_ga as init_lora_ga
from jax_lora.lowrank import Approximation as Approximation
from jax_lora.plan import Plan as Plan
from jax_lora.plan import init as init
from jax_lora.plan import plan as plan
from jax_lora.rules import Rule as Rule
from jax_lora.sharding import adapter_shardings as adapter_shardings
from jax_lora.summary import Summary as Summary
from jax_lora.summary import summary as summary
from jax_lora.transform import apply as apply
from jax_lora.variants import DoraFactors as DoraFactors
from jax_lora.variants import FullValue as FullValue
from jax_lora.variants import LohaFactors as LohaFactors
from jax_lora.variants import LokrFactors as LokrFactors
from jax_lora.variants import LoraFA as LoraFA
from jax_lora.variants import LoraFactors as LoraFactors
from jax_lora.variants import RowValues as RowValues
from jax_lora.variants import VeraFactors as VeraFactors
from jax_lora.variants import cache_norms as cache_norms

if TYPE_CHECKING:
    from jax_lora import io as io
    from jax_lora import optim as optim
    from jax_lora import peft as peft
    from jax_lora import serving as serving
    from jax_lora import sweep as sweep
    from jax_lora import training as training

__version__ = "0.1.0"

# These need optax or orbax, which take longer to import than all the rest: loaded at first use.
_LAZY = ("io", "optim", "peft", "serving", "sweep", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jax_lora.{name}")
    raise AttributeError(f"module 'jax_lora' has no attribute {name!r}")
