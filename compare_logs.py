"""Tables, curves and live summaries of training logs: ours, published ones of the DeiT family, timm's `summary.csv`.

    python compare_logs.py logs                                            one row per run, best first
    python compare_logs.py logs --format markdown --sort run               the README's table
    python compare_logs.py my/log.txt --against logs/recnext_m1.txt        ahead or behind, learning rates, where it will end
    python compare_logs.py a.txt b.txt --plot curves.html                  also .png, .svg, .pdf
    python compare_logs.py --scatter models.csv cpu_ms top1 --plot s.svg   accuracy against cost, from a CSV or Markdown table
    python compare_logs.py --robustness a.json b.json --plot r.svg         accuracies of main.py --eval --report, and by corruption and severity
    python compare_logs.py checkpoints --follow                            summary of the running job; Ctrl-C ends it

Tables go to standard output, remarks on what was left out of a damaged log to standard error. Only plots need packages beyond Python's own.
"""

import argparse
import functools
import math
import os
import sys
from pathlib import Path

from reporting import plots, robustness, scatter
from reporting.comparison import SORT_KEYS, read_reference, show_tables
from reporting.following import follow
from run.errors import InputError


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0 or math.isinf(value):
        raise ValueError
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compare_logs.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="LOG", help="log.txt, summary.csv, folders (searched at every depth) and globs")
    parser.add_argument("--format", choices=("table", "csv", "markdown", "json"), default="table", help="csv and json: unrounded [table]")
    parser.add_argument("--sort", choices=tuple(SORT_KEYS), default="best", help="best first; params, hours and run ascend [best]")
    parser.add_argument("--digits", type=int, choices=range(7), help="decimals of accuracies [table 2, markdown 1 as in published tables]")
    parser.add_argument("--against", metavar="REF", help="log of a reference run")
    parser.add_argument("--plot", metavar="FILE", help="curves as .png, .svg, .pdf or one self-contained .html page")
    parser.add_argument("--smooth", type=int, metavar="EPOCHS", help="--plot: centred mean over so many epochs; 1: none [3 %% of the longest run]")
    parser.add_argument(
        "--scatter", nargs=3, metavar=("TABLE", "X", "Y"), help="--plot column Y of a CSV or Markdown table against column X, instead of curves"
    )
    parser.add_argument("--robustness", nargs="+", metavar="JSON", help="reports of main.py --eval, instead of logs: table and, with --plot, picture")
    parser.add_argument("--follow", action="store_true", help="summary of running jobs, refreshed; of a folder, the log written to last")
    parser.add_argument("--interval", type=_positive, default=2.0, metavar="SECONDS", help="--follow: time between two looks [2]")
    return parser


def validate(args: argparse.Namespace) -> None:
    """InputError where flags contradict each other."""
    rules = [
        (args.scatter and not args.plot, "--scatter needs --plot FILE to draw into"),
        (args.scatter and (args.logs or args.follow or args.against), "--scatter draws a table: give it no logs, no --follow and no --against"),
        (args.follow and args.plot, "--follow and --plot exclude each other: plot in a second terminal"),
        (
            args.robustness and (args.logs or args.follow or args.against or args.scatter),
            "--robustness compares reports: give it no logs, no --follow, no --against and no --scatter",
        ),
        (not args.scatter and not args.robustness and not args.logs, "name at least one log: a log.txt, a summary.csv or a folder that holds some"),
        (args.smooth is not None and args.smooth < 1, f"--smooth {args.smooth} is no number of epochs: 1 or more"),
    ]
    for is_wrong, message in rules:
        if is_wrong:
            raise InputError(message)


def run_command(args: argparse.Namespace) -> None:
    """What the flags ask for; InputError for what the user can put right."""
    validate(args)
    if args.follow:
        follow(args.logs, reference=read_reference(args.against)[0] if args.against else None, interval_s=args.interval)
        return
    out = plots.checked_path(args.plot) if args.plot else None
    if args.robustness:
        draw = functools.partial(robustness.plot, robustness.show(args.robustness, layout=args.format, digits=args.digits))
    elif args.scatter:
        table, x_name, y_name = args.scatter
        draw = functools.partial(scatter.plot_scatter, Path(table), x_name, y_name)
    else:
        draw = functools.partial(plots.plot_curves, show_tables(args), smooth_epochs=args.smooth)
    if out is not None:
        draw(out=out)
        print(f"wrote {out}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    args = build_parser().parse_args(argv)
    try:
        run_command(args)
        sys.stdout.flush()
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"compare_logs.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without these letters shows others instead of failing
    sys.exit(main())
