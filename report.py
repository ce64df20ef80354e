"""One page of a set of runs: settings that differ, curves, rates and waits, best rows, environment, what was resumed and left out.

    python report.py checkpoints/m1 checkpoints/m1_no_erasing --out m1.html
    python report.py logs                                              every log in a folder, published ones too

A run is its folder, its log.txt or another log that compare_logs.py reads. The page is one file, which needs no network."""

import argparse
import sys

from detection.config import SETTINGS as DETECTION
from reporting.plots import PAGE_SUFFIX, checked_path
from reporting.run_page import run_page
from run.config import SETTINGS
from run.errors import InputError
from segmentation.config import SETTINGS as SEGMENTATION


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, log, folder that holds some (searched at every depth), or glob")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page, .html [report.html]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    args = build_parser().parse_args(argv)
    try:
        out = checked_path(args.out, flag="--out", endings=(PAGE_SUFFIX,))
        out.write_text(run_page(args.runs, tasks=(SETTINGS, DETECTION, SEGMENTATION)), encoding="utf-8")
    except (InputError, OSError) as error:
        sys.stderr.write(f"report.py: {error}\n")
        return 1
    sys.stderr.write(f"wrote {out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
