"""Windows and macOS: what these systems lack is hidden, and the modules that use it on Linux must do without it."""

import errno
import fcntl
import importlib.util
import os
import signal
import sys
from types import ModuleType

import pytest
from conftest import ROOT

NOT_ON_WINDOWS = {
    signal: ("SIGUSR1", "SIGHUP", "SIGKILL"),
    os: ("register_at_fork", "fork", "getppid", "killpg", "geteuid"),
}


def load(path: str) -> ModuleType:
    """A module of the project, imported anew."""
    spec = importlib.util.spec_from_file_location("imported_anew", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def windows(monkeypatch):
    """No fcntl, few signals, no fork; a file is flushed only where it is open for writing, and a folder cannot be."""
    kind_of_access, open_file, flush = fcntl.fcntl, os.open, os.fsync

    def open_no_folder(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, flags, *args, **kwargs)

    def flush_writable(descriptor: int):
        if kind_of_access(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flush(descriptor)

    for module, names in NOT_ON_WINDOWS.items():
        for name in names:
            monkeypatch.delattr(module, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails
    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "fsync", flush_writable)
    monkeypatch.setattr(sys, "platform", "win32")


def test_windows_stops_at_the_signal_that_it_has(windows):
    stopping = load("qlora/training/stopping.py")
    stop = stopping.StopOnSignal()
    with stop.signals_handled():
        signal.raise_signal(signal.SIGTERM)
    assert stopping.STOP_SIGNALS == [signal.SIGTERM] and stop.received == signal.SIGTERM


def test_windows_has_no_lock_and_says_so(windows, tmp_path, caplog):
    run_lock = load("qlora/training/run_lock.py")
    (tmp_path / run_lock.LOCK_FILE).touch()
    run_lock.check_not_locked(str(tmp_path))
    with run_lock.lock_output_dir(tmp_path / "out"):
        assert f"{tmp_path / 'out'}: on Windows no folder is locked" in caplog.text
    assert not (tmp_path / "out").exists()


def test_windows_downloads_without_a_lock(windows, tmp_path):
    with load("qlora/atomic.py").only_process(tmp_path, "downloads into"):
        pass


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_only_linux_ends_processes_with_their_parents(windows, monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    processes = load("qlora/training/processes.py")
    monkeypatch.setenv(processes.LAUNCHED_BY_TORCHRUN, "id")
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: pytest.fail("prctl is Linux's"))
    processes.end_with_parents()
    processes.end_with_parent()


def test_files_are_flushed_and_renamed_on_windows(windows, tmp_path):
    atomic = load("qlora/atomic.py")
    for number in (1, 2):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "adapter_config.json").write_text(str(number))
        atomic.publish_folder(tmp_path / "new", tmp_path / "final", replaced=tmp_path / f"old {number}")
    assert (tmp_path / "old 2" / "adapter_config.json").read_text() == "1"
    atomic.publish_files(tmp_path / "final", tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == "2"


def test_folders_are_flushed_where_they_can_be(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flush(descriptor), flushed.append(os.fstat(descriptor))))
    (tmp_path / "file").touch()
    load("qlora/atomic.py").flush(tmp_path / "file", tmp_path)
    file, folder = flushed
    assert os.path.samestat(file, (tmp_path / "file").stat()) and os.path.samestat(folder, tmp_path.stat())
