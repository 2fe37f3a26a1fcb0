"""The process around the command line: `regtool`, and `python -m regtool`."""

import contextlib
import gc
import os
import sys

OBJECTS = 1_000_000  # new ones before garbage is looked for: imports make hundreds of thousands, and all of them stay
SPINS = "1000"  # of a thread that waits for the others; libgomp's millions keep a core from whoever else is at work, us included: 20 times slower


def run() -> None:
    """Runs the command line and ends the process, without taking the interpreter apart object by object: after torch that lasts 0.8 s."""
    gc.set_threshold(OBJECTS, 20, 20)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read once, when torch is loaded; the workers of a cohort inherit it
    from regtool.cli.app import main

    try:
        main()
    except SystemExit as ended:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more; what can be said of that has been said
                    stream.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 0)


if __name__ == "__main__":
    run()
