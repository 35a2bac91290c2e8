"""Measure the accuracy of a base, with or without an adapter."""

import sys

from jax_lora.experiments.article import Evaluate, run_evaluate
from jax_lora.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(Evaluate, run_evaluate))
