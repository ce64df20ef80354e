"""What a folder of teacher labels holds, and whether it is whole.

    python tools/inspect_teacher_labels.py labels

One line per epoch: how many positions have a label, whether the files' checksums are right, and how many labels are the class of the image or
of the one it is mixed with. Ends with code 1 if anything is damaged; that some labels are missing is no damage."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distillation.inspection import inspect
from run.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder given as --teacher-labels")
    args = parser.parse_args(argv)
    try:
        return 0 if inspect(args.folder.expanduser()) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
