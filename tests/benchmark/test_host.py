"""qlora/benchmark/host.py: a host that is slowed down, and samples of nvidia-smi."""

import os
import time

import pytest

from qlora.benchmark.host import BusyShare, throttled_host


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity to cores")
def test_throttled_host_has_half_of_one_core():
    before = os.sched_getaffinity(0)
    with throttled_host():
        assert os.sched_getaffinity(0) == {min(before)}
        started, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - started < 0.5:
            pass
        assert time.process_time() - cpu < 0.8 * (time.perf_counter() - started)
    assert os.sched_getaffinity(0) == before


def test_busy_share_is_the_mean_of_the_samples_in_between(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '100\\n50\\n[N/A]\\n'; exec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    started = time.monotonic()
    with BusyShare() as busy:
        while len(busy.samples) < 2:
            time.sleep(0.01)
    assert busy.between(started, time.monotonic()) == 0.75
    assert busy.between(started - 2, started - 1) is None
