"""Make a checkpoint ready to be published: its weights alone, fused or not, checked, and evaluated before an accuracy is named.

    python publish.py --model_name recnext_m1 --checkpoint_path pretrain/checkpoint_best.pth --epochs 300
    python publish.py --model_name recnext_m1 --checkpoint_path pretrain/checkpoint_best.pth --epochs 300 --distillation
    python publish.py --model_name recnext_m1 --checkpoint_path pretrain/checkpoint_best.pth --epochs 300 --fused --data-path ~/imagenet

Writes <name>_<distill|without_distill>_<epochs>e.pth or, fused, a TorchScript program ..._fused.pt, the same weights as safetensors, figures
as ....json, and the run's log.txt as ....txt. With --data-path the very file that was written is evaluated, before it is put in place."""

import sys
from pathlib import Path

from deployment import formats, options
from publishing.weights import publish
from run import command
from run.command import spellings
from run.config import epochs_of_run
from run.errors import InputError


def run(argv: list[str]) -> None:
    parser = options.build_parser(__doc__, model=("model_name", "model"), ckpt=("checkpoint_path", "ckpt"))
    options.add_verify(parser)
    parser.add_argument("--epochs", type=command.positive_int, metavar="N", help="length of the run, for the name (default: what the checkpoint says)")
    parser.add_argument("--distillation", action="store_true", help="trained with distillation, for the name")
    parser.add_argument("--fused", action="store_true", help="the fused network, as a TorchScript program")
    parser.add_argument(*spellings("output_dir"), metavar="FOLDER", default="pretrain", help="where to write (default: pretrain)")
    options.add_data_flags(parser)
    args = parser.parse_args(argv)
    trained = options.load_for(args)
    if args.verify:
        print(formats.verdict(Path(args.verify), trained, args.data_path))
        return
    epochs = args.epochs if args.epochs is not None else epochs_of_run(trained.args)
    if epochs is None:
        raise InputError(f"{args.ckpt} does not say how long it was trained: add --epochs N")
    print("\n".join(publish(args, trained, epochs)))


if __name__ == "__main__":
    sys.exit(command.run_command(run, sys.argv[1:]))
