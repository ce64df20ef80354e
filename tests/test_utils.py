import pytest
import torch

import model
import utils
from run import hardware

CPU = torch.device("cpu")


def test_precision_and_layout_that_auto_means_on_a_cpu():
    assert hardware.pick_amp("auto", CPU) is None
    assert hardware.pick_memory_format("auto", CPU, None) is torch.channels_last
    assert hardware.pick_memory_format("auto", CPU, torch.bfloat16) is torch.contiguous_format
    assert hardware.pick_memory_format("channels_last", CPU, torch.bfloat16) is torch.channels_last


def test_bfloat16_gradients_are_finite_and_repeatable():
    """In channels-last they are not: small feature maps make oneDNN read uninitialised memory."""
    torch.manual_seed(0)
    memory_format = hardware.pick_memory_format("auto", CPU, torch.bfloat16)
    net = model.create_model("recnext_m0", num_classes=4).to(memory_format=memory_format)
    images = torch.randn(8, 3, 32, 32).to(memory_format=memory_format)
    sums = set()
    for _ in range(20):
        del_me = [torch.full((1000, 1000), float("nan")) for _ in range(4)]
        del del_me  # leaves NaN in the memory that is handed out next
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(images), torch.arange(8) % 4)
        loss.backward()
        sums.add(sum(p.grad.abs().sum().item() for p in net.parameters()))
    assert len(sums) == 1 and all(torch.isfinite(torch.tensor(value)) for value in sums)


@pytest.mark.parametrize(("name", "word"), [("tpu9", "no device"), ("cuda:77", "no GPU")])
def test_devices_that_are_not_there_are_refused(name, word):
    if name.startswith("cuda") and torch.cuda.is_available():
        word = "cuda"
    with pytest.raises(ValueError, match=word):
        hardware.pick_device(name)


def test_unwrapping_gives_the_inner_network():
    inner = torch.nn.Linear(2, 2)
    assert utils.unwrap(inner) is inner
    assert utils.unwrap(torch.compile(inner)) is inner


def test_processes_agree_now_and_then_and_each_answer_comes_within_seconds(monkeypatch):
    """Steps of 0.1 s here and 0.2 s in the slowest process; another process raises its flag at step 13."""
    clock, asked = iter(range(1000)), []

    def max_over_processes(values, rank):
        asked.append(step)
        return [float(step >= 13), 0.2]

    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(clock) * 0.1)
    monkeypatch.setattr(utils, "max_over_processes", max_over_processes)
    agreement = utils.Agreement(utils.Rank(0, 2, 0, 2, CPU))
    answers = []
    for step in range(1, 30):
        answers += [step] if agreement.any_process([False]) == [True] else []
    assert asked == [1, 11, 21] and answers == [21]
    alone = utils.Agreement(utils.Rank(0, 1, 0, 1, CPU))
    assert alone.any_process([True, False]) == [True, False]
