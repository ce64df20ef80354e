"""Files that an earlier version wrote (tests/golden/earlier) are still read: checkpoint, settings, log, stored teacher labels."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import main
from reporting import logs
from run import config
from tests.conftest import ROOT, read_log

EARLIER = ROOT / "tests" / "golden" / "earlier"
SAME_CPU = {"train_lr": 1e-12, "train_loss": 1e-4, "test_loss": 1e-3, "test_ema_loss": 1e-3}  # relative; another CPU rounds differently


@pytest.fixture
def earlier(tmp_path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "run"))


def test_a_run_goes_on_from_its_checkpoint_and_labels(earlier, capsys):
    """The teacher's file is gone: what it said of epochs 1 and 2 is in the labels."""
    torch.set_num_threads(1)
    flags = ["--config", str(earlier / "args.yaml"), f"--output_dir={earlier}", f"--teacher-labels={earlier / 'labels'}", "--teacher-labels-mode=read"]
    assert main.main([*flags, "--resume=auto"]) == 0
    out = capsys.readouterr().out
    assert f"continuing {earlier / 'checkpoint_0.pth'} with epoch 1, step 0" in out and out.count("carries no checksum") == 1
    expected, found = (read_log(folder) for folder in (EARLIER, earlier))
    assert [record["epoch"] for record in found] == [0, 1, 2] and found[0] == expected[0]
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert [key for key in ours if key in theirs] == list(theirs)
        for key, tolerance in SAME_CPU.items():
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (ours["epoch"], key)


def test_its_settings_are_read():
    cfg, notes = config.parse(["--config", str(EARLIER / "args.yaml")])
    assert (cfg.model, cfg.model_kwargs, cfg.epochs, cfg.lr, cfg.teacher_labels, notes) == (
        "resnet18",
        {"channels": [4, 8, 8, 8], "layers": [1] * 4},
        3,
        4e-2,
        "lab",
        [],
    )


def test_its_log_is_read():
    runs, notes = logs.read_logs([str(EARLIER / "log.txt")])
    assert [record["epoch"] for record in runs[0].records] == [0, 1, 2] and notes == []


def test_its_checkpoint_is_evaluated(earlier, capsys):
    assert main.main(["--config", str(earlier / "args.yaml"), "--eval", f"--resume={earlier / 'checkpoint_0.pth'}", "--teacher-labels=none"]) == 0
    out = capsys.readouterr().out
    first = json.loads((EARLIER / "log.txt").read_text().splitlines()[0])
    assert f"on the 360 test images: acc1 {first['test_acc1']:.3f}" in out.splitlines()[-1]
