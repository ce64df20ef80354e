"""torchrun that hands signals that ask to save and stop on to the training processes, and ends with their exit code and without a report of its own.

    python tools/launch.py <torchrun's flags> main.py <main.py's flags>

torchrun itself dies of SIGUSR1, answers SIGTERM, SIGHUP and Ctrl-C by ending the training after 30 seconds, and turns every exit code into 1; a batch
system would neither give the run time to save nor learn that it asks (with 85) to be started again."""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

HANDED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
STOPPED = 85


def hand_on(number: int, frame) -> None:
    """Send a signal to this process's children, the training processes."""
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in listing.read_text().split():
            os.kill(int(child), number)


def main() -> int:
    for number in HANDED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, hand_on)
    try:
        torchrun(["--signals-to-handle=SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if STOPPED in codes:
            return STOPPED
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has named the cause itself
            return failure.exitcode
        if failure.exitcode != -signal.SIGINT:
            sys.stderr.write(f"error: process {rank} was ended by signal {-failure.exitcode}; out of memory? The others were stopped\n")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
