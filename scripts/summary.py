"""Print the tables of the base and of the LoRA model."""

import sys

from jax_lora.experiments.article import Summarize, run_summary
from jax_lora.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(Summarize, run_summary))
