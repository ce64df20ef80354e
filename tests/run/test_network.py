"""Networks made ready to be trained: activations that are computed again."""

import pytest
import torch

from distillation.teacher import no_teacher
from loading.keys import build_plan
from measuring import steps
from run import config
from run.errors import InputError
from tests.conftest import SHORT_RUN, TINY
from tests.test_training_goldens import CPU


def side(*flags: str) -> tuple[steps.Side, object]:
    """What main.py would train, and a batch of 8 for it."""
    net = [] if any(flag.startswith("--model=") for flag in flags) else SHORT_RUN
    cfg, _ = config.parse([*net, "--data-set=DIGITS", "--distillation-type=none", "--input-size=64", "--warmup-epochs=0", "--lr=10", *flags])
    plan = build_plan(8, repeated_aug=False, group_size=8, lanes=1, data_seed=0)
    return steps.build_side(cfg, plan, CPU, answers=no_teacher), steps.build_batch(plan, cfg.input_size)


def bytes_kept(side: steps.Side, images: torch.Tensor) -> int:
    """Of what a training forward pass leaves for the backward pass, in tensors of their own."""
    sizes = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        side.state.net(images)
    return sum(sizes.values())


@pytest.mark.parametrize(("flags", "part"), [(TINY, 0.97), (["--drop-path=0.1"], 0.6)], ids=["timm's", "ours"])
def test_steps_with_activations_computed_again_keep_less_and_learn_the_same(flags, part):
    found = []
    for checkpointing in ([], ["--grad-checkpointing"]):
        one, batch = side(*flags, *checkpointing)
        steps.visit_s(one, batch, 2)
        found.append((one.state.net.state_dict(), one.state.ema.module.state_dict(), bytes_kept(one, batch.images)))
    (weights, average, num_bytes), (weights_again, average_again, num_bytes_again) = found
    assert num_bytes_again < part * num_bytes
    for name, value in weights.items():
        assert torch.equal(value, weights_again[name]) and torch.equal(average[name], average_again[name]), name


def test_networks_that_cannot_are_refused():
    with pytest.raises(InputError, match="--grad-checkpointing: dla46_c cannot"):
        side("--model=dla46_c", "--grad-checkpointing")
