"""The progress of running jobs, read from their logs as they grow."""

import shutil
import sys
import time
from pathlib import Path

from reporting import logs
from reporting.comparison import compare, hours_left
from reporting.logs import Run
from run.errors import InputError

SPARKS = "▁▂▃▄▅▆▇█"


def newest_log(name: str) -> Path | None:
    """The file itself, or the log in a folder that was written to last; None if there is none yet."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    try:
        found = [log for log, _ in logs.find_logs([name]) if logs.read_log(log, is_named=False).runs]
    except InputError:
        return None
    return max(found, key=lambda log: log.stat().st_mtime, default=None)


def sparkline(values: list[float], width: int = 40) -> str:
    """The course of `values` in at most `width` characters, lowest to highest; the last value of each stretch is drawn."""
    count = min(width, len(values))
    picked = [values[(index + 1) * len(values) // count - 1] for index in range(count)]
    low, high = min(picked, default=0), max(picked, default=0)
    return "".join(SPARKS[int((value - low) / (high - low or 1) * (len(SPARKS) - 1))] for value in picked)


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe_progress(run: Run, *, last_epoch: int | None, reference: Run | None) -> tuple[str, str]:
    """Two phrases on a run's last epoch: how far it is and when it will end, and its measures."""
    record = run.records[-1]
    where = [run.label, f"epoch {record['epoch']}" + (f"/{last_epoch}" if last_epoch is not None else "")]
    left = None if last_epoch is None else hours_left(run, last_epoch)
    if left:
        end = run.path.stat().st_mtime + left * 3600
        where.append(f"{left:.1f} h left, until {time.strftime('%a %d %b %H:%M', time.localtime(end))}")
    elif last_epoch is not None and run.last_epoch >= last_epoch:
        where.append("finished")
    measures = [f"{name} {record[key]:{form}}" for name, key, form in PROGRESS if key in record]
    best_epoch, best = run.best(run.measure)
    measures += [f"best {best:.2f} at {best_epoch}"] if best is not None else []
    if reference is not None:
        against = compare(run, reference)
        measures += [f"{against['ahead_acc1']:+.2f} against {reference.label}"] if against["ahead_acc1"] is not None else []
        measures += [f"expected best {against['expected_best_acc1']:.1f}"] if against["expected_best_acc1"] is not None else []
    return "  ".join(where), "  ".join(measures)


PROGRESS = (  # name, key of the record, format
    *((name, key, ".2f") for key, name in logs.LEADING.items()),
    ("ema", "test_ema_acc1", ".2f"),
    ("train loss", "train_loss", ".4f"),
    ("test loss", "test_loss", ".4f"),
    ("lr", "train_lr", ".2e"),
    ("img/s", "images_per_s", ".0f"),
)


class Follower:
    """Watches logs: one redrawn block per run on a terminal, else one line per new epoch."""

    def __init__(self, names: list[str], *, reference: Run | None, is_terminal: bool):
        self.names = names
        self.reference = reference
        self.is_terminal = is_terminal
        self.paths: dict[str, Path] = {}  # chosen once: of two jobs in one folder, the view must not jump to and fro
        self.printed: dict[str, int] = {}  # last epoch written out; -1 where only the waiting was
        self.num_drawn = 0

    def step(self) -> bool:
        """Read the logs again and show what is new; True when every run has reached its last epoch."""
        lines: list[str] = []
        num_finished = 0
        for name in self.names:
            path = self.paths.get(name) or newest_log(name)
            runs = logs.read_log(path).runs if path is not None and path.exists() else []
            if not runs:
                lines += self._waiting(name)
                continue
            self.paths[name] = path
            logs.label_runs(runs)
            last_epoch = self._last_epoch(path)
            lines += self._block(runs[-1], last_epoch) if self.is_terminal else self._new_lines(name, runs[-1], last_epoch)
            num_finished += last_epoch is not None and runs[-1].last_epoch >= last_epoch
        self._show(lines)
        return num_finished == len(self.names)

    def _last_epoch(self, path: Path) -> int | None:
        planned = logs.planned_epochs(path)
        if planned is not None:
            return planned - 1
        return self.reference.last_epoch if self.reference is not None else None

    def _waiting(self, name: str) -> list[str]:
        """On a terminal always, else the first time."""
        is_new = name not in self.printed
        self.printed.setdefault(name, -1)
        return [f"waiting for the first epoch in {name}"] if self.is_terminal or is_new else []

    def _block(self, run: Run, last_epoch: int | None) -> list[str]:
        """Progress, measures, and the courses of accuracy and loss so far."""
        where, measures = describe_progress(run, last_epoch=last_epoch, reference=self.reference)
        shown = ((logs.LEADING[run.measure], run.measure), ("train loss", "train_loss"))
        courses = [f"{name} {sparkline([value for _, value in run.series(key)])}" for name, key in shown]
        return [f"{where}  (written {_ago(time.time() - run.path.stat().st_mtime)} ago)", f"  {measures}", "  " + "  ".join(courses)]

    def _new_lines(self, name: str, run: Run, last_epoch: int | None) -> list[str]:
        """The last epoch at first, then every epoch that was not yet written out."""
        known = self.printed.get(name, run.last_epoch - 1)
        self.printed[name] = run.last_epoch
        past = [Run(run.path, run.records[: index + 1], label=run.label) for index, record in enumerate(run.records) if record["epoch"] > known]
        return ["  ".join(describe_progress(state, last_epoch=last_epoch, reference=self.reference)) for state in past]

    def _show(self, lines: list[str]) -> None:
        """Over what was drawn before, on a terminal; lines that would wrap are cut, as the way back up counts them."""
        if self.is_terminal:
            width = shutil.get_terminal_size().columns
            back = f"\x1b[{self.num_drawn}F\x1b[J" if self.num_drawn else ""
            lines = [line[:width] for line in lines]
            lines[0] = back + lines[0]
            self.num_drawn = len(lines)
        for line in lines:
            print(line, flush=True)


def follow(names: list[str], *, reference: Run | None, interval_s: float) -> None:
    """Show the progress of running jobs until all are finished or Ctrl-C."""
    follower = Follower(names, reference=reference, is_terminal=sys.stdout.isatty())
    try:
        while not follower.step():
            time.sleep(interval_s)
    except KeyboardInterrupt:
        print("stopped following; the job goes on", file=sys.stderr)
