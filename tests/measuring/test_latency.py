"""Single-image latency: ONNX Runtime beside torch, on the same network and as many threads as asked for."""

import argparse
import json

import onnxruntime
import pytest
import torch

from measuring import forms, timing
from reporting import scatter
from run.errors import InputError
from tests.conftest import run_forked
from tools import latency

CPU = torch.device("cpu")


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_onnx_runtime_computes_what_the_network_does(tiny):
    images = forms.Images(1, CPU)
    call = forms.build_onnxruntime(tiny, None, images, threads=1)
    torch.testing.assert_close(call(), tiny.net(images.get(32)), rtol=1e-4, atol=1e-5)


def test_int8_is_timed_as_far_from_the_network_as_int8_is(tmp_path):
    out = tmp_path / "a.json"
    assert latency.main(["--model=test_resnet", "--img-size=32", "--rounds=1", "--forms=onnxruntime_int8", f"--out={out}"]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["form"] == "onnxruntime_int8" and result["duration_ms"]["median"] > 0


def test_threads_reach_torch_and_onnx_runtime(restored_threads, monkeypatch, tmp_path):
    threads, really_open = [], onnxruntime.InferenceSession

    def open_session(path, options=None, **kwargs):
        if options is not None:
            threads.append((options.intra_op_num_threads, options.inter_op_num_threads, torch.get_num_threads()))
        return really_open(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    out = tmp_path / "a.json"
    assert latency.main(["--model=test_resnet", "--img-size=32", "--rounds=1", "--threads=2", "--forms=onnxruntime", f"--out={out}"]) == 0
    assert threads == [(2, 1, 2)]
    content = json.loads(out.read_text())
    assert (content["machine"]["threads"], content["clock"]) == (2, "perf_counter")


def test_command_runs_from_the_root():
    result = run_forked("tools/latency.py", "--model", "test_resnet", "--img_size", "32", "--rounds", "2", "--forms", "eager")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].split("|")[1:3] == [" model       ", " input "]


def test_table_goes_into_the_scatter_plot(tmp_path, capsys):
    (tmp_path / "known.csv").write_text("model,top1\ntest_resnet,61.5\n")
    flags = ["--model=test_resnet,test_byobnet", "--img-size=32", "--rounds=2", f"--out={tmp_path / 'a.json'}"]
    assert latency.main([*flags, "--accuracy", str(tmp_path / "known.csv"), "top1"]) == 0
    (tmp_path / "a.md").write_text(capsys.readouterr().out)
    measured = {(one["model"], one["form"]): one["duration_ms"]["median"] for one in json.loads((tmp_path / "a.json").read_text())["results"]}
    assert set(measured) == {(name, form) for name in ("test_resnet", "test_byobnet") for form in ("onnxruntime", "eager")}
    for form in ("onnxruntime", "eager"):
        (point,) = scatter.read_models(tmp_path / "a.md", f"{form}_ms", "top1")
        assert (point.label, point.y) == ("test_resnet", 61.5)
        assert point.x == pytest.approx(measured["test_resnet", form], rel=1e-3)


def test_an_export_that_is_refused_leaves_a_gap(monkeypatch, tiny):
    def refuse(trained, target, fmt):
        raise InputError("net.onnx was not written. dynamo: it differs from the network by 3.0e-01")

    monkeypatch.setattr(forms, "write_verified", refuse)
    args = argparse.Namespace(amp="none", prepare_limit=60)
    setup = timing.Setup(args, CPU, {"threads": 1}, ["onnxruntime", "eager"], None, {}, lambda text: None)
    builders = {"onnxruntime": lambda *parts: forms.build_onnxruntime(*parts, threads=1), **forms.torch_builders("none")}
    gap, eager = timing.build_cases(setup, [tiny], builders, 1)
    assert "it differs from the network by 3.0e-01" in gap.remark
    assert eager.call is not None


def test_onnx_runtime_is_not_measured_beside_a_gpu(tiny):
    with pytest.raises(InputError, match="on the CPU alone"):
        forms.build_onnxruntime(tiny, None, forms.Images(1, torch.device("meta")), threads=1)
