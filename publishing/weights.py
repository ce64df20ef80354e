"""A checkpoint made ready to be published: its weights alone, checked, and evaluated before an accuracy is named."""

import argparse
import os
import shutil
from pathlib import Path

from deployment import accuracy, formats, options, verify
from deployment.weights import Trained, distillation
from run.config import epochs_of_run


def contradictions(args: argparse.Namespace, trained: Trained, epochs: int) -> list[str]:
    """What the file's name will say that the checkpoint does not."""
    found = []
    how = distillation(trained)
    if how is not None and (how != "none") != args.distillation:
        found.append(f"the checkpoint was trained with distillation {how}: {'drop' if args.distillation else 'add'} --distillation to name the file so")
    length = epochs_of_run(trained.args)
    if length not in (None, epochs):
        found.append(f"the checkpoint is of a run of {length} epochs, the file's name will say {epochs}")
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
    is_measured = options.has_data(args)
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
