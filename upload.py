"""Push a checkpoint to the Hugging Face hub as a timm model, with a model card, or write the same folder to a disk.

    python upload.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --repo-id USER/recnext_m1.dist --data-path ~/imagenet
    python upload.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --dry-run hub/recnext_m1

The folder holds the unfused weights, timm's configuration and a card filled with what was measured: parameters and MACs are counted, accuracies
are the run's own and, with --data-path, those of these very weights; what was not measured is left out. Before it goes anywhere, it is loaded
with timm and its logits are compared with the checkpoint's, bit for bit."""

import sys
from pathlib import Path

from deployment import options
from publishing.hub import upload
from run import command
from run.command import spellings
from run.errors import InputError


def run(argv: list[str]) -> None:
    parser = options.build_parser(__doc__, model=("model", "model_name"), ckpt=("ckpt", "checkpoint_path"))
    parser.add_argument(*spellings("repo_id"), metavar="USER/NAME", help="repository on the hub; made if need be")
    parser.add_argument(*spellings("dry_run"), metavar="FOLDER", help="write the folder here and upload nothing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options.add_data_flags(parser)
    args = parser.parse_args(argv)
    if not (args.dry_run or args.repo_id):
        raise InputError("say where to: --repo-id USER/NAME uploads, --dry-run FOLDER writes the folder alone")
    trained = options.load_for(args)
    if trained.is_fused:
        raise InputError(f"{args.ckpt} is fused, timm loads what was trained: give the checkpoint it was made from")
    if args.dry_run and Path(args.dry_run).exists() and not Path(args.dry_run).is_dir():
        raise InputError(f"--dry-run {args.dry_run} is a file: name a new folder")
    if args.dry_run and Path(args.dry_run).exists() and any(Path(args.dry_run).iterdir()):
        raise InputError(f"--dry-run {args.dry_run} is not empty: name a new folder")
    print("\n".join(upload(args, trained)))


if __name__ == "__main__":
    sys.exit(command.run_command(run, sys.argv[1:]))
