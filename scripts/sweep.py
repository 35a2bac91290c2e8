"""Train many adapters of one base at once, print a table, and save the best."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.experiments.sweeping import Sweep, run_sweep

    sys.exit(main(Sweep, run_sweep))
