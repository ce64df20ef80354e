"""Rounds, spreads, gaps and tables of the timing commands, with clocks and networks whose answers are known."""

import json
import signal
import subprocess

import pytest
import torch
from torch import nn

from deployment.weights import load_trained
from measuring import forms, timing
from measuring.timing import Case, Clock
from reporting import scatter
from run.errors import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tiny():
    return load_trained("test_resnet", None, img_size=32, num_classes=7)


class FakeTime:
    """A clock that only calls move: each by the next of its durations, the last for ever. Notes whose turn it was."""

    def __init__(self):
        self.now_s = 0.0
        self.turns = []

    def case(self, tiny, form: str, *durations_s: float) -> Case:
        durations = list(durations_s)

        def call():
            self.turns.append(form)
            self.now_s += durations.pop(0) if len(durations) > 1 else durations[0]

        return Case(tiny, form, batch_size=4, call=call)

    def clock(self, *, is_queued: bool = False) -> Clock:
        return Clock(lambda: self.now_s, lambda: None, is_queued)


def quiet(text: str) -> None:
    pass


# --- measuring -------------------------------------------------------------------------------------------------------------------------


def test_one_call_is_timed_by_the_median_and_the_first_is_not_counted(tiny):
    fake = FakeTime()
    case = fake.case(tiny, "a", 100.0, 1.0, 9.0, 2.0)
    assert timing.time_calls(case.call, 3, fake.clock()) == 2.0
    assert len(fake.turns) == 4


def test_queued_calls_are_timed_together(tiny):
    fake = FakeTime()
    case = fake.case(tiny, "a", 100.0, 1.0, 9.0, 2.0)
    assert timing.time_calls(case.call, 3, fake.clock(is_queued=True)) == 4.0


def test_the_device_is_waited_for_before_the_clock_is_read(tiny):
    pending, spent = [], [0.0]

    def sync():
        spent[0] += sum(pending)
        pending.clear()

    def call():
        pending.append(3.0)

    for is_queued in (False, True):
        assert timing.time_calls(call, 4, Clock(lambda: spent[0], sync, is_queued)) == 3.0


def test_rounds_visit_every_case_in_turns_forwards_and_backwards(tiny):
    fake = FakeTime()
    cases = [fake.case(tiny, form, 1.0) for form in "abc"]
    cases.insert(1, Case(tiny, "gap", 4, remark="failed"))
    timing.measure(cases, fake.clock(), num_rounds=4, min_calls=1, report=quiet)
    visits = [form for form, previous in zip(fake.turns, ["", *fake.turns], strict=False) if form != previous]
    assert "".join(visits) == "abc" + "abc" + "ba" + "bc" + "ba"  # calibration, then a b c | c b a | a b c | c b a
    assert [len(case.rounds_s) for case in cases] == [4, 0, 4, 4]


def test_drift_between_rounds_shows_in_the_spread(tiny):
    fake = FakeTime()
    slow, steady = fake.case(tiny, "slow", *[1.0] * 6, *[2.0] * 6, 3.0), fake.case(tiny, "steady", 1.0)
    timing.measure([slow, steady], fake.clock(), num_rounds=5, min_calls=3, report=quiet)
    assert slow.rounds_s == [1.0, 2.0, 3.0, 3.0, 3.0]  # four calls a round, of which one is not counted; two for calibration
    assert timing.spread(slow.rounds_s) == timing.Spread(3.0, 1.0, 3.0)
    assert timing.spread(steady.rounds_s) == timing.Spread(1.0, 1.0, 1.0)


def test_short_calls_fill_their_slice(tiny):
    fake = FakeTime()
    case = fake.case(tiny, "a", timing.SLICE_S / 50)
    timing.measure([case], fake.clock(), num_rounds=1, min_calls=5, report=quiet)
    assert len(fake.turns) == 2 + 1 + 50


def test_one_thread_on_a_processor_is_timed_by_its_own_time(tiny):
    setup = timing.Setup(None, torch.device("cpu"), {"threads": 1}, [], None, {}, quiet)
    assert timing.pick_clock(setup, is_latency=True).now is timing.time.thread_time
    many = timing.Setup(None, torch.device("cpu"), {"threads": 2}, [], None, {}, quiet)
    assert timing.pick_clock(many, is_latency=True).now is timing.time.perf_counter
    assert not timing.pick_clock(many, is_latency=False).is_queued


# --- forms -----------------------------------------------------------------------------------------------------------------------------


def test_forms_compute_the_same_and_leave_the_network_as_it_is(tiny):
    net, images = timing.fused(tiny), forms.Images(2, torch.device("cpu"))
    reference = tiny.net(images.get(32))
    for form in ("eager", "channels_last"):
        call = forms.build_form(tiny, net, images, form=form, amp="none")
        torch.testing.assert_close(call(), reference, rtol=1e-4, atol=1e-5)
        is_channels_last = call.args[0].conv1[0].weight.is_contiguous(memory_format=torch.channels_last) and call.args[1].stride(1) == 1
        assert is_channels_last == (form == "channels_last")
    assert not net.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_amp_reaches_the_network(tiny):
    images = forms.Images(1, torch.device("cpu"))
    assert forms.build_form(tiny, tiny.net, images, form="eager", amp="none")().dtype == torch.float32
    assert forms.build_form(tiny, tiny.net, images, form="eager", amp="bf16")().dtype == torch.bfloat16


def test_models_share_images_of_a_size_and_layout():
    images = forms.Images(2, torch.device("cpu"))
    assert images.get(32) is images.get(32)
    assert torch.equal(images.get(32), images.get(32, torch.channels_last))
    assert torch.equal(images.get(32), forms.Images(2, torch.device("cpu")).get(32))
    assert images.get(48).shape == (2, 3, 48, 48)


def test_compiling_computes_the_same(tiny):
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), forms.Images(2, torch.device("cpu"))
    case = Case(tiny, "compiled", 2)
    reference = forms.forward(net, images.get(32), None)
    timing.prepare(case, lambda: forms.build_form(tiny, net, images, form="compiled", amp="none"), reference=reference, tolerance=1e-5, limit_s=300)
    assert case.remark is None
    assert isinstance(case.call.args[0], torch._dynamo.eval_frame.OptimizedModule)
    torch.testing.assert_close(case.call(), reference)


class Plain(nn.Module):
    """A network whose code many instances share."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_every_network_of_a_family_is_compiled(tiny, monkeypatch):
    """More of them than dynamo allows one function by itself; it would run the others as they are without a word."""
    compiled, really_compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: really_compile(net, dynamic=dynamic, backend=backend))
    images, build = forms.Images(1, torch.device("cpu")), forms.torch_builders("none")["compiled"]
    for width in range(1, 13):
        net, case = Plain(width), Case(tiny, "compiled", 1)
        reference = forms.forward(net, images.get(32), None)
        timing.prepare(case, lambda net=net: build(tiny, net, images), reference=reference, tolerance=1e-5, limit_s=60)
        assert case.remark is None
    assert len(compiled) == 12


# --- gaps ------------------------------------------------------------------------------------------------------------------------------

REFERENCE = torch.tensor([[1.0, -4.0]])


def prepare(tiny, build, limit_s: float = 60) -> Case:
    case = Case(tiny, "eager", 1)
    timing.prepare(case, build, reference=REFERENCE, tolerance=1e-2, limit_s=limit_s)
    return case


def test_what_fails_or_runs_out_of_memory_is_a_gap_that_says_why(tiny):
    def fail():
        raise ValueError("no compiler here\nand more")

    def fill():
        raise torch.OutOfMemoryError("too large")

    assert (prepare(tiny, fail).call, prepare(tiny, fail).remark) == (None, "ValueError: no compiler here")
    assert prepare(tiny, fill).is_out_of_memory
    assert not prepare(tiny, fail).is_out_of_memory


def test_what_takes_too_long_is_a_gap_even_where_exceptions_are_caught(tiny):
    def linger():
        while True:
            try:
                while True:
                    pass
            except Exception:  # noqa: S112  as compilers do
                continue

    case = prepare(tiny, linger, limit_s=0.05)
    assert (case.call, case.remark) == (None, "not ready after 0.05 s (--prepare-limit)")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("logits", "is_same"), [([1.0, -4.0], True), ([1.03, -4.0], True), ([1.05, -4.0], False), ([float("nan"), -4.0], False)])
def test_what_computes_something_else_is_a_gap(tiny, logits, is_same):
    case = prepare(tiny, lambda: lambda: torch.tensor([logits]))
    assert (case.call is not None) == is_same
    assert is_same or "differ from eager's" in case.remark


def test_the_alarm_is_off_once_a_form_is_ready(tiny):
    assert prepare(tiny, lambda: lambda: REFERENCE).remark is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# --- what comes out --------------------------------------------------------------------------------------------------------------------


def test_the_scatter_plot_reads_the_table(tiny, tmp_path):
    other = load_trained("test_byobnet", None, img_size=64, num_classes=7)
    cases = [Case(one, form, 4, rounds_s=rounds) for one in (tiny, other) for form, rounds in (("eager", [0.25, 0.5, 0.375]), ("compiled", []))]
    cases[3].rounds_s = [12.3456, 12.3456]
    text = timing.table(cases, unit="ms", column="top-1", accuracies={"test_resnet": 71.25})
    (tmp_path / "t.md").write_text(text)
    assert "| 375.0 (250.0 to 500.0) |" in text
    assert [(model.label, model.x, model.y) for model in scatter.read_models(tmp_path / "t.md", "eager_ms", "top-1")] == [("test_resnet", 375.0, 71.25)]
    assert [(model.x, model.y) for model in scatter.read_models(tmp_path / "t.md", "compiled_ms", "input")] == [(12346.0, 64.0)]
    rates = timing.table(cases[:1], unit="images_per_s")
    assert "| 10.67 (8.000 to 16.00) |" in rates
    assert len({len(line) for line in text.splitlines()}) == 1


def test_accuracies_come_from_a_published_table():
    known = timing.read_accuracies(str(ROOT / "docs" / "published.md"), "top-1 distilled")
    assert known["recnext_m1"] == 79.2
    assert known["lsnet_t"] == 76.1
    with pytest.raises(InputError, match="no table with columns"):
        timing.read_accuracies(str(ROOT / "docs" / "published.md"), "top-7")


def test_machine_and_versions_are_recorded():
    machine, versions = timing.describe_machine(torch.device("cpu")), timing.versions()
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert machine["gpu"] is None
    assert versions["torch"] == torch.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (versions["commit"] or "").removesuffix("-dirty") == head.stdout.strip()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    timing.write_json(path, {"a": [1.5, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        timing.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(InputError, match="cannot be written"):
        timing.write_json(tmp_path / "none" / "a.json", {})
