"""Measure the accuracy of a base, with or without an adapter."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.article import Evaluate, run_evaluate
    from jax_lora.experiments.cli import main

    sys.exit(main(Evaluate, run_evaluate))
