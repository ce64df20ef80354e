"""The folder of a run: which one it is, that no other run writes there, and which checkpoint in it to continue from."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from run import checkpoint, disk
from run.config import RunConfig
from run.errors import InputError
from utils import Rank, from_main, log

LOCK_NAME, LOG_NAME, STEPS_NAME = ".lock", "log.txt", "train_log.txt"


def choose_folder(cfg: RunConfig) -> Path:
    """The run's folder: as given, else that of the run which --resume continues, else checkpoints/<model>/<time>."""
    if cfg.output_dir:
        return Path(cfg.output_dir)
    if cfg.resume and (Path(cfg.resume).parent / LOG_NAME).is_file():
        return Path(cfg.resume).parent
    return Path("checkpoints") / cfg.model / time.strftime("%Y%m%d-%H%M%S")


def holds_run(folder: Path) -> bool:
    """Whether there is a log or a checkpoint, sound or not, in the folder."""
    return (folder / LOG_NAME).exists() or any(folder.glob("checkpoint_*.pth"))


def claim_folder(cfg: RunConfig, rank: Rank, held: contextlib.ExitStack) -> Path:
    """The run's folder, made if need be, and no other run's until `held` is closed; nothing but its lock changes yet.

    InputError where it cannot be written, another run is writing there, or it holds a run that is not to be continued."""
    folder = choose_folder(cfg)
    if rank.is_main:
        with disk.writing(f"--output_dir {folder}", "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
            held.enter_context(locked(folder))
        if holds_run(folder) and not (cfg.resume or cfg.overwrite):
            raise InputError(f"{folder} already holds a run: continue it with --resume auto, delete it with --overwrite, or choose another --output_dir")
    return folder


@contextlib.contextmanager
def locked(folder: Path):
    """Hold the folder's lock, which names its holder. InputError where another process holds it. Raises OSError.

    The system frees it when the process dies. Processes forked from this one do not keep it alive: loader processes outlive a
    killed parent by seconds."""
    with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "its lock does not say which"
            raise InputError(f"--output_dir {folder} is in use by another run ({holder}): wait until that ends, or choose another --output_dir") from None
        except OSError as error:
            log.warning("%s: the file system knows no locks (%s): nothing keeps a second run from writing there", folder, error.strerror)
        os.register_at_fork(after_in_child=file.close)
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def find_checkpoint(cfg: RunConfig, folder: Path, rank: Rank) -> str | None:
    """What to continue from: the --resume file; for `auto` the first process's choice from the folder, None where there is no run yet.

    InputError where there is one, but no sound checkpoint of it."""
    if cfg.resume != "auto":
        return cfg.resume
    return from_main(lambda: _newest_checkpoint(folder, is_eval=cfg.eval), rank)


def _newest_checkpoint(folder: Path, *, is_eval: bool) -> str | None:
    """Among the last and the numbered checkpoints the sound one that is furthest; the log says which are passed over, and why."""
    numbered = list(reversed(checkpoint.numbered(folder)))
    candidates = [(None, folder / checkpoint.LAST)] if (folder / checkpoint.LAST).exists() else []
    candidates += numbered
    furthest, found, faults = (0, -1), None, []
    for epoch, path in candidates:
        if epoch is not None and (epoch + 1, 0) <= furthest:
            break
        try:
            position = checkpoint.position(str(path))
        except InputError as error:
            log.warning("passed over: %s", error.fact)
            faults.append(error.fact)
            continue
        if found is not None:
            log.warning("passed over: %s is sound, but not as far as %s", found, path.name)
        furthest, found = position, str(path)
    if found is None and (is_eval or holds_run(folder)):
        raise InputError(
            f"--resume auto: {folder} holds no sound checkpoint ({'; '.join(faults) or f'no {checkpoint.LAST} and no numbered one'})",
            "name another with --resume FILE" if is_eval else "restore one from a copy, name another with --resume FILE, or start afresh with --overwrite",
        )
    return found
