"""Runs benchmarks: ``python -m benchmarks NAME... [--quick] [--repeats N] [--out DIR]``."""

if __name__ == "__main__":
    # Imported here: the programs' processes import this file, and not all of them shall have JAX.
    from benchmarks.cli import main

    main()
