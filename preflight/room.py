"""Room on the disks for what a run writes, and folders tried without a trace."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from run import checkpoint
from run.errors import Faults
from run.folder import LOCK_NAME
from utils import log


def _existing(folder: Path) -> Path:
    """The folder, or the innermost one around it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """For a block that may make and lock these folders: what it made of them is removed when it is left."""
    missing = [parent for folder in folders for parent in (folder, *folder.parents) if not parent.exists()]
    locks = [folder / LOCK_NAME for folder in folders if not (folder / LOCK_NAME).exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for lock in locks:
                lock.unlink(missing_ok=True)
        for folder in sorted(missing, key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


def bytes_of(entry) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(entry, Tensor):
        return entry.numel() * entry.element_size()
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list | tuple) else ()
    return sum(bytes_of(value) for value in values)


def num_checkpoints(num_kept: int, *, has_ema: bool) -> int:
    """Files that a run has in its folder at most: the last, the numbered and the best ones, and two that are being written."""
    return 1 + num_kept + (2 if has_ema else 1) + 2


def _held_bytes(folder: Path) -> int:
    """Bytes of the checkpoints that are in the folder, which later ones replace; several names of one file count once."""
    files = {found.st_ino: found.st_size for path in folder.glob("checkpoint_*.pth") if (found := path.stat())}
    return sum(files.values())


class Room:
    """What a run is going to write, by disk."""

    def __init__(self):
        self._wanted: dict[int, list[tuple[Path, int, str]]] = {}

    def add(self, folder: Path, num_bytes: int, what: str) -> None:
        """`num_bytes` more below `folder`."""
        log.info("%s: %.3g MiB in %s", what, num_bytes / 2**20, folder)
        self._wanted.setdefault(_existing(folder).stat().st_dev, []).append((folder, num_bytes, what))

    def add_checkpoints(self, folder: Path, state: checkpoint.TrainState, collected: dict) -> None:
        """The checkpoints of a run, each as large as this one."""
        count, size = num_checkpoints(collected["args"]["checkpoint_hist"], has_ema=state.ema is not None), bytes_of(collected)
        wanted = max(0, count * size - _held_bytes(folder))
        self.add(folder, wanted, f"checkpoints, at most {count} of {size / 2**20:.3g} MiB" + (", besides those there" if wanted < count * size else ""))

    def compare(self, faults: Faults) -> None:
        """A fault for each disk that is too small."""
        for wanted in self._wanted.values():
            folder, total = wanted[0][0], sum(num_bytes for _, num_bytes, _ in wanted)
            free = shutil.disk_usage(_existing(folder)).free
            if total > free:
                what = " and ".join(f"{num_bytes / 2**30:.2f} GiB in {place} ({text})" for place, num_bytes, text in wanted)
                faults.add(f"the disk of {folder} has {free / 2**30:.2f} GiB free, the run writes {what}: make room, or choose another folder")
