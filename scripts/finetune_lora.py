"""Fine-tune a saved base with LoRA and save the adapter."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.article import FinetuneLora, run_finetune
    from jax_lora.experiments.cli import main

    sys.exit(main(FinetuneLora, run_finetune))
