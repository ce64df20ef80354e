"""Benchmarks run as written from the root and print a ratio."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_report, inference, layouts, loader, mixers, models, soak, sources
from model.layers import ConvNorm
from run.errors import InputError
from tests.conftest import ROOT, TINY, run_forked, start
from tools import bench_data


def test_models_benchmark_prints_a_ratio_and_its_spread():
    result = run_forked("benchmarks/models.py", "-m", "repnext_m0", "--batch-size", "2", "--input-size", "64", "--rounds", "2")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"repnext_m0 +\d+ ms +\d+ ms +\d\.\d\d  \(\d\.\d\d to \d\.\d\d\)", result.stdout.splitlines()[-1])


def test_models_benchmark_refuses_to_compare_different_results(monkeypatch):
    monkeypatch.setitem(models.PLAIN_METHODS, ConvNorm, ("forward", lambda self, x: 2 * self[1](self[0](x))))
    with pytest.raises(AssertionError, match="not close"):
        models.compare("recnext_m0", batch_size=2, input_size=64, num_rounds=1, memory_format=torch.contiguous_format)


def test_loader_benchmark_compares_every_side_both_ways(digits_folder):
    done = run_forked("benchmarks/loader.py", "--data-path", str(digits_folder / "val"), "--rounds", "1", "--passes", "1")
    assert done.returncode == 0, done.stderr
    titles = [f"{mode}, {how}" for mode in ("training", "evaluation") for how in ("one process", "DataLoader with two workers")]
    assert [line for line in done.stdout.splitlines() if line in titles] == titles
    rows = re.findall(r"^(published|timm|reference|fast) +[\d.]+ +\d+ +([\d.]+) \([\d.]+ to [\d.]+\)$", done.stdout, re.M)
    assert [name for name, _ in rows] == 4 * ["published", "timm", "reference", "fast"]
    assert all(ratio == "1.00" for name, ratio in rows if name == "fast")


def test_loader_benchmark_refuses_what_it_cannot_measure_in_one_line(digits_folder, tmp_path, monkeypatch):
    for name in ("empty", "damaged"):
        (tmp_path / name / "class").mkdir(parents=True)
    shutil.copytree(digits_folder / "val", tmp_path / "damaged", dirs_exist_ok=True)
    (tmp_path / "damaged" / "class" / "a.jpg").write_bytes(b"no image")
    for flags, message in (
        ([tmp_path / "none"], "is no folder"),
        ([tmp_path / "empty"], "no image in the class folders"),
        ([digits_folder / "val", "--num-images", "1"], "one image is too few"),
        ([digits_folder / "val", "--parts", "plan"], "--parts plan names a part that there is not"),
    ):
        monkeypatch.setattr(sys, "argv", ["loader.py", "--data-path", *map(str, flags)])
        with pytest.raises(InputError, match=message):
            loader.main()
    done = run_forked("benchmarks/loader.py", "--data-path", str(tmp_path / "damaged"), "--parts", "workers")
    assert done.returncode == 1 and "a.jpg cannot be read as an image" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("failing", loader.SIDES)
def test_loader_benchmark_names_a_side_that_failed(digits_folder, monkeypatch, failing):
    start = loader.plain_side
    monkeypatch.setattr(loader, "plain_side", lambda name, *args: sys.exit(3) if name == failing else start(name, *args))
    with pytest.raises(InputError, match=f"the side {failing} failed"):
        loader.measure_plain(loader.Sample(digits_folder / "val", 40), is_training=False, num_rounds=1)


def test_loader_benchmark_shows_every_side_the_same_images(digits_folder):
    sample = loader.Sample(digits_folder / "val", 7)
    paths = [path for path, _ in sample.pil().samples]
    assert list(sample.own().samples) == paths and len({Path(path).parent for path in paths}) == 4  # of 4


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_loader_benchmark_leaves_no_process(digits_folder):
    command = ["benchmarks/loader.py", "--data-path", str(digits_folder / "val"), "--parts", "plain", "--rounds", "100000"]
    running = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    wait_for(lambda: len(children.read_text().split()) == len(loader.SIDES))
    sides = children.read_text().split()
    running.kill()
    running.wait()
    wait_for(lambda: not any(map(is_running, sides)))


@pytest.mark.parametrize(("num_images", "num_by_timm"), [(7, 7), (32, 32), (40, 32)])  # it leaves out a last batch that is not full
def test_loader_benchmark_counts_the_images_that_each_side_delivers(digits_folder, monkeypatch, num_images, num_by_timm):
    monkeypatch.setattr(loader, "BATCH", 16)
    seconds = itertools.count()
    monkeypatch.setattr(loader, "cpu_time_s", lambda _: next(seconds))  # one second a measurement
    times = loader.measure_workers(loader.Sample(digits_folder / "val", num_images), is_training=True, num_rounds=1, passes=2)
    delivered = {name: round(1000 / ms) for name, (ms,) in times.items()}
    assert delivered == dict.fromkeys(loader.SIDES, 2 * num_images) | {"timm": 2 * num_by_timm}


def test_loader_processes_keep_a_large_listing_shared():
    done = run_forked("benchmarks/loader_memory.py", "--num-images", "200000", "--reads", "100000")
    assert done.returncode == 0, done.stderr
    growth = {
        name: float(sizes.split()[-1]) - float(start)
        for name, start, sizes in re.findall(r"^(\w+) .* ([\d.]+) MiB at the start, then (.*)$", done.stdout, re.M)
    }
    assert growth["arrays"] < 2 < 10 < growth["lists"]


def test_sources_are_compared_image_for_image_and_their_index_stays_shared(digits_folder, capsys):
    sources.main([str(digits_folder), "--num-images=16", "--rounds=1", "--decode", "--index-images=200000"])
    out = capsys.readouterr().out
    rates = re.findall(r"^(cold|warm)  (\w+) +(\d+) images/s  ([\d.]+) times folders", out, re.M)
    assert {name for _, name, _, _ in rates} == {"folder", *layouts.WRITERS} and all(int(found) > 0 for *_, found, _ in rates)
    assert [ratio for _, name, _, ratio in rates if name == "folder"] == ["1.00"] * len({state for state, *_ in rates})
    sizes = re.findall(r"^index .* ([\d.]+) MiB at the start, then (.*)$", out, re.M)
    assert len(sizes) == 2 and all(float(later.split()[-1]) - float(start) < 2 for start, later in sizes)


def test_bench_data_says_what_limits_a_run(digits_folder):
    flags = "--model recnext_m0 --input-size 32 --batch-size 8 --mix-group-size 8 --num_workers 1 --device cpu --distillation-type none --seconds 0.2"
    done = run_forked("tools/bench_data.py", "--data-path", str(digits_folder), *flags.split())
    assert done.returncode == 0, done.stderr
    rates = dict(re.findall(r"^(storage|one loader process|all loader processes|model) +(\d+) images/s", done.stdout, re.M))
    assert len(rates) == 4 and min(map(int, rates.values())) > 0
    slowest = min(("storage", "all loader processes", "model"), key=lambda name: int(rates[name])).split()
    assert re.search(r"^the (storage|loader|model) limits this run to about \d+ images/s: ", done.stdout, re.M)[1] in slowest


@pytest.mark.parametrize(("flags", "message"), [(["--seconds", "0"], "--seconds 0 is no time to measure anything"), (["--model", "recnext_m9"], "recnext_m9")])
def test_bench_data_refuses_what_it_cannot_measure_before_it_measures(digits_folder, flags, message):
    settings = ["--model", "recnext_m0", "--input-size", "32", "--batch-size", "8", "--mix-group-size", "8", "--device", "cpu", "--distillation-type", "none"]
    done = run_forked("tools/bench_data.py", "--data-path", str(digits_folder), *settings, *flags)
    assert done.returncode == 1 and message in done.stderr and "images/s" not in done.stdout and len(done.stderr.splitlines()) == 1


def test_bench_data_names_what_would_limit_a_run_with_stored_labels():
    rates = {"storage": 900.0, "one loader process": 200.0, "all loader processes": 400.0, "model": 800.0, "model with teacher": 100.0}
    text = bench_data.conclude(rates, num_workers=2)
    assert text.startswith("the model limits this run to about 100 images/s")
    assert text.endswith("With stored teacher labels (--teacher-labels) the loader would limit it, to about 400 images/s")
    assert bench_data.conclude({**rates, "storage": 50.0}, num_workers=2).startswith("the storage limits this run to about 50 images/s")


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_like_one_left_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(soak, "RESULTS", tmp_path / "RESULTS.md")
    run = lambda flags, folder, output: start("main.py", *flags, f"--output_dir={folder}", "--resume=auto", output=output)  # noqa: E731
    monkeypatch.setattr(soak, "start", run)
    flags = [*TINY, "--checkpoint-steps=1", "--batch-size=128", "--mix-group-size=128", "--num_workers=1"]
    soak.soak(["--kills=2", "--steps=16", "--record", *flags])
    out = capsys.readouterr().out
    assert "2 epochs of 8 steps, left alone" in out
    assert re.search(r"^\| 2 \| 1 writing, 1 training, 0 starting \| [012] \| 0 \| 0\.00 \| yes \|$", out, re.M)
    rows = re.findall(r"^\| (processes|memory, MiB|open files) \| (\d+) \| (\d+) \| ([+-]\d+\.\d) \|$", out, re.M)
    assert [name for name, *_ in rows] == ["processes", "memory, MiB", "open files"] and all(int(early) > 0 for _, early, *_ in rows)
    recorded = (tmp_path / "RESULTS.md").read_text()
    assert out.split("\n\n", 1)[1].strip() in recorded and "--kills=2" in recorded and "--record" not in recorded
    assert re.search(r"^## soak.py, \d{4}-\d\d-\d\d$", recorded, re.M) and f"torch {torch.__version__}" in recorded


def test_soak_notices_what_differs_and_what_is_lost(tmp_path, monkeypatch):
    saved = {name: {"a": torch.ones(2), "b": [1, torch.zeros(1)]} for name in soak.SAVED} | {"epoch": 1, "step": 4}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.save(saved, tmp_path / name / "checkpoint_last.pth")
        (tmp_path / name / "log.txt").write_text(f'{{"epoch": 0, "train_loss": 1.5, "epoch_s": {len(name) if name == "two" else 9}}}\n')
    assert soak.differences(tmp_path / "one", tmp_path / "two") == []
    saved["model"]["b"][1] += 1e-30
    torch.save(saved, tmp_path / "two" / "checkpoint_last.pth")
    (tmp_path / "two" / "log.txt").write_text('{"epoch": 0, "train_loss": 1.25}\n')
    assert soak.differences(tmp_path / "one", tmp_path / "two") == ["model", "log.txt"]
    assert soak.position(tmp_path / "one", 8) == 2.5
    (tmp_path / "one" / "checkpoint_last.pth").write_bytes(b"half")
    assert soak.position(tmp_path / "one", 8) is None
    assert soak.continued_at("x\ncontinuing a/checkpoint_last.pth with epoch 3, step 2\n", 8) == 3.25 and soak.continued_at("", 8) == 0


def test_inference_benchmark_prints_ratios_to_the_plain_network(capsys):
    inference.run(["-m", "recnext_m0", "--img-size", "32", "--batch-size", "2", "--rounds", "2", "--device", "cpu", "--forms", "unfused,fused,channels_last"])
    out = capsys.readouterr().out
    assert re.search(r"^\| recnext_m0 +\| +32 \| +2 \|( +[\d.]+ \([\d.]+ to [\d.]+\) \|){3}$", out, re.M)
    assert re.findall(r"^recnext_m0 +(\w+) +\d\.\d\d \(\d\.\d\d to \d\.\d\d\)$", out, re.M) == ["fused", "channels_last"]


def test_least_traffic_is_what_each_operator_reads_and_writes():
    size = 48 * 56**2
    assert mixers.least_bytes(mixers.MIXERS["ChunkConv (repnext_m1)"], 4) == (4 * 2 * size, 4 * 3 * size)
    forward, backward = (sum(getattr(one, way) for one in mixers.rec_conv(16.0, 1)) for way in ("forward", "backward"))
    assert (forward, backward) == ((16 + 4) + (4 + 4) + (16 + 4 + 16), (4 + 32) + (4 + 8) + (16 + 2 * 20))


def test_mixers_benchmark_prints_every_mixer(capsys):
    mixers.run(["--batch-size", "1", "--rounds", "1", "--calls", "1", "--copy-mib", "1", "--device", "cpu"])
    rows = re.findall(r"^(\w+) \((\w+)\) +[\d.]+ +[\d.]+( +[\d.]+ +[\d.]+ \([\d.]+ to [\d.]+\)){2}$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["RecConv", "RecAttn", "ChunkConv", "SKA"]


def test_gpu_check_writes_each_result_and_names_what_was_cut_off(tmp_path):
    out = tmp_path / "gpu.jsonl"
    args = types.SimpleNamespace(out=out, dry=True, device=torch.device("cpu"))
    gpu.check_batches(gpu.Out(out, "batches"), args)
    assert not gpu.run_part("goldens", args, 0.01)
    batches, mixed, cut = map(json.loads, out.read_text().splitlines())
    assert batches["ok"] and mixed["ok"] and mixed["num_batches"] == 6
    assert (cut["part"], cut["ok"], cut["error"]) == ("goldens", False, "cut off after 0 s")


MACHINE = {"part": "machine", "name": "machine", "date": "2030-01-02", "gpu": "H100", "cpu": "x", "cores": 1, "versions": {"torch": "2.11"}, "commit": "abc"}


def test_gpu_report_replaces_its_tables_and_says_what_was_not_measured(tmp_path):
    results, into = tmp_path / "gpu.jsonl", tmp_path / "RESULTS.md"
    into.write_text("# Results\n\n## soak.py, 2030\n\nkept\n")
    gpu_report.report([str(results), "--into", str(into)])
    empty = into.read_text()
    assert empty.count("not measured") == len(gpu_report.TABLES) and "No GPU has been measured yet" in empty and "kept" in empty
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    side = {"ms": spread, "rest": 0.04, "peak_mib": 100.0}
    lines = [
        MACHINE,
        {"part": "goldens", "name": "lsnet_t", "precision": "bfloat16", "ok": False, "logits": 0.5},
        {"part": "step", "name": "recnext_m1", "form": "eager", "batch_size": 256, "ours": side, "published": side, "ratio": spread},
        {"part": "compiled", "name": "the whole part", "ok": False, "error": "cut off after 200 s"},
    ]
    results.write_text("\n".join(map(json.dumps, lines)) + '\n{"part": "tea')
    for _ in range(2):
        gpu_report.report([str(results), "--into", str(into)])
    text = into.read_text()
    assert text.count("## gpu.py") == 1 and text.count("not measured") == len(gpu_report.TABLES) - 2 and "kept" in text
    assert "## gpu.py, 2030-01-02\n\nH100; torch 2.11; commit abc" in text
    assert "| goldens | lsnet_t | bfloat16 | no | logits 5.0e-01 |  |" in text
    assert "| recnext_m1 | eager | 256 | 2.0 (1.0 to 3.0) | 2.0 (1.0 to 3.0) | 2.00 (1.00 to 3.00) | 4.0 | 4.0 | 100 | 100 |" in text
    assert "Left out: compiled, the whole part: cut off after 200 s" in text
    results.write_text("nothing\n{}\n")
    with pytest.raises(InputError, match="line 1 is no result of benchmarks/gpu.py"):
        gpu_report.report([str(results), "--into", str(into)])
