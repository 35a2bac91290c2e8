"""Run the article's whole experiment and write a report."""

import sys

from jax_lora.experiments.article import Reproduce, run_reproduce
from jax_lora.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(Reproduce, run_reproduce))
