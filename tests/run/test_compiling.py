"""Compiled networks train and are evaluated as they are; what cannot be compiled goes on without."""

import pytest
import torch
from torch import nn

import engine
import utils
from distillation.teacher import AllLogits, Teacher, no_teacher
from loading.keys import build_plan
from measuring import steps
from run import compiling, config
from tests.conftest import read_log
from utils import Rank

CPU = Rank(0, 1, 0, 1, torch.device("cpu"))
BATCH = 4
FEW = "depths=[0,0,0,1]"
FAMILIES = {  # the smallest network of each, with few blocks where it lets itself be told
    "recnext_m0": [FEW],
    "recnext_a0": [FEW],
    "recnext_t": ["depths=[1,1,1,1]"],
    "repnext_m0": [FEW],
    "lsnet_t": ["depths=[0,0,1,2]", "img_size=64"],
    "mlla_nano_recconv": ["depths=[1,1,1,1]"],
    "convnext_femto_downsample_a": [FEW],
    "repvit_m0_6": ["blocks=[[40,1,1],[40,0,1],[80,0,2],[160,1,2],[320,0,2],[320,1,1]]"],
    "rexnetv1_1_0": [],
}


class Tracing:
    """A compiler's backend that runs the graphs which torch traced, and counts how often."""

    def __init__(self):
        self.num_runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.num_runs += 1
            return graph(*args)

        return run


@pytest.fixture
def backend(monkeypatch):
    """What networks are compiled by in the test."""
    torch._dynamo.reset()
    found = Tracing()

    def build(cfg: config.Config, rank: Rank):
        return compiling.Compiler(rank, mode=cfg.compile_mode, backend=found) if cfg.compile else compiling.no_compiler

    monkeypatch.setattr(compiling, "build_compiler", build)
    return found


def train_twice(name: str, *flags: str):
    """The state after two steps with mixing, and their losses."""
    plan = build_plan(BATCH, repeated_aug=False, group_size=BATCH, lanes=1, data_seed=0)
    kwargs = ["--model-kwargs", *FAMILIES[name]] if FAMILIES[name] else []
    base = ["--data-set=DIGITS", f"--model={name}", *kwargs, f"--batch-size={BATCH}", "--mix-group-size=4", "--input-size=64", "--distillation-type=none"]
    cfg, _ = config.parse([*base, "--device=cpu", "--drop=0.1", *flags])
    side = steps.build_side(cfg, plan, CPU, answers=no_teacher)
    batch = steps.build_batch(plan, 64)
    with torch.compiler.set_stance("fail_on_recompile"):
        losses = [engine.train_step(side.parts, side.state, [batch], epoch=0, step=step).item() for step in range(2)]
    return side, losses


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_of_a_compiled_network_are_those_of_the_network_as_it_is(name, backend):
    side, losses = train_twice(name)
    compiled, compiled_losses = train_twice(name, "--compile")
    assert backend.num_runs == 3  # the preparation, and two steps; without a graph break
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    ours, theirs = utils.unwrap(compiled.state.net).state_dict(), utils.unwrap(side.state.net).state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


def test_a_compiled_run_and_its_evaluation_are_those_of_a_run_that_is_not(short_run, tmp_path, backend, capsys):
    """Odd last batches (40 images in batches of 16) included, and images that grow; each can go on where the other stopped."""
    flags = ["--model=resnet18", "--model-kwargs", "channels=[4,8,8,8]", "layers=[1,1,1,1]", "--memory-format=nchw", "--grad-accum-steps=2", "--batch-size=8"]
    flags += ["--image-size-schedule=40:0,32:0.5"]
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    short_run(*flags, f"--output_dir={plain}")
    out = short_run(*flags, f"--output_dir={compiled}", "--compile")
    assert [line.split(" in ")[0] for line in out.splitlines() if line.startswith("compiled")] == [
        "compiled the training step",
        "compiled the training step",
        "compiled the evaluation",
        "compiled the EMA's evaluation",
    ]
    assert "goes on without" not in out and "in parts" not in out
    num_steps = 2 * 96 // 3 // 16 * 3 * 2  # epochs, steps, micro-batches
    assert backend.num_runs == 4 + num_steps + 2 * 2 * (40 // 8)
    for ours, theirs in zip(read_log(compiled), read_log(plain), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5) and ours["test_acc1"] == theirs["test_acc1"]
        assert ours["test_ema_loss"] == pytest.approx(theirs["test_ema_loss"], rel=1e-5)
    assert "continuing" in short_run(*flags, f"--output_dir={compiled}", "--epochs=2", f"--resume={plain / 'checkpoint_last.pth'}", "--compile")
    line = short_run(*flags, "--eval", f"--resume={plain / 'checkpoint_last.pth'}").splitlines()[-1]
    assert short_run(*flags, "--eval", f"--resume={plain / 'checkpoint_last.pth'}", "--compile").splitlines()[-1] == line


def test_a_teacher_answers_compiled_as_it_does_without():
    torch._dynamo.reset()
    backend, plan = Tracing(), build_plan(8, repeated_aug=False, group_size=4, lanes=1, data_seed=0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 6 * 6, 5))
    teacher, batch = Teacher(net, answer=AllLogits(), plan=plan), steps.build_batch(plan, 8)
    expected = teacher(batch.images, batch, 0)
    teacher.prepare(compiling.Compiler(CPU, backend=backend), tuple(batch.images.shape))
    assert torch.equal(teacher(batch.images, batch, 0), expected) and backend.num_runs == 1 + 2  # the preparation, and two groups


class Broken(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return 2 * x


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.broken = nn.Conv2d(3, 2, 1), Broken()

    def forward(self, x):
        return self.broken(self.first(x)).mean((2, 3))


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    found = []
    for level in ("info", "warning"):
        monkeypatch.setattr(utils.log, level, lambda text, *args: found.append(text % args))
    return found


def prepare(net: nn.Module, backend) -> tuple[nn.Module, compiling.Compiler]:
    """The compiled form of `net`, prepared twice, and its compiler."""
    torch._dynamo.reset()
    compiler = compiling.Compiler(CPU, backend=backend)
    compiled = compiler(net)
    for shape in (IMAGES.shape, torch.Size((5, 3, 4, 4))):
        compiler.prepare("the evaluation", net, shape, torch.no_grad()(lambda shape=shape: compiled(torch.ones(shape))))
    return compiled, compiler


IMAGES = torch.arange(96.0).view(2, 3, 4, 4)


def test_a_graph_break_is_named_once_with_its_module(lines):
    net, backend = Head(), Tracing()
    compiled, compiler = prepare(net, backend)
    (line,) = [line for line in lines if "in parts" in line]
    assert line.startswith("the evaluation is compiled in parts: the graph breaks in broken (Broken) (")
    assert backend.num_runs > 0 and not compiler.has_failed
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), net(IMAGES))


def test_a_compiler_that_fails_leaves_one_line_and_the_network(lines):
    def fail(graph, inputs):
        raise OSError("no compiler here\nand more of it")

    net = nn.Conv2d(3, 2, 1)
    compiled, compiler = prepare(net, fail)
    assert lines == ["the evaluation cannot be compiled here (OSError: no compiler here): the run goes on without --compile"]
    assert torch.equal(compiled(IMAGES), net(IMAGES)) and compiler.has_failed


@pytest.mark.slow
def test_torchs_own_compiler_trains_as_the_network_does(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.GELU())
    compiler, images = compiling.Compiler(CPU), torch.randn(4, 3, 4, 4)
    compiled = compiler(net)
    gradients = {}

    def step(one: nn.Module) -> tuple:
        return torch.autograd.grad(one(images).logsumexp(1).mean(), list(net.parameters()))

    compiler.prepare("the training step", net, images.shape, lambda: gradients.update(ours=step(compiled)))
    assert not compiler.has_failed and (True, images.shape) in compiled.prepared
    for ours, theirs in zip(gradients["ours"], step(net), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
