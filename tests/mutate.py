"""Changes lines of the code, one at a time, and runs the tests that should notice. A change that passes is reported.

    python tests/mutate.py                     # all of tests/mutations.txt, a few seconds each
    python tests/mutate.py glm_kernels/ rows   # those whose file has one of these texts in its path

Works on copies of the files that git knows, so the checkout may be edited meanwhile. Tests that do not end are killed,
and count as noticing. Exit status 1 if a change was not noticed, or if its line is no longer in the code.
"""

import contextlib
import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.txt"
# What the tests import, but nothing of the project: imported once, for all processes that are forked.
LIBRARIES = ("pytest", "hypothesis", "matplotlib.figure", "bitsandbytes", "peft", "datasets", "transformers.trainer")
TIMES_LONGER, SECONDS_MORE = 5, 30  # of tests with a change, before they are killed


@dataclass
class Mutation:
    """A change: `old`, which stands in `file` once, becomes `new`; `tests` are those that should notice."""

    file: str
    tests: list[str]
    old: str
    new: str


def read_mutations(text: str) -> list[Mutation]:
    """Parses the list: blocks of `file: tests`, then one pair of lines `- old` and `+ new` for each change."""
    mutations: list[Mutation] = []
    file, tests, old = "", [], ""
    for line in text.splitlines():
        if line.startswith("- "):
            old = line[2:]
        elif line.startswith("+ "):
            mutations.append(Mutation(file, tests, old, line[2:]))
        elif line and not line.startswith("#"):
            file, _, names = line.partition(": ")
            tests = names.split()
    return mutations


def apply(mutation: Mutation, folder: Path):
    """Makes the change in a copy of the project; ValueError unless `old` stands there exactly once."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"stands {text.count(mutation.old)} times in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def outcome(mutation: Mutation, folder: Path) -> str:
    """`caught`, `NOT NOTICED`, or what is wrong with the list; the copy is as before afterwards."""
    original = folder / mutation.file
    kept = original.read_bytes()
    unchanged, seconds = without_change(tuple(mutation.tests), folder)
    if unchanged:
        return f"STALE: the exit status of pytest is {unchanged} without the change"
    try:
        apply(mutation, folder)
        status = exit_status(mutation.tests, folder, TIMES_LONGER * seconds + SECONDS_MORE)
    except ValueError as error:
        return f"STALE: {error}"
    finally:
        original.write_bytes(kept)
    # 1: a test failed; 2: a test file could not be imported. Anything else is a mistake of this list.
    noticed = dict.fromkeys((1, 2, -signal.SIGKILL), "caught")
    return {0: "NOT NOTICED", **noticed}.get(status, f"STALE: the exit status of pytest is {status}")


@functools.cache
def without_change(tests: tuple[str, ...], folder: Path) -> tuple[int | None, float]:
    """The exit status of pytest without a change, and the seconds that it took."""
    started = time.monotonic()
    return exit_status(tests, folder), time.monotonic() - started


def exit_status(tests: Sequence[str], folder: Path, most_seconds: float | None = None) -> int | None:
    """Of pytest, in a forked process, which is killed after this time with all that it started."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests, folder))
    process.start()
    try:
        process.join(most_seconds)
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return process.exitcode


def run_tests(tests: Sequence[str], folder: Path):
    """Runs tests in the copy of the project, up to the first failure; exits with pytest's status."""
    os.setpgrp()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder)}
    import pytest

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        sys.exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]))


def main():
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        importlib.import_module(name)
    chosen = [
        mutation
        for mutation in read_mutations(LIST.read_text(encoding="utf-8"))
        if not sys.argv[1:] or any(text in mutation.file for text in sys.argv[1:])
    ]
    known = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in known.splitlines():
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        caught = 0
        for mutation in chosen:
            result = outcome(mutation, Path(scratch))
            caught += result == "caught"
            print(f"{result:<12} {mutation.file}: {mutation.old.strip()} -> {mutation.new.strip()}", flush=True)
    print(f"{caught} of {len(chosen)} changes were caught.")
    raise SystemExit(caught != len(chosen))


if __name__ == "__main__":
    main()
