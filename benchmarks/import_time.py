"""How long `import jax_lora` takes beside `import jax`: fresh processes, in turns.

Usage:
    python benchmarks/import_time.py [REPEATS]

Expected: a ratio of at most 1.2.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence


def seconds(module: str) -> float:
    """The wall time of a process that imports one module, the interpreter's start included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main(argv: Sequence[str]) -> float:
    """Prints the medians and their ratio, and returns the ratio."""
    repeats = int(argv[0]) if argv else 10
    for module in ("jax", "jax_lora"):
        seconds(module)  # the first import of each may have to compile its bytecode
    pairs = [(seconds("jax"), seconds("jax_lora")) for _ in range(repeats)]
    jax, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(ours / jax for jax, ours in pairs)
    print(f"import jax {jax:.3f} s, import jax_lora {ours:.3f} s (medians of {repeats})")
    print(f"ratio {ours / jax:.3f}, single pairs {ratios[0]:.3f} to {ratios[-1]:.3f}; expected 1.2")
    return ours / jax


if __name__ == "__main__":
    main(sys.argv[1:])
