"""Epochs from what training programs print: Swin's logger, which MLLA's runs were written with, and DeiT's console, which LSNet's program has.

Both print a line per so many steps, one at the end of an epoch's training and one per evaluation. An accuracy belongs to the epoch whose training
ended last: what a program evaluates before it trains, or when it is resumed in the middle of an epoch, is an earlier checkpoint.
"""

import re

STEP = re.compile(r"(?:Train: \[(?=\d+/\d+\])|Epoch: \[(?=\d+\] +\[))(\d+)")  # Swin's `Train: [3/300][0/1251]`, DeiT's `Epoch: [3]  [   0/1251]`
RATE = re.compile(r"\blr:? ([\d.e+-]+)")
LOSS = re.compile(r"\bloss:? [\d.]+ \(([\d.]+)\)")  # in brackets: the epoch's mean so far
END = re.compile(r"(?:EPOCH (\d+) training takes|Epoch: \[(\d+)\] Total time:) (?:(\d+) days?, )?(\d+):(\d\d):(\d\d)")
ACCURACY = re.compile(r"\* Acc@1 (\S+) Acc@5 (\S+)(?: loss (\S+))?")
NUM_PARAMETERS = re.compile(r"number of params:? (\d+)")


def read_epochs(text: str) -> tuple[list[dict[str, str | int]], list[str]]:
    """A record by our key names for each epoch that was trained and evaluated, and notes on evaluations that are left out.

    The loss of training is the mean up to the last step that was printed; DeiT alone prints one of the evaluation."""
    epochs: list[dict[str, str | int]] = []
    size: dict[str, str] = {}
    training: dict[str, str] = {}
    trained: dict[str, str | int] | None = None
    num_early = num_further = 0
    for line in text.splitlines():
        if STEP.search(line):
            training = {key: match[1] for key, pattern in (("train_lr", RATE), ("train_loss", LOSS)) if (match := pattern.search(line))}
            trained = None
        elif match := END.search(line):
            swin, deit, days, hours, minutes, seconds = match.groups()
            duration_s = ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)
            trained = {"epoch": swin or deit, **size, **training, "epoch_s": duration_s}
        elif match := ACCURACY.search(line):
            if trained is None:
                num_early += 1
            elif "test_acc1" in trained:
                num_further += 1
            else:
                trained |= {key: value for key, value in zip(("test_acc1", "test_acc5", "test_loss"), match.groups(), strict=True) if value}
                epochs.append(trained)
        elif match := NUM_PARAMETERS.search(line):
            size = {"n_parameters": match[1]}
    notes = [f"{_evaluations(num_early)} left out, at no end of an epoch's training: of an earlier checkpoint"] if num_early else []
    if num_further:
        notes.append(f"{_evaluations(num_further)} left out, of an epoch that had one: the first counts")
    return epochs, notes


def _evaluations(count: int) -> str:
    return f"{count} evaluation{'s' if count != 1 else ''}"
