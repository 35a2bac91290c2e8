"""Print the tables of the base and of the LoRA model."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.article import Summarize, run_summary
    from jax_lora.experiments.cli import main

    sys.exit(main(Summarize, run_summary))
