"""Run the article's experiment with several seeds and print a table."""

import sys

from jax_lora.experiments.cli import main
from jax_lora.experiments.seeds import Seeds, run_seeds

if __name__ == "__main__":
    sys.exit(main(Seeds, run_seeds))
