"""Run the article's whole experiment and write a report."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.article import Reproduce, run_reproduce
    from jax_lora.experiments.cli import main

    sys.exit(main(Reproduce, run_reproduce))
