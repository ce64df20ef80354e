"""A picture of a page, as a browser shows it: for slides and documents. Needs a Chromium on the PATH.

`python tools/picture_page.py report.html --out report.png --size 1000x1400`"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from reporting.browser import picture
from run.command import image_size, run_command
from run.errors import InputError


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="picture_page.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("page", type=Path, metavar="PAGE", help="an .html file")
    parser.add_argument("--size", type=image_size, default=(1000, 1280), metavar="HxW", help="height and width of the picture, pixels [1000x1280]")
    parser.add_argument("--dark", action="store_true", help="as who prefers dark pages sees it")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, .png")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: the picture is a PNG; end the name in .png")
    height, width = (args.size, args.size) if isinstance(args.size, int) else args.size
    picture(args.page, args.out, width=width, height=height, is_dark=args.dark)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    return run_command(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
