"""Make a checkpoint ready to be published: its weights alone, fused or not, checked, and evaluated before an accuracy is named.

    python publish.py --model_name recnext_m1 --checkpoint_path pretrain/checkpoint_best.pth --epochs 300
    python publish.py --model_name recnext_m1 --checkpoint_path pretrain/checkpoint_best.pth --epochs 300 --distillation
    python publish.py --model_name recnext_m1 --checkpoint_path pretrain/checkpoint_best.pth --epochs 300 --fused --data-path ~/imagenet

Writes <name>_<distill|without_distill>_<epochs>e.pth or, fused, a TorchScript program ..._fused.pt, the same weights as safetensors, figures
as ....json, and the run's log.txt as ....txt. With --data-path the very file that was written is evaluated, before it is put in place."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from deployment import accuracy, formats, verify
from deployment.verify import spellings
from deployment.weights import Trained, distillation
from run.errors import InputError


def contradictions(args: argparse.Namespace, trained: Trained, epochs: int) -> list[str]:
    """What the file's name will say that the checkpoint does not."""
    found = []
    how = distillation(trained)
    if how is not None and (how != "none") != args.distillation:
        found.append(f"the checkpoint was trained with distillation {how}: {'drop' if args.distillation else 'add'} --distillation to name the file so")
    if trained.args.get("epochs", epochs) != epochs:
        found.append(f"the checkpoint is of a run of {trained.args['epochs']} epochs, the file's name will say {epochs}")
    return found


def copy_log(ckpt: str, target: Path) -> str | None:
    """Copy the log beside the checkpoint to `target`; what to say of it."""
    log = Path(ckpt).expanduser().with_name("log.txt")
    if not log.is_file():
        return None
    with verify.staging(target) as folder:
        shutil.copyfile(log, folder / target.name)
        os.replace(folder / target.name, target)
    return f"{target}: the run's log"


def publish(args: argparse.Namespace, trained: Trained, epochs: int) -> list[str]:
    """Write the files; what to say of them."""
    name = f"{trained.name}_{'distill' if args.distillation else 'without_distill'}_{epochs}e"
    stem = f"{name}_fused" if args.fused else name
    folder = Path(args.output_dir)
    is_measured = accuracy.has_data(args)
    measure = (lambda path: {"accuracy": accuracy.measure(args, trained, str(path))}) if is_measured else (lambda path: {})
    fmt, suffix = (formats.TORCHSCRIPT, ".pt") if args.fused else (formats.STATE, ".pth")
    target, beside = folder / (stem + suffix), folder / f"{stem}.safetensors"
    pictures = args.data_path if args.data_set in ("IMNET", "FLOWERS") else None
    described = verify.write_verified(trained, target, fmt, data_path=pictures, also=measure)
    tensors = verify.write_verified(trained, beside, formats.FUSED_SAFETENSORS if args.fused else formats.SAFETENSORS, data_path=pictures)
    lines = [f"note: {text}" for text in contradictions(args, trained, epochs)] + [verify.report(target, described), verify.report(beside, tensors)]
    if is_measured:
        text = "{acc1:.3f} acc5 {acc5:.3f} loss {loss:.4f} on {num_images} validation images".format(**described["accuracy"])
        lines.append(f"accuracy of {target.name}: acc1 {text} of {args.data_path or args.data_set}")
    else:
        lines.append("accuracy: not measured; give --data-path to evaluate the file")
    copied = copy_log(args.ckpt, folder / f"{stem}.txt")
    return [*lines, *([copied] if copied else [])]


def run(argv: list[str]) -> None:
    parser = verify.build_parser(__doc__, model=("model_name", "model"), ckpt=("checkpoint_path", "ckpt"))
    verify.add_verify(parser)
    parser.add_argument("--epochs", type=verify.positive_int, metavar="N", help="length of the run, for the name (default: what the checkpoint says)")
    parser.add_argument("--distillation", action="store_true", help="trained with distillation, for the name")
    parser.add_argument("--fused", action="store_true", help="the fused network, as a TorchScript program")
    parser.add_argument(*spellings("output_dir"), metavar="FOLDER", default="pretrain", help="where to write (default: pretrain)")
    accuracy.add_data_flags(parser)
    args = parser.parse_args(argv)
    trained = verify.load_for(args)
    if args.verify:
        print(formats.verdict(Path(args.verify), trained, args.data_path))
        return
    epochs = args.epochs if args.epochs is not None else trained.args.get("epochs")
    if epochs is None:
        raise InputError(f"{args.ckpt} does not say how long it was trained: add --epochs N")
    print("\n".join(publish(args, trained, epochs)))


if __name__ == "__main__":
    sys.exit(verify.run_command(run, sys.argv[1:]))
