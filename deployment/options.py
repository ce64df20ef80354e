"""Options that the commands of deployment share, and the network they name."""

import argparse
from pathlib import Path

from deployment.verify import read_sidecar
from deployment.weights import Trained, load_trained
from run import config
from run.command import image_size, size_text, spellings
from run.errors import InputError


def build_parser(text: str, *, model: tuple[str, ...] = ("model",), ckpt: tuple[str, ...] = ("ckpt",)) -> argparse.ArgumentParser:
    """Parser of the options all export commands have; `model` and `ckpt` are the names of the first two."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(*spellings(*model), dest="model", metavar="NAME", help="architecture (default: what the checkpoint says)")
    parser.add_argument(*spellings(*ckpt), dest="ckpt", metavar="FILE", required=True, help="checkpoint: file, URL or hf-hub:name")
    parser.add_argument(*spellings("use_ema"), action="store_true", help="the checkpoint's EMA weights instead of the raw ones")
    size = "side of the square image, or HxW where the network takes such (default: the checkpoint's, else the model's)"
    parser.add_argument(*spellings("input_size"), type=image_size, metavar="N", help=size)
    parser.add_argument(*spellings("data_path"), metavar="FOLDER", help="real images to verify with (default: scikit-learn's digits)")
    return parser


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", metavar="FILE", help="write nothing; check that FILE computes what the checkpoint does, and refuse it if not")


def require_square(size: int | tuple[int, int] | None, flag: str) -> None:
    """InputError where the images of a classifier would not be square."""
    if isinstance(size, tuple):
        raise InputError(f"{flag} {size_text(size)}: classifiers take square images, give their side")


def load_for(args: argparse.Namespace) -> Trained:
    """The network that the options of `build_parser` name; with --verify its sidecar may say which."""
    require_square(args.input_size, "--input-size")
    name = args.model
    if name is None and getattr(args, "verify", None):
        name = read_sidecar(Path(args.verify)).get("model")
    return load_trained(name, args.ckpt, use_ema=args.use_ema, img_size=args.input_size)


def add_data_flags(parser: argparse.ArgumentParser, *, has_device: bool = True) -> None:
    """Options of a command that measures an accuracy, besides --data-path; `has_device` where it may be elsewhere than on the CPU."""
    parser.add_argument(*spellings("data_set"), default="IMNET", choices=config.SETTINGS.fields["data_set"].metadata["choices"], help="kind of --data-path")
    parser.add_argument(*spellings("batch_size"), type=int, default=64, metavar="N", help="images at a time in the evaluation (default: 64)")
    if has_device:
        parser.add_argument("--device", default="auto", metavar="X", help="where to evaluate (default: a GPU where there is one)")


def has_data(args: argparse.Namespace) -> bool:
    return bool(args.data_path) or args.data_set == "DIGITS"
