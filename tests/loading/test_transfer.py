"""What is done to batches on their way to a GPU changes no number."""

import torch

import engine
from distillation.teacher import no_teacher
from loading import transfer
from loading.keys import build_plan
from measuring import steps
from run import config
from utils import Rank

CPU = Rank(0, 1, 0, 1, torch.device("cpu"))


def test_a_step_on_a_batch_that_was_mixed_ahead_is_that_on_the_batch():
    plan = build_plan(4, repeated_aug=False, group_size=4, lanes=1, data_seed=0)
    tiny = ["--model=resnet18", "--model-kwargs", "channels=[4,8,8,8]", "layers=[1,1,1,1]", "--memory-format=nchw", "--batch-size=4", "--mix-group-size=4"]
    cfg, _ = config.parse(["--data-set=DIGITS", *tiny, "--input-size=32", "--distillation-type=none", "--device=cpu"])
    losses = []
    for is_ahead in (False, True):
        batch = steps.build_batch(plan, 32)
        side = steps.build_side(cfg, plan, CPU, answers=no_teacher)
        one = batch._replace(mixed=engine.mixed(side.parts, batch, 0), images=torch.empty(0)) if is_ahead else batch
        losses.append(engine.train_step(side.parts, side.state, [one], epoch=0, step=0).item())
    assert losses[0] == losses[1]
    assert engine.mix_ahead(side.parts, 0, batch) is batch  # a CPU has nothing to do it beside


def test_tensors_of_a_batch_are_found_in_its_tuples():
    one, two, three = (torch.tensor(i) for i in range(3))
    assert list(transfer._tensors((one, 5, (two, (three,)), [one], None))) == [one, two, three]


def test_what_is_asked_beside_is_answered_once():
    calls = []
    join = transfer.beside(CPU.device, lambda: calls.append(0) or len(calls))
    assert (join(), join(), len(calls)) == (1, 1, 1)
    assert torch.equal(transfer.sent(torch.arange(3), CPU.device), torch.arange(3))
