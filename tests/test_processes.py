"""Several processes under the real launchers, with gloo on one machine."""

import os
import re
import subprocess
import sys

import pytest
import timm
import torch

from tests.conftest import ROOT, SHORT_RUN, TINY_RUN, read_log, run_forked, run_processes
from tests.programs.processes import free_port

pytestmark = pytest.mark.slow
TORCHRUN = ["-m", "torch.distributed.run", "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]


def test_split_over_processes_or_accumulated_a_step_is_the_same(digits_folder, tmp_path):
    """Same samples, pixels, mixes and teacher labels; loss and gradients within rounding, with batch statistics frozen."""
    flags = [*SHORT_RUN, "--batch-size=8", "--hflip=0.5", "--distillation-type=hard"]
    ways = [(dtype, num_processes) for dtype in ("float64", "float32") for num_processes in (1, 2, 4)]
    argvs = [[str(tmp_path / f"{way}.pt"), way[0], *flags, f"--grad-accum-steps={4 // way[1]}", f"--data-path={digits_folder}"] for way in ways]
    done = run_processes(*((num_processes, "tests.programs.gradients", argv) for (_, num_processes), argv in zip(ways, argvs, strict=True)))
    assert [set(codes) for codes, *_ in done] == [{0}] * len(ways), done
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        found = {num_processes: torch.load(tmp_path / f"{(dtype, num_processes)}.pt", weights_only=True) for num_processes in (1, 2, 4)}
        for num_processes in (2, 4):
            assert found[num_processes]["seen"] == found[1]["seen"]
            assert found[num_processes]["loss"] == pytest.approx(found[1]["loss"], rel=tolerance)
            for step, expected in zip(found[num_processes]["grads"], found[1]["grads"], strict=True):
                scale = max(grad.abs().max() for grad in expected)
                assert max((a - b).abs().max() for a, b in zip(step, expected, strict=True)) < tolerance * scale
        assert len(found[1]["seen"]) == 64


def test_with_shared_statistics_three_processes_train_as_one(digits_folder, tmp_path):
    """A run of three processes and one of a process with their batches: weights and statistics within rounding, frozen ones to the last bit."""
    net = timm.create_model("resnet18", num_classes=4, channels=[4, 8, 8, 8], layers=[1, 1, 1, 1])
    for name, buffer in net.named_buffers():
        buffer.copy_(buffer if name.endswith("tracked") else torch.linspace(0.3, 1.1, len(buffer)))
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth")
    flags = [*TINY_RUN, f"--data-path={digits_folder}", f"--finetune={tmp_path / 'w.pth'}", "--sync-bn", "--freeze", "layer1", "--layer-decay=0.8"]
    flags += ["--bce-loss", "--bce-sum", "--opt=sgd", "--lr=1", "--warmup-epochs=0", "--epochs=1", "--sched-on-updates", "--grad-checkpointing"]
    flags += ["--clip-grad=none", "--mix-group-size=8"]
    sizes = ((1, 24), (3, 8))
    argvs = [[*flags, f"--batch-size={size}", f"--output_dir={tmp_path / str(number)}"] for number, size in sizes]
    done = run_processes(*((number, "main", argv) for (number, _), argv in zip(sizes, argvs, strict=True)))
    assert [set(codes) for codes, *_ in done] == [{0}] * 2, done
    one, three = (torch.load(tmp_path / str(number) / "checkpoint_last.pth", weights_only=True)["model"] for number, _ in sizes)
    for name, value in net.state_dict().items():
        if name.startswith("layer1."):
            assert torch.equal(one[name], value) and torch.equal(three[name], value), name
        elif name.endswith((".running_mean", ".running_var", "fc.weight")):
            assert (one[name] - value).abs().max() > 1e-3, name
            torch.testing.assert_close(three[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def two_process_run(digits_folder, tmp_path_factory):
    """By dist_train.sh, which passes its arguments on."""
    folder = tmp_path_factory.mktemp("two") / "run"
    flags = [*SHORT_RUN, "--batch-size=8", "--distillation-type=none", f"--data-path={digits_folder}", f"--output_dir={folder}"]
    env = {**os.environ, "NPROC_PER_NODE": "2", "PYTHON": sys.executable, "MASTER_PORT": str(free_port())}
    done = subprocess.run(["sh", "dist_train.sh", *flags], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_train_and_one_writes(two_process_run):
    folder, done = two_process_run
    assert [record["epoch"] for record in read_log(folder)] == [0, 1]
    assert "batch 8 x 2 processes x 1 accumulation = global batch 16" in done.stdout
    assert done.stdout.count("epoch 0  test loss") == 1
    assert "Warning" not in done.stderr
    saved = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    assert not any(name.startswith("module.") for name in saved["model"])


def test_evaluation_prints_the_same_line_on_any_number_of_processes(two_process_run, digits_folder, tmp_path):
    """Of 40 images, and of fewer than there are processes."""
    for i in range(4):
        (tmp_path / "val" / str(i)).mkdir(parents=True)
        source = next((digits_folder / "val" / str(i // 3 * 3)).iterdir())
        (tmp_path / "val" / str(i) / "x.jpg").write_bytes(source.read_bytes())
    flags = [*SHORT_RUN, "--eval", f"--resume={two_process_run[0] / 'checkpoint_last.pth'}"]
    ways = [(digits_folder, num_processes) for num_processes in (1, 2, 3, 5)] + [(tmp_path, 1), (tmp_path, 5)]
    done = run_processes(*((num_processes, "main", [*flags, f"--data-path={folder}"]) for folder, num_processes in ways))
    lines = [output.splitlines()[-1] for _, _, output in done]
    assert lines == [lines[0]] * 4 + [lines[-1]] * 2 and "on the 40 test images" in lines[0] and "on the 4 test images" in lines[-1]


def test_published_launcher_works_without_use_env_too(digits_folder, tmp_path):
    """It then passes --local-rank on; with it, it is torchrun."""
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
    flags = [*TINY_RUN, "--batch-size=8", "--epochs=1", "--dist-eval", f"--data-path={digits_folder}", f"--output_dir={tmp_path}"]
    done = run_forked(*launcher, "main.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "--dist-eval has no effect" in done.stdout and len(read_log(tmp_path)) == 1


def test_a_failing_process_ends_the_run_with_its_cause_named_once(digits_folder, tmp_path):
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport engine, main\nfrom run import command\nreal = engine.train_step\n"
    code += "def fail(parts, *args, **kwargs):\n    if parts.rank.index == 1: raise ZeroDivisionError('as planned')\n    return real(parts, *args, **kwargs)\n"
    code += "engine.train_step = fail\ntry:\n    sys.exit(main.main(sys.argv[1:]))\nexcept Exception as error:\n    command.leave(command.explain(error))\n"
    (tmp_path / "fail.py").write_text(code)
    flags = [*TINY_RUN, "--batch-size=8", f"--data-path={digits_folder}", f"--output_dir={tmp_path / 'run'}"]
    done = run_forked(*TORCHRUN, "--nproc_per_node=2", str(tmp_path / "fail.py"), *flags)
    assert done.returncode != 0 and len(re.findall(r"^ZeroDivisionError: as planned", done.stderr, re.M)) == 1
    assert "Connection closed" not in done.stderr
