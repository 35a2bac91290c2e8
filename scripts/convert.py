"""Convert adapters between jax_lora, PEFT and kohya, and merge them into torch's weights."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.peft.convert import Conversion, convert

    sys.exit(main(Conversion, convert, failure=2))
