"""What every command line shares: how flags are spelt, how a fault is told in one line, and exit codes."""

import argparse
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable

from run.console import flush_output, reserve_standard_streams, tell
from run.errors import InputError
from run.signals import StopRequest


def spellings(*names: str) -> list[str]:
    """Flags of an option, each with `-` and with `_` between its words."""
    return [f"--{text}" for name in names for text in dict.fromkeys((name.replace("_", "-"), name))]


def positive_int(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def image_size(text: str) -> int | tuple[int, int]:
    """For argparse: `512`, the side of square images, or `800x1333`, height and width, in pixels."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 1 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is no size of images: give a side, as 512, or height and width, as 800x1333")
    height, width = int(sides[0]), int(sides[-1])
    return height if height == width else (height, width)


def size_text(size: int | tuple[int, int]) -> str:
    """A size as `image_size` reads it."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def run_command(command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Exit status of a command: 0, or 1 with one line on standard error where the input is at fault."""
    try:
        command(argv)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def killed_loader(error: BaseException | None) -> InputError | None:
    """What to tell the user where the cause of `error` is that a loader process was killed from outside; None where it is not.

    The loss of one is raised wherever the training process is at that moment, and what is there may take it for its own failure."""
    texts = []
    while error is not None:
        texts += [str(error)] if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error) else []
        error = error.__cause__ or error.__context__
    if not texts:
        return None
    match = re.search(r"is killed by signal: ([\w ]+)", "\n".join(texts))
    how = match[1] if match else "it is gone"
    cause = {
        "Killed": "the system does so where memory runs out: give the job more",
        "Bus error": "shared memory ran out: enlarge /dev/shm (docker run --shm-size)",
    }.get(how, "memory may have run out: give the job more")
    return InputError(
        f"a loader process was killed from outside ({how}); {cause}, or lower --num-workers or --batch-size. "
        "Then start again, a training run with --resume auto"
    )


STOPPED = 85  # exit code: saved, start me again with --resume auto
INTERRUPTED = 130  # exit code of Ctrl-C, saved or not: whoever pressed it wants no restart
LOST_PEER = re.compile(r"Connection (closed|reset) by peer|remote process exited|Socket closed")


def explain(error: BaseException) -> int:
    """Name the cause of a failed run, once for all its processes; the exit code.

    The launcher ends all processes as soon as one has ended, and those would only tell that the others are gone. So all wait
    before they speak, but for the one that lost a loader process, and the first where the user can put it right: that, all of them found."""
    index = int(os.environ.get("RANK", 0))
    killed = killed_loader(error)
    error = killed or error
    if isinstance(error, KeyboardInterrupt):
        tell("interrupted; a training run goes on from its last checkpoint with --resume auto\n" if index == 0 else "")
        return INTERRUPTED
    if is_distributed() and not killed and not (index == 0 and isinstance(error, InputError)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from the launcher: no request to save any more
        time.sleep(5)
        if StopRequest.is_made:  # the launcher's signal came while this process still waited for one that is gone
            return 1
    if is_distributed() and isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        error = InputError("another process of the run is gone, killed perhaps for want of memory. Start all of them again with --resume auto")
    if not isinstance(error, InputError):
        traceback.print_exception(error)
        return 1
    tell(f"error: {error}\n" if index == 0 else f"[rank {index}] error: {error}\n")
    return 1


def is_distributed() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def leave(exit_code: int) -> None:
    """End a failed process; among several at once, for tidying up would wait for processes that are gone."""
    flush_output()
    os._exit(exit_code) if is_distributed() else sys.exit(exit_code)


def run_process(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run a command that may be one of several processes, and exit: with its code, or 1 and the cause of its failure, told once.

    130 where it was Ctrl-C that had it save and stop."""
    reserve_standard_streams()
    try:
        try:
            exit_code = main(argv)
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a lost loader process may yet be told of: here, but not while the cause is named
        sys.exit(INTERRUPTED if exit_code == STOPPED and StopRequest.interrupted_at is not None else exit_code)
    except (Exception, KeyboardInterrupt) as failure:
        leave(explain(failure))
    finally:
        flush_output()
