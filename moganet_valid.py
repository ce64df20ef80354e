"""The published name of `main.py --eval` for checkpoints of the StarNet-style recipe.

    python moganet_valid.py --model repnext_m0 --img_size 224 --crop_pct 0.9 --data_dir data/imagenet --checkpoint repnext_m0.pth.tar

Every setting of main.py is taken too."""

import argparse
import sys

from main import main
from run.command import run_process, spellings

NAMES = {"img_size": "input-size", "data_dir": "data-path", "checkpoint": "resume"}


def translate(argv: list[str]) -> list[str]:
    """The same command line in main.py's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(*spellings("img_size"), metavar="N", help="side of the square image, pixels: main.py's --input-size")
    parser.add_argument(*spellings("data_dir"), metavar="FOLDER", help="folder of val/: main.py's --data-path")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights: main.py's --resume")
    given, others = parser.parse_known_args(argv)
    return ["--eval", *(f"--{NAMES[name]}={value}" for name, value in vars(given).items() if value is not None), *others]


if __name__ == "__main__":
    run_process(lambda argv: main(translate(argv)), sys.argv[1:])
