"""Pre-train the article's network and save it."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.article import Pretrain, run_pretrain
    from jax_lora.experiments.cli import main

    sys.exit(main(Pretrain, run_pretrain))
