"""A folder of teacher labels: what is in its files, and how they are read and written so that nothing is lost or mistaken.

    manifest.json       what the labels were made for; written once
    epoch_00007.u16     a label per position, little-endian 16-bit codes; 65535: none yet (soft distillation: .topk, several codes a label)
    epoch_00007.chk     per mix group, over the positions that have a label: how many labels are the class of the image or of its partner
                        (uint32), and the sum of the images' pixel hashes modulo 2**64 (uint64)
    epoch_00007.json    checksums, counts and the order's hash; written last: without it the epoch counts as absent
    .lock               taken by who reads (shared) or writes (alone); the system frees it when a process dies

Any number of runs may read and write one folder at once: of two labels for one position the first stays."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from run.errors import InputError
from run.manifest import LABELS_MANIFEST, read_manifest

MISSING = 0xFFFF
MAX_CLASSES = MISSING
CHECKS = np.dtype([("num_agree", "<u4"), ("pixels", "<u8")])


@dataclass
class Page:
    """What is stored of an epoch: codes (P, width) uint16, checks (num_groups,) of `CHECKS`."""

    codes: np.ndarray
    checks: np.ndarray

    @property
    def is_filled(self) -> np.ndarray:
        """(P,) whether each position has a label."""
        return self.codes[:, 0] != MISSING


@dataclass(frozen=True)
class Fresh:
    """Labels to be stored: codes (P, width) uint16, `MISSING` where there is none; per position the mix group, whether the label is
    the class of the image or of its partner, and the pixel hash (int64)."""

    codes: np.ndarray
    groups: np.ndarray
    is_agreeing: np.ndarray
    hashes: np.ndarray


@dataclass(frozen=True)
class Merged:
    """What became of fresh labels: how many were stored, for how many positions there was one already, and how many of those
    name another class."""

    num_new: int
    num_known: int
    num_different: int


class LabelStore:
    """The epochs in a folder, each of `num_positions` labels of `width` codes in `num_groups` mix groups."""

    def __init__(self, folder: Path, *, num_positions: int, num_groups: int, width: int):
        self.folder = Path(folder).expanduser()
        self.num_positions = num_positions
        self.num_groups = num_groups
        self.width = width
        self.extension = "u16" if width == 1 else "topk"

    @property
    def num_bytes(self) -> int:
        """Size of one epoch."""
        return 2 * self.num_positions * self.width + CHECKS.itemsize * self.num_groups

    def path(self, epoch: int, extension: str) -> Path:
        return self.folder / f"epoch_{epoch:05d}.{extension}"

    def epochs(self) -> list[int]:
        """Epochs of which there are files, whole or not."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted({int(match[1]) for name in names if (match := re.fullmatch(rf"epoch_(\d+)\.(?:{self.extension}|json)", name))})

    def status(self, epoch: int) -> dict | None:
        """What the epoch's .json says: num_filled, num_agree, order, crc32, chk_crc32; None where the epoch is not stored."""
        with self._locked(fcntl.LOCK_SH):
            return self._status(epoch)

    def _status(self, epoch: int) -> dict | None:
        path = self.path(epoch, "json")
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(status["order"], str) or not all(
                isinstance(status[key], int) for key in ("num_positions", "num_filled", "num_agree", "crc32", "chk_crc32")
            ):
                raise ValueError
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): check the folder's permissions and the file system") from error
        except (ValueError, KeyError, TypeError) as error:
            self._refuse(epoch, "json", "it is no such file as this project writes", error)
        return status

    def read(self, epoch: int) -> Page | None:
        """What is stored of the epoch, or None. InputError naming the file that is damaged."""
        with self._locked(fcntl.LOCK_SH):
            return self._read(epoch)

    def _read(self, epoch: int) -> Page | None:
        status = self._status(epoch)
        if status is None:
            return None
        codes = self._load(epoch, self.extension, "<u2", num_items=self.num_positions * self.width, crc32=status["crc32"])
        checks = self._load(epoch, "chk", CHECKS, num_items=self.num_groups, crc32=status["chk_crc32"])
        page = Page(codes.reshape(self.num_positions, self.width), checks)
        counts = {"num_positions": self.num_positions, "num_filled": int(page.is_filled.sum()), "num_agree": int(checks["num_agree"].sum())}
        for name, count in counts.items():
            if status[name] != count:
                self._refuse(epoch, "json", f"its {name} is {status[name]}, the labels have {count}")
        return page

    def _load(self, epoch: int, extension: str, dtype: str | np.dtype, *, num_items: int, crc32: int) -> np.ndarray:
        try:
            data = bytearray(self.path(epoch, extension).read_bytes())
        except OSError as error:
            self._refuse(epoch, extension, error.strerror or "it cannot be read", error)
        num_bytes = num_items * np.dtype(dtype).itemsize
        if len(data) != num_bytes:
            self._refuse(epoch, extension, f"it has {len(data)} bytes, not {num_bytes}")
        if zlib.crc32(data) != crc32:
            self._refuse(epoch, extension, "its checksum is not the stored one")
        return np.frombuffer(data, dtype)

    def _refuse(self, epoch: int, extension: str, reason: str, cause: Exception | None = None) -> None:
        raise InputError(
            f"{self.path(epoch, extension)} is damaged ({reason}): restore it from a copy, or delete epoch_{epoch:05d}.* there, "
            "and --teacher-labels-mode auto or tools/make_teacher_labels.py makes its labels again"
        ) from cause

    def commit(self, epoch: int, fresh: Fresh, *, order: str) -> Merged:
        """Store the labels for which there are none yet. InputError where they cannot be written; what was stored before is intact."""
        try:
            with self._locked(fcntl.LOCK_EX):
                page = self._read(epoch) or self.blank_page()
                is_fresh = fresh.codes[:, 0] != MISSING
                is_new, is_known = is_fresh & ~page.is_filled, is_fresh & page.is_filled
                num_different = int((page.codes[is_known, 0] != fresh.codes[is_known, 0]).sum())
                if is_new.any():
                    self._add(page, fresh, is_new)
                    self._write(epoch, page, order)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free // 2**20 if self.folder.is_dir() else 0
            raise InputError(f"{self.folder}: the labels of epoch {epoch} are not stored ({error.strerror}; {free} MiB free there)") from error
        return Merged(int(is_new.sum()), int(is_known.sum()), num_different)

    def blank_page(self) -> Page:
        """An epoch without a label."""
        return Page(np.full((self.num_positions, self.width), MISSING, "<u2"), np.zeros(self.num_groups, CHECKS))

    def _add(self, page: Page, fresh: Fresh, is_new: np.ndarray) -> None:
        groups = fresh.groups[is_new]
        page.codes[is_new] = fresh.codes[is_new]
        np.add.at(page.checks["num_agree"], groups, fresh.is_agreeing[is_new].astype(np.uint32))
        np.add.at(page.checks["pixels"], groups, fresh.hashes[is_new].astype(np.uint64))

    def _write(self, epoch: int, page: Page, order: str) -> None:
        """A full disk leaves everything as it was. A process killed in between leaves an epoch that counts as absent, never one
        whose files do not belong together."""
        codes, checks = page.codes.tobytes(), page.checks.tobytes()
        status = {
            "num_positions": self.num_positions,
            "num_filled": int(page.is_filled.sum()),
            "num_agree": int(page.checks["num_agree"].sum()),
            "order": order,
            "crc32": zlib.crc32(codes),
            "chk_crc32": zlib.crc32(checks),
        }
        files = {self.extension: codes, "chk": checks, "json": (json.dumps(status) + "\n").encode()}
        staged = {extension: self._stage(self.path(epoch, extension), data) for extension, data in files.items()}
        self.path(epoch, "json").unlink(missing_ok=True)
        for extension, temporary in staged.items():
            self._sync_folder()
            os.replace(temporary, self.path(epoch, extension))
        self._sync_folder()

    def create_manifest(self, manifest: dict) -> dict:
        """Write the manifest unless there is one; the one that is there now."""
        with self._locked(fcntl.LOCK_EX):
            if read_manifest(self.folder) is None:
                path = self.folder / LABELS_MANIFEST
                os.replace(self._stage(path, (json.dumps(manifest, indent=1) + "\n").encode()), path)
                self._sync_folder()
        return read_manifest(self.folder)

    def require_writable(self) -> None:
        """Make the folder if need be. InputError where it cannot be written or has no room for two epochs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(fcntl.LOCK_EX):
                self._stage(self.folder / ".writable", b"here").unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(f"--teacher-labels {self.folder} cannot be written ({error.strerror}): choose another folder, or read a complete one") from error
        if free < 2 * self.num_bytes:
            raise InputError(
                f"--teacher-labels {self.folder} has {free / 2**20:.1f} MiB free, an epoch takes {self.num_bytes / 2**20:.1f} MiB: make room, or choose another"
            )

    def _stage(self, path: Path, data: bytes) -> Path:
        """A file with the data, safely on the disk, that is to become `path`."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def _sync_folder(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _locked(self, kind: int):
        """Hold the folder's lock. Who only reads does without where there can be none: in a folder of another user's, on a file
        system that knows no locks."""
        is_reading = kind == fcntl.LOCK_SH
        lock = self._open_lock(is_reading)
        try:
            if lock is not None:
                with contextlib.suppress(OSError) if is_reading else contextlib.nullcontext():
                    fcntl.flock(lock, kind)
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _open_lock(self, is_reading: bool) -> int | None:
        path = self.folder / ".lock"
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            if path.exists():
                return os.open(path, os.O_RDONLY)
            if is_reading:
                return None
            raise
