"""Pictures of what a network sees: `features`, the branches of a token mixer for given photos; `erf`, effective receptive fields.

`python tools/visualize.py features cat.jpg --model repnext_m1 --checkpoint FILE --layer stages.0.blocks.1.token_mixer --out cat.png`
`python tools/visualize.py erf --model recnext_m1 --against plain7x7 --images data/imagenet/val --out erf.png`

Both take any model of timm's registry, ours included, and any layer by name. They need matplotlib (`pip install -r requirements-plots.txt`)."""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from reporting.features import run_features
from reporting.receptive_field import PLAIN, run_erf
from run.errors import InputError


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _add(parser, flag: str, **settings) -> None:
    """A flag whose name may be written with - or _."""
    parser.add_argument(*dict.fromkeys((flag, "--" + flag[2:].replace("-", "_"))), **settings)


def parse(argv: list[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add(shared, "--model", required=True, help="a network of timm's registry, which includes ours")
    _add(shared, "--checkpoint", metavar="FILE", help="weights: a file, URL or hf-hub:NAME [untrained]")
    _add(shared, "--input-size", type=_positive, metavar="PIXELS", help="side of the square input [the checkpoint's, or 224]")
    _add(shared, "--seed", type=int, default=0, help="of untrained weights and random noise [0]")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    features = commands.add_parser("features", parents=[shared], allow_abbrev=False, help="what each branch of a layer sees")
    features.add_argument("photos", nargs="*", type=Path, metavar="PHOTO")
    _add(features, "--layer", help="name of a layer [the first token mixer]")
    _add(features, "--list-layers", action="store_true", help="print every layer's name, type and output shape, and stop")
    _add(features, "--channels", type=_positive, metavar="N", help="a row for each of the N strongest channels [the mean over channels]")
    _add(features, "--out", metavar="FILE", help="the picture, .png")
    features.set_defaults(run=run_features)
    erf = commands.add_parser("erf", parents=[shared], allow_abbrev=False, help="effective receptive field")
    _add(erf, "--against", metavar="NAME", help=f"draw this model beside it; {PLAIN}: the same with depthwise 7x7 convolutions for recursive ones")
    _add(erf, "--against-checkpoint", metavar="FILE", help="the other network's weights [untrained]")
    _add(erf, "--images", nargs="+", metavar="PATH", help="photos, or folders searched at every depth [random noise]")
    _add(erf, "--num-images", type=_positive, default=20, help="images to average over; of more, evenly spread ones are taken [20]")
    where = erf.add_mutually_exclusive_group()
    _add(where, "--layer", nargs="+", help="names of layers, in both networks [by --stage]")
    _add(where, "--stage", nargs="+", type=int, help="stages whose outputs are looked at, from 0 [all]")
    _add(erf, "--out", metavar="FILE", required=True, help="the picture, .png; the figures go into a .json beside it")
    erf.set_defaults(run=run_erf)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    args = parse(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"visualize.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
