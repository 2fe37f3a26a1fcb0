"""The command line: one file a verb. STARTED: when it was loaded, of `time.perf_counter`."""

import time

STARTED = time.perf_counter()
