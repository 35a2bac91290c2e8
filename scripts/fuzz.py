"""Damage the files of adapters and checkpoints in thousands of ways, and load each."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.experiments.fuzzing.campaign import Fuzz, fuzz

    sys.exit(main(Fuzz, fuzz))
