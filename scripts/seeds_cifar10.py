"""Run the article's experiment with several seeds and print a table."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.experiments.seeds import Seeds, run_seeds

    sys.exit(main(Seeds, run_seeds))
