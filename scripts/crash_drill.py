"""Kill a training at random moments, resume it, and compare it with one that was never killed."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.experiments.crash_drill import CrashDrill, run_drill

    sys.exit(main(CrashDrill, run_drill))
