"""Switch between tasks on one base, by merging and by an adapter for each request."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the imports, which take a moment, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from jax_lora.experiments.cli import main
    from jax_lora.experiments.switching import SwitchTasks, run_switch

    sys.exit(main(SwitchTasks, run_switch))
