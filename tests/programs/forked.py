"""Commands of the project in processes that find torch, timm and the project already imported, which is most of a short command's work."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["torch", "timm", "main", "engine", "datasets", "distillation.labelling", "detection.__main__", "segmentation.__main__", "tests.programs.processes"]
SERVER = multiprocessing.get_context("forkserver")


class Forked:
    """`python ARGS` of a script or `-m module`, in a session of its own: `subprocess.Popen` where it is used here."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], *, has_own_stderr: bool, output: Path | None = None):
        """`output`: a file to which it appends all that it says."""
        self.args = args
        SERVER.set_forkserver_preload(PRELOADED)
        ours, theirs = zip(*(SERVER.Pipe(duplex=False) for _ in range(1 + has_own_stderr)), strict=True)
        self._process = SERVER.Process(target=_run, args=(args, env, theirs[0], theirs[-1], output))
        self._process.start()
        for pipe in theirs:
            pipe.close()
        self.stdout, *own = map(_text, ours)
        self.stderr = own[0] if own else None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self) -> tuple[str, str | None]:
        """Standard output and standard error to their ends; the latter, which is to be short, where it is apart."""
        found = self.stdout.read(), self.stderr.read() if self.stderr else None
        self.wait()
        return found

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text(pipe: Connection) -> TextIO:
    found = os.fdopen(os.dup(pipe.fileno()), encoding="utf-8")
    pipe.close()
    return found


def _run(args: tuple[str, ...], env: dict[str, str], out: Connection, err: Connection, output: Path | None) -> None:
    """The process's life, as Python begins and ends one."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno() if output is None else os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    out.close()
    if err is not out:
        err.close()
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        is_module = args[0] == "-m"
        sys.path[:] = [str(ROOT if is_module else Path(args[0]).resolve().parent), *(path for path in sys.path if path != str(ROOT))]
        sys.argv = list(args[is_module:])
        if is_module:
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.exit(code)
