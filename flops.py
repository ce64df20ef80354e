"""Parameters and multiply-accumulates of networks, beside the published figures.

    python flops.py -m recnext_m1         one network: ours or any of timm's
    python flops.py -m all                all of ours

Parameters are counted as trained without distillation, and fused as for evaluation; MACs, counted by torch, are of the fused network on one
image. An exclamation mark means that a published figure differs by more than one unit of its last digit, or by more than 0.1 G and 5 % of MACs.
"""

import argparse
import sys

from measuring.operations import choose_models, format_row


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True, help="a network of timm's registry, or all: every one of ours")
    parser.add_argument("--input-size", "--input_size", type=int, help="side of the square image, pixels (default: the network's own)")
    args = parser.parse_args(argv)
    try:
        names = choose_models(args.model)
        print(f"{'':<26}{'parameters':>24}{'GMACs':>10}{'published (fused)':>22}")
        print(f"{'model':<26}{'trained':>12}{'fused':>12}{'fused':>10}{'parameters':>12}{'MACs':>10}")
        for name in names:
            print(format_row(name, args.input_size), flush=True)
    except ValueError as error:  # an InputError, or a size that a network refuses
        print(f"flops.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
