"""Parameters and multiply-accumulates of networks, beside the published figures.

    python flops.py -m recnext_m1         one network: ours or any of timm's
    python flops.py -m all                all of ours
    python flops.py -m features_recnext_m3 --input-size 800x1333
    python flops.py -m fpn_recnext_m3 --input-size 512

Parameters are counted as trained without distillation, and fused as for evaluation; MACs, counted by torch, are of the fused network on one
image. `features_` before a name means its feature maps, without head, as detectors and segmenters use them, and `fpn_` Semantic FPN on them:
both take images of any size, 512 pixels where none is said. An exclamation mark means that a published figure differs by more than one unit of
its last digit, or by more than 0.1 G and 5 % of MACs.
"""

import argparse
import sys

from features.exporting import FEATURES
from measuring.operations import choose_models, count, format_row, measure
from run.command import image_size, spellings
from segmentation.exporting import PREFIX, load_named


def measure_named(name: str, input_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """`measuring.operations.count` of feature maps or of a segmenter."""
    trained = load_named(name, None, use_ema=False, img_size=input_size)
    return count(trained.net, (3, *trained.image_size))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True, help="a network of timm's registry, or all: every one of ours")
    size = "side of the square image, or HxW, pixels (default: the network's own)"
    parser.add_argument(*spellings("input_size"), type=image_size, metavar="N", help=size)
    args = parser.parse_args(argv)
    try:
        is_bare = not args.model.startswith((PREFIX, FEATURES))
        names = choose_models(args.model) if is_bare else [args.model]
        print(f"{'':<26}{'parameters':>24}{'GMACs':>10}{'published (fused)':>22}")
        print(f"{'model':<26}{'trained':>12}{'fused':>12}{'fused':>10}{'parameters':>12}{'MACs':>10}")
        for name in names:
            print(format_row(name, args.input_size, measure=measure if is_bare else measure_named), flush=True)
    except ValueError as error:  # an InputError, or a size that a network refuses
        print(f"flops.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
