"""Full disks, really filled: nothing half written stays, earlier files are intact, and the run stops or waits as it is told."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
import utils
from run import checkpoint, config, disk, records
from run.errors import DiskFull, InputError
from tests.conftest import ROOT, TINY_RUN, read_log
from tests.test_main import steady

CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))
LAST = "checkpoint_last.pth"


@contextlib.contextmanager
def largest_file(num_bytes: int):
    """Let this process write no file beyond that size; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class SmallDisk:
    """A file system in memory with room for two checkpoints of a tiny run and a half, or where none may be mounted a limit below the
    size of one; until `make_room`."""

    def __init__(self, folder: Path, cleanup: contextlib.ExitStack):
        self.folder = folder
        folder.mkdir()
        self.is_mounted = self._mount("size=900k")
        self.limit = contextlib.ExitStack()
        if self.is_mounted:
            cleanup.callback(subprocess.run, ["umount", str(folder)], check=True)
        else:
            self.limit.enter_context(largest_file(250_000))
            cleanup.callback(self.limit.close)

    def _mount(self, options: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)], capture_output=True).returncode == 0
        return False

    def make_room(self) -> None:
        if self.is_mounted:
            assert self._mount("remount,size=9m")
        self.limit.close()


@pytest.fixture
def small_disk(tmp_path):
    with contextlib.ExitStack() as cleanup:
        yield SmallDisk(tmp_path / "disk", cleanup)


@pytest.fixture(scope="module")
def flags(digits_folder) -> list[str]:
    return [*TINY_RUN, f"--data-path={digits_folder}", "--epochs=4"]


@pytest.fixture(scope="module")
def expected(flags, tmp_path_factory) -> list[dict]:
    """The log of the same run with room enough."""
    folder = tmp_path_factory.mktemp("disk") / "run"
    torch.set_num_threads(1)
    main.main([*flags, f"--output_dir={folder}"])
    return [steady(record) for record in read_log(folder)]


def test_a_run_stops_where_the_disk_is_full_and_goes_on_once_there_is_room(small_disk, flags, expected):
    folder = small_disk.folder / "run"
    with pytest.raises(DiskFull, match=rf"{folder}/{LAST}: not saved \(.*MiB free there\)\. Earlier checkpoints are intact: make room, then --resume auto"):
        main.main([*flags, f"--output_dir={folder}"])
    epoch, _ = checkpoint.position(str(folder / LAST))
    assert [record["epoch"] for record in read_log(folder)] == list(range(epoch + 1))
    assert not list(folder.glob("*.tmp*"))
    with pytest.raises(DiskFull):
        main.main([*flags, f"--output_dir={folder}", "--resume=auto"])
    small_disk.make_room()
    assert main.main([*flags, f"--output_dir={folder}", "--resume=auto"]) == 0
    assert [steady(record) for record in read_log(folder)] == expected


def test_a_run_that_waits_goes_on_as_soon_as_there_is_room(small_disk, flags, expected, monkeypatch, capsys):
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            small_disk.make_room()

    monkeypatch.setattr(disk.time, "sleep", sleep)
    folder = small_disk.folder / "run"
    assert main.main([*flags, f"--output_dir={folder}", "--on-full-disk=wait"]) == 0
    assert [steady(record) for record in read_log(folder)] == expected and not (folder / "log_dropped.txt").exists()
    assert naps == [disk.RETRY_EVERY_S] * 3
    assert capsys.readouterr().out.count("Earlier checkpoints are intact. Waiting for room, 30 minutes at most (--full-disk-minutes)") == 1


def test_waiting_says_so_once_a_minute_and_ends(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(disk.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    cfg, _ = config.parse(["--data-set=DIGITS", "--on-full-disk=wait", "--full-disk-minutes=10"])

    def fail() -> None:
        raise DiskFull("no room", "make some")

    with pytest.raises(DiskFull, match="no room: make some"):
        disk.FullDisk(cfg, CPU).write(fail)
    assert clock[0] == 600
    assert [record.getMessage().split(",")[1] for record in caplog.records] == [f" {left} minutes at most (--full-disk-minutes)" for left in range(10, 0, -1)]


def test_processes_wait_together(monkeypatch):
    """One whose own write succeeded comes round as often as the one that waits for room."""
    answers = iter([True, True, False])
    monkeypatch.setattr(disk, "any_process", lambda flags, rank: [next(answers)])
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: None)
    calls = []
    cfg, _ = config.parse(["--data-set=DIGITS"])
    assert disk.FullDisk(cfg, CPU).write(lambda: calls.append(1) or "written") == "written"
    assert len(calls) == 3


def test_what_has_no_room_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * 90 + b"\n")
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        disk.append_whole(path, b"y" * 20)
    assert path.read_bytes() == b"x" * 90 + b"\n"
    disk.append_whole(path, b"y" * 20)
    assert path.stat().st_size == 111


def test_a_record_without_room_is_waited_for_and_written_once(tmp_path, flags, monkeypatch):
    """Also what is written at the start: settings, and the lines that a resumed run drops."""
    failed, naps = set(), []
    real_append, real_write = disk.append_whole, disk.write_whole

    def full_at_first(real):
        def write(path: Path, data) -> None:
            if path.name not in failed:
                failed.add(path.name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(path, data)

        return write

    monkeypatch.setattr(disk, "append_whole", full_at_first(real_append))
    monkeypatch.setattr(disk, "write_whole", full_at_first(real_write))
    monkeypatch.setattr(disk.time, "sleep", naps.append)
    assert main.main([*flags, "--epochs=1", f"--output_dir={tmp_path}", "--on-full-disk=wait"]) == 0
    assert failed >= {"log.txt", "args.yaml"} and len(naps) == len(failed)
    assert [record["epoch"] for record in read_log(tmp_path)] == [0]


def test_other_errors_are_not_waited_for(tmp_path, monkeypatch):
    def fail(path: Path, data: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cfg, _ = config.parse(["--data-set=DIGITS", "--on-full-disk=wait"])
    run_records = records.Records(cfg, tmp_path, 0)
    monkeypatch.setattr(disk, "append_whole", fail)
    with pytest.raises(InputError, match=r"log\.txt cannot be written \(Input/output error\)") as error:
        disk.FullDisk(cfg, CPU).write(lambda: run_records.write({"epoch": 0}))
    assert not isinstance(error.value, DiskFull)


def test_failures_of_torch_itself_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fail(saved: dict, file) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        checkpoint.save({}, tmp_path, [LAST])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_exit_code_1(tmp_path, flags):
    """A limit below a checkpoint's size stands in for the disk; waiting for a fifth of a second changes nothing."""
    argv = [*flags, f"--output_dir={tmp_path}", "--on-full-disk=wait", "--full-disk-minutes=0.003"]
    limit = (50_000, 50_000)
    done = subprocess.run(
        [sys.executable, "main.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "not saved" in done.stderr and "make room, then --resume auto" in done.stderr
    assert "Waiting for room" in done.stdout
    assert list(tmp_path.glob("*.pth")) == [] and list(tmp_path.glob("*.tmp*")) == []


def test_settings_of_full_disks_are_no_part_of_the_recipe():
    assert {"on_full_disk", "full_disk_minutes"} <= checkpoint.FREE_SETTINGS
    for flags in (["--on-full-disk=hope"], ["--on-full-disk=wait", "--full-disk-minutes=0"]):
        with pytest.raises(InputError, match="disk"):
            config.parse(["--data-set=DIGITS", *flags])
