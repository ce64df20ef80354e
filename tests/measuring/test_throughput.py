"""Throughput: one interleaved table, the largest batch that fits, gaps in place of failures."""

import argparse
import json

import pytest
import torch

import speed_gpu
from deployment.weights import load_trained
from measuring import forms, throughput, timing
from tests.conftest import run_forked

FLAGS = ["--img-size=32", "--rounds=2", "--device=cpu"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_command_runs_from_the_root():
    result = run_forked("speed_gpu.py", "--model", "recnext_m0", "--forms", "eager", "--batch_size", "2", "--img_size", "32", "--rounds", "2")
    assert result.returncode == 0, result.stderr
    header, _, row = map(cells, result.stdout.splitlines())
    assert header == ["model", "input", "batch", "eager_images_per_s"]
    assert row[:3] == ["recnext_m0", "32", "2"]


def test_several_models_share_one_table_and_a_json_file(tmp_path, capsys):
    out = tmp_path / "speed.json"
    assert speed_gpu.main(["--model=test_resnet,test_byobnet", "--forms=eager,channels_last", "--batch-size=2", f"--out={out}", *FLAGS]) == 0
    printed = capsys.readouterr()
    assert [cells(line)[0] for line in printed.out.splitlines()[2:]] == ["test_resnet", "test_byobnet"]
    content = json.loads(out.read_text())
    assert [(one["model"], one["form"]) for one in content["results"]] == [
        (name, form) for name in ("test_resnet", "test_byobnet") for form in ("eager", "channels_last")
    ]
    for one in content["results"]:
        rounds = one["rounds_ms"]
        assert len(rounds) == 2
        assert one["duration_ms"] == {"median": pytest.approx(sum(rounds) / 2), "low": min(rounds), "high": max(rounds)}
        assert one["images_per_s"]["high"] == pytest.approx(2e3 / min(rounds))
        assert (one["weights"], one["input_size"]) == ("random weights", 32)
    assert content["settings"]["batch_size"] == 2
    assert {"machine", "versions", "date", "cpu_share", "clock"} <= set(content)


def test_a_checkpoint_s_weights_are_measured_and_named(tmp_path, capsys, tiny):
    torch.save({"model": tiny.net.state_dict(), "input_size": 48}, tmp_path / "a.pth")
    flags = ["--forms=eager", "--rounds=1", "--device=cpu", "--batch-size=1"]
    assert speed_gpu.main(["--model=test_resnet,test_resnet", f"--resume={tmp_path / 'a.pth'}", *flags]) == 1
    assert "--resume names 1 checkpoints, --model 2 networks" in capsys.readouterr().err
    assert speed_gpu.main(["--model=test_resnet", f"--resume={tmp_path / 'a.pth'}", f"--out={tmp_path / 'a.json'}", *flags]) == 0
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert (result["weights"], result["input_size"]) == ("raw weights", 48)


def test_a_compiler_that_fails_leaves_a_gap(monkeypatch, tmp_path, capsys):
    def fail(net, dynamic):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    assert speed_gpu.main(["--model=test_resnet", "--forms=compiled,eager", "--batch-size=1", f"--out={tmp_path / 'a.json'}", *FLAGS]) == 0
    printed = capsys.readouterr()
    row = cells(printed.out.splitlines()[2])
    assert row[3] == "-"
    assert row[4] != "-"
    assert "test_resnet compiled is left out: RuntimeError: no C++ compiler found" in printed.err
    gap, eager = json.loads((tmp_path / "a.json").read_text())["results"]
    assert gap["remark"] == "RuntimeError: no C++ compiler found"
    assert "duration_ms" not in gap
    assert eager["remark"] is None


def test_nothing_left_to_measure_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: 1 / 0)
    assert speed_gpu.main(["--model=test_resnet", "--forms=compiled", "--batch-size=1", *FLAGS]) == 1
    assert capsys.readouterr().err.endswith("error: nothing is left to measure: the lines above say why\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forms=eager,fast"], "--forms fast is unknown: choose of eager, channels_last, compiled"),
        (["--model=test_resnett"], "did you mean"),
        (["--out=none/a.json"], "there is no folder none that can be written"),
        (["--accuracy", "none.md", "top-1"], "No such file"),
        (["--device=gpu"], "is no device"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(flags, message, capsys):
    assert speed_gpu.main(["--model=test_resnet", *FLAGS, *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# --- the largest batch -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "cap", "expected"), [(100, 64, 64), (64, 256, 64), (63, 256, 32), (1, 256, 1), (0, 256, 1), (100, 96, 64)])
def test_largest_batch_is_a_power_of_two_that_fits(room, cap, expected):
    assert throughput.largest_batch(lambda batch_size: batch_size <= room, cap) == expected


def setup_for(batch_size, report) -> timing.Setup:
    args = argparse.Namespace(batch_size=batch_size, amp="none", prepare_limit=60)
    return timing.Setup(args, torch.device("cpu"), {"threads": 1}, ["eager", "channels_last"], None, {}, report)


def test_memory_or_the_cap_bounds_the_batch_on_a_processor(tiny, monkeypatch):
    said = []
    assert throughput.choose_batch(setup_for("auto", said.append), [tiny]) == throughput.CPU_CAP
    room = int(throughput.image_bytes(tiny) * 20 / throughput.MEMORY_SHARE)
    monkeypatch.setattr(throughput, "free_memory", lambda: room)
    assert throughput.choose_batch(setup_for("auto", said.append), [tiny]) == 16
    assert said == [
        "batch size 64, the largest power of two within the cap of 64 on cpu",
        "batch size 16, the largest power of two within the memory for test_resnet",
    ]


def test_an_image_s_memory_is_counted_in_layers(tiny):
    conv = tiny.net.conv1[0]
    outputs = conv.out_channels * 16 * 16
    assert throughput.image_bytes(tiny) >= throughput.LAYERS_HELD * 4 * (3 * 32 * 32 + outputs)
    assert throughput.image_bytes(load_trained("test_resnet", None, img_size=64, num_classes=7)) == 4 * throughput.image_bytes(tiny)


def test_free_memory_is_within_the_machine_s():
    free = throughput.free_memory()
    assert free is None or 2**20 < free < 2**50


@pytest.fixture
def small_device(monkeypatch):
    """Torch as if the device ran out of memory in the given forms above a batch size."""

    def limit(largest: int, *limited: str) -> None:
        really_build = forms.build_form

        def build(trained, net, images, *, form, amp):
            if form in limited and images.batch_size > largest:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return really_build(trained, net, images, form=form, amp=amp)

        monkeypatch.setattr(forms, "build_form", build)

    return limit


def test_an_accelerator_s_batch_is_found_by_running_out_of_memory(tiny, small_device):
    small_device(12, "channels_last")
    setup = setup_for("auto", lambda text: None)
    assert throughput.largest_batch(lambda batch_size: throughput.fits_accelerator(setup, tiny, batch_size), 64) == 8


def test_auto_goes_down_until_every_form_fits(tiny, small_device):
    small_device(10, "channels_last")
    said = []
    cases = throughput.build_cases(setup_for("auto", said.append), [tiny])
    assert [(case.form, case.batch_size, case.remark) for case in cases] == [("eager", 8, None), ("channels_last", 8, None)]
    assert "batch size 8, for a larger one does not fit in every form" in said


def test_a_given_batch_that_does_not_fit_leaves_a_gap(tiny, small_device):
    small_device(10, "channels_last")
    cases = throughput.build_cases(setup_for(16, lambda text: None), [tiny])
    assert [(case.form, case.call is not None) for case in cases] == [("eager", True), ("channels_last", False)]


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert speed_gpu.main(["--model=recnext_m0", "--forms=eager,channels_last", "--device=cuda", "--rounds=2", "--batch-size=32", "--amp=bf16"]) == 0
    assert "-" not in cells(capsys.readouterr().out.splitlines()[2])
