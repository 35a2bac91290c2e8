"""What kinds of adapters there are: one paper, one file; one line here, and it is everywhere.

The line enters a variant into rules, plans, checkpoints, the algebra and the contract test.
"""

from jax_lora.adapter import Variant
from jax_lora.variants.dora import DoraFactors as DoraFactors
from jax_lora.variants.dora import cache_norms as cache_norms
from jax_lora.variants.dora import column_norms as column_norms
from jax_lora.variants.full import FullValue as FullValue
from jax_lora.variants.full import RowValues as RowValues
from jax_lora.variants.loha import LohaFactors as LohaFactors
from jax_lora.variants.lokr import LokrFactors as LokrFactors
from jax_lora.variants.lora import LoraFA as LoraFA
from jax_lora.variants.lora import LoraFactors as LoraFactors
from jax_lora.variants.lora import factor_matrices as factor_matrices
from jax_lora.variants.lora import from_matrices as from_matrices
from jax_lora.variants.vera import VeraFactors as VeraFactors

#: By the name in a rule.
VARIANTS: dict[str, type[Variant]] = {
    variant.NAME: variant
    for variant in (
        LoraFactors,
        LoraFA,
        DoraFactors,
        VeraFactors,
        LohaFactors,
        LokrFactors,
        FullValue,
        RowValues,
    )
}
