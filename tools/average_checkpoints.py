"""Average the weights of checkpoints, try the average and its members on validation images, and write it as a checkpoint.

    python tools/average_checkpoints.py --input checkpoints/m1 --last 3 --output checkpoints/m1_last3.pth
    python tools/average_checkpoints.py --input checkpoints/m1 --best 3 --use-ema --bn recalibrate --output checkpoints/m1_best3.pth
    python tools/average_checkpoints.py --input a.pth b.pth c.pth --soup greedy --allow-config-change --output checkpoints/soup.pth

Of a run's folder every epoch takes part that there is a checkpoint of (--checkpoint-hist of main.py says how many are kept), or the --last or --best
of them, by the accuracy that the run measured. --soup uniform is the mean of all. --soup greedy begins with the member that is best on the images that
choose, and adds the others in the order of their accuracies there, each where it does not make the mean worse. The images that choose are a part of
each class's validation images (--held-out), drawn by --data-seed; the accuracies to quote are those on the others.

All else is as the first checkpoint's run had it; other flags are main.py's settings and take its settings' place, such as --data-path and --device.
Checkpoints of other architectures, classes or images are refused, those of other recipes unless --allow-config-change is given."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from refining import members, recipe, soups, writing
from refining.members import Member
from refining.trial import State, Trial
from run import process
from run.command import positive_int, run_process, spellings
from run.errors import InputError
from utils import log


def part(text: str) -> float:
    """For argparse: a number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no part: give a number above 0, at most 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="average_checkpoints.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    recipe.add_flags(parser, several=True)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--last", type=positive_int, metavar="N", help="of the checkpoints, those of the last N epochs")
    chosen.add_argument("--best", type=positive_int, metavar="N", help="of the checkpoints, the N of the highest top-1 accuracy in their runs")
    parser.add_argument("--soup", choices=("uniform", "greedy"), default="uniform", help="what is written [%(default)s]")
    parser.add_argument("--bn", choices=("average", "recalibrate"), default="average", help="where BatchNorm's statistics come from [%(default)s]")
    images = "with --bn recalibrate: training images to take them from [%(default)s]"
    parser.add_argument(*spellings("bn_images"), type=positive_int, default=10_000, metavar="N", help=images)
    parser.add_argument(*spellings("held_out"), type=part, default=0.5, metavar="X", help="part of the validation images that choose [%(default)s]")
    parser.add_argument("--unevaluated", action="store_true", help="write the uniform average without a look at images")
    return parser


def refuse_contradictions(args: argparse.Namespace) -> None:
    if args.unevaluated and (args.soup == "greedy" or args.bn == "recalibrate"):
        raise InputError("--unevaluated looks at no images, which --soup greedy and --bn recalibrate need: drop one of them")


def figures(trial: Trial, state: State) -> dict:
    """Accuracies on the images that choose and on those that judge."""
    return {"held_out_acc1": trial.score(state), "test_acc1": trial.judge(state)}


def say(found: dict, name: str) -> None:
    acc1s = "  ".join("     -" if found[key] is None else f"{found[key]:6.2f}" for key in ("held_out_acc1", "test_acc1"))
    log.info("%s  %s", acc1s, name)


def tried(args: argparse.Namespace, chosen: list[Member], trial: Trial) -> tuple[State, dict]:
    """The soup that is asked for, and what is to be noted of it; prints a line per member and soup."""
    log.info("top-1, %%, on %d images that choose and %d that judge", trial.num_choosing, trial.num_judging)
    found = {}
    for member in chosen:
        found[member.source] = figures(trial, member.state())
        say(found[member.source], member.name)

    def finish(state: State) -> State:
        return trial.recalibrated(state, args.bn_images) if args.bn == "recalibrate" else state

    kept, state = chosen, finish(soups.uniform(member.state() for member in chosen))
    result = figures(trial, state)
    say(result, f"uniform soup of {len(chosen)}")
    if args.soup == "greedy":
        ranked = sorted(chosen, key=lambda member: -found[member.source]["held_out_acc1"])
        kept, state = soups.greedy(ranked, Member.state, finish, trial.score)
        result = figures(trial, state)
        say(result, f"greedy soup of {len(kept)}: {', '.join(member.name for member in kept)}")
    noted = {"members": [noted_of(member) | found[member.source] for member in kept], "num_held_out": trial.num_choosing, "num_test": trial.num_judging}
    left_out = [member.source for member in chosen if member not in kept]
    # A greedy soup of one is that checkpoint, with its own statistics.
    own = {"bn": args.bn, **({"bn_images": args.bn_images} if args.bn == "recalibrate" else {})} if len(kept) > 1 else {"bn": "own"}
    return state, {**noted, **own, **result, "left_out": left_out}


def noted_of(member: Member) -> dict:
    """What is to be known of a member."""
    return {"file": member.source, "epoch": member.epoch, "acc1": member.acc1, **writing.origin(member.saved)}


def main(argv: list[str]) -> int:
    """Exit status, 0. InputError where there is nothing to average, or no room for it."""
    args, flags, rank = recipe.start(build_parser(), argv)
    refuse_contradictions(args)
    allows_other_recipes = flags.pop("allow_config_change", False)
    out = writing.require_free(args.output)
    chosen = members.find(args.input, use_ema=args.use_ema, last=args.last, best=args.best)
    members.require_alike(chosen, allows_other_recipes=allows_other_recipes)
    first = chosen[0]
    if args.unevaluated:
        state, noted = soups.uniform(member.state() for member in chosen), {"members": [noted_of(member) for member in chosen], "bn": args.bn}
    else:
        cfg = recipe.recipe_of(first.saved, first.source, flags, is_eval=args.bn == "average")
        num_trials = len(chosen) + 1 + (len(chosen) + 1 if args.soup == "greedy" else 0)
        state, noted = tried(args, chosen, Trial(cfg, first.state(), rank, share=args.held_out, num_trials=num_trials))
    made_from = {"what": f"{args.soup} soup of {len(noted['members'])} checkpoint{'s' if len(noted['members']) > 1 else ''}", "use_ema": args.use_ema, **noted}
    writing.write(out, state, first.saved, made_from=made_from)
    log.info("%s: the %s", out, made_from["what"])
    process.stop_process()
    return 0


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
