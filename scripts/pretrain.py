"""Pre-train the article's network and save it."""

import sys

from jax_lora.experiments.article import Pretrain, run_pretrain
from jax_lora.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(Pretrain, run_pretrain))
