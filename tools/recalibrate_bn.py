"""Take BatchNorm's running statistics anew from training images, and write the checkpoint with them.

    python tools/recalibrate_bn.py --input checkpoints/soup.pth --images 20000 --output checkpoints/soup_bn.pth
    python tools/recalibrate_bn.py --input net.pth --config recipes/recnext_300e.yaml --data-path ~/imagenet --input-size 256 --output net_256.pth

After weights were averaged, changed, or are to be used at another --input-size, the statistics that training left are those of another network. The
images come from the training loader: as the recipe crops, augments and mixes them, of the epochs after its last, the same for one --data-seed. Each
statistic is the mean over equally large batches of each batch's own; nothing but these statistics changes.

Settings are those of the run that wrote the checkpoint; other flags are main.py's and take their place (--mixup 0 --cutmix 0 --aa none: as it is
evaluated rather than trained). A checkpoint that is not this project's needs --model or --config, and --data-path."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import datasets
from refining import recipe, statistics, writing
from run import checkpoint, network, process
from run.command import positive_int, run_process
from utils import log


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recalibrate_bn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    recipe.add_flags(parser, several=False)
    parser.add_argument("--images", type=positive_int, default=10_000, metavar="N", help="training images, rounded up to whole batches [%(default)s]")
    return parser


def main(argv: list[str]) -> int:
    """Exit status, 0. InputError where the checkpoint does not fit, or the network has no BatchNorm."""
    args, flags, rank = recipe.start(build_parser(), argv)
    out = writing.require_free(args.output)
    saved = checkpoint.read(args.input)
    state = checkpoint.weights(saved, use_ema=args.use_ema, where=args.input)
    cfg = recipe.recipe_of(saved, args.input, flags, is_eval=False)
    images, _ = datasets.open_images(cfg)
    checkpoint.warn_of_other(saved, args.input, datasets.facts(cfg, images.classes))
    net = network.build(cfg, len(images.classes), distillation=any("dist" in name for name in state))
    checkpoint.load_weights(net, state, where=args.input)
    num_images = statistics.recalibrate(net.to(rank.device), statistics.training_batches(cfg, images, rank, args.images))
    facts = {**saved, **datasets.facts(cfg, images.classes)}
    made_from = {
        "what": f"with BatchNorm's statistics of {num_images} images",
        "file": args.input,
        "use_ema": args.use_ema,
        "images": num_images,
        **writing.origin(saved),
    }
    writing.write(out, {name: value.cpu() for name, value in net.state_dict().items()}, facts, made_from=made_from)
    log.info("%s: BatchNorm's statistics are those of %d training images", out, num_images)
    process.stop_process()
    return 0


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
