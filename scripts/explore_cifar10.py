"""Measure the claims of the article on a saved base, and write one report."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.experiments.explore.run import run_explore
    from jax_lora.experiments.explore.study import Explore

    sys.exit(main(Explore, run_explore))
