"""Store a teacher's labels without training a student.

    python tools/make_teacher_labels.py --config recipes/recnext_300e.yaml --data-path ~/imagenet --teacher-labels labels --epochs 0:300
    torchrun --nproc_per_node=8 tools/make_teacher_labels.py ...        the same, each process with its share of every epoch's mix groups

Takes main.py's settings, of which those of the student do not matter; --epochs A:B are the epochs from A on, before B. With --image-size-schedule
the run's own number of epochs counts: the recipe's, or an --epochs N before. Writes what a run with
--teacher-labels-mode auto would, and goes on where it was stopped: what is stored is left alone. Several of these may fill one folder.
Ends with code 0 when all is stored, 85 when told to stop before: start it again."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import utils
from distillation.generate import make
from run import config, process
from run.command import run_process
from run.errors import InputError


def split_epochs(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without the last --epochs, and its value. An --epochs before is main.py's: the length of the run, which sizes may depend on."""
    rest, values = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, separator, given = argument.partition("=")
        if name == "--epochs":
            values.append(given if separator else next(arguments, ""))
        else:
            rest.append(argument)
    return rest + [f"--epochs={value}" for value in values[-2:-1]], values[-1] if values else None


def parse(argv: list[str]) -> tuple[config.Config, range, list[str]]:
    """Settings under which the labels are made, the epochs to make, and notes for the user. InputError where they make no sense."""
    rest, text = split_epochs(argv)
    cfg, notes = config.parse([*rest, "--teacher-labels-mode", "auto"])
    first, separator, stop = (f"0:{cfg.num_epochs}" if text is None else text).partition(":")
    if not (separator and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise InputError(f"--epochs '{text}': write the first epoch, a colon, and the one to stop before, such as 0:300")
    if not cfg.teacher_labels:
        raise InputError("--teacher-labels is missing: name the folder to store labels in")
    if cfg.distillation == "none":
        raise InputError("this recipe does not distil: add --distillation-type hard, or soft with --teacher-topk")
    return cfg, range(int(first), int(stop)), notes


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    cfg, epochs, notes = parse(argv)
    rank = process.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    exit_code = make(cfg, epochs, rank)
    process.stop_process()
    return exit_code


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
