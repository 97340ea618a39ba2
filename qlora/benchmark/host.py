"""The host's part in a benchmark: a host that is slowed down on purpose, and how long the GPU waits for it."""

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

SAMPLE_MILLISECONDS = 100


@contextlib.contextmanager
def throttled_host() -> Iterator[None]:
    """Keeps this process, and all that it starts, on one core, which it shares with a busy loop."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, cores)


class BusyShare:
    """The share of time in which the GPU computes, as nvidia-smi reports it every SAMPLE_MILLISECONDS."""

    def __init__(self):
        self.samples: list[tuple[float, float]] = []  # time.monotonic(), share from 0 to 1

    def __enter__(self) -> "BusyShare":
        query = "--query-gpu=utilization.gpu --format=csv,noheader,nounits"
        command = ["nvidia-smi", *query.split(), f"--loop-ms={SAMPLE_MILLISECONDS}"]
        self.sampler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        return self

    def read(self):
        """Takes the samples as they come."""
        assert self.sampler.stdout is not None
        for line in self.sampler.stdout:
            if line.strip().isdigit():
                self.samples.append((time.monotonic(), int(line) / 100))

    def __exit__(self, *error):
        self.sampler.terminate()
        self.sampler.wait()
        self.reader.join()

    def between(self, start: float, end: float) -> float | None:
        """The mean share between two moments of `time.monotonic()`; None where there are no samples."""
        shares = [share for moment, share in self.samples if start <= moment <= end]
        return round(statistics.mean(shares), 3) if shares else None
