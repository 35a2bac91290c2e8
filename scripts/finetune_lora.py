"""Fine-tune a saved base with LoRA and save the adapter."""

import sys

from jax_lora.experiments.article import FinetuneLora, run_finetune
from jax_lora.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(FinetuneLora, run_finetune))
