"""Signals that ask a run to save and stop."""

import os
import signal
import time

ONE_KEYSTROKE_S = 1.0


class StopRequest:
    """Remembers that this process was asked to save and stop: by SIGTERM or SIGUSR1, which a cluster sends before it takes the machine
    away, by SIGHUP, when its terminal closes, or by SIGINT, Ctrl-C. A second Ctrl-C ends it at once.

    What this process was started to ignore, as by nohup, it ignores."""

    is_made = False  # of the class: a process has one
    interrupted_at = None  # time of the first Ctrl-C

    def __init__(self):
        StopRequest.is_made, StopRequest.interrupted_at = False, None
        handlers = {number: self._remember for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)} | {signal.SIGINT: self._interrupt}
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        StopRequest.is_made = True

    def _interrupt(self, number: int, frame) -> None:
        """One Ctrl-C reaches a launched process twice, from the terminal and from its launcher."""
        has_launcher, now = int(os.environ.get("WORLD_SIZE", 1)) > 1, time.monotonic()
        if StopRequest.interrupted_at is None:
            StopRequest.is_made, StopRequest.interrupted_at = True, now
            if not has_launcher:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            if int(os.environ.get("RANK", 0)) == 0:
                os.write(2, b"\nstopping: saves after this step; Ctrl-C again stops at once\n")  # a logger may be in the middle of a line
        elif now - StopRequest.interrupted_at > ONE_KEYSTROKE_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
