"""From a checkpoint to published files: stripped, named, evaluated, read again by every command that takes them."""

import argparse
import json
import re

import pytest
import torch

import fuse_eval
import main
import model
import moganet_valid
import publish
from deployment import weights
from run import command
from run.errors import InputError
from tests.nets import randomise
from tests.test_main import ACCURACY

NAMES = ["0", "1", "2", "3"]
FACTS = {"class_names": NAMES, "input_size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0}
METRICS = {"test_acc1": 30.0, "test_acc5": 100.0, "best_acc1": 30.0, "test_ema_acc1": 20.0, "test_ema_acc5": 100.0, "best_ema_acc1": 25.0}


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder to work in, with pretrain/checkpoint_best.pth as a run leaves it, and its log."""
    torch.manual_seed(0)
    nets = [randomise(model.create_model("recnext_m0", num_classes=4, distillation=True)) for _ in range(2)]
    args = {"model": "recnext_m0", "epochs": 3, "distillation_type": "hard", "lr": 1e-3, "data_path": "/secret"}
    run = {"optimizer": {"state": 1}, "lr_scheduler": {}, "scaler": {}, "epoch": 2, "args": args, "metrics": METRICS}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain").mkdir()
    torch.save({"model": nets[0].state_dict(), "model_ema": nets[1].state_dict(), **run, **FACTS}, "pretrain/checkpoint_best.pth")
    (tmp_path / "pretrain" / "log.txt").write_text('{"epoch": 0}\n')
    return tmp_path


PUBLISHED = ["--model_name", "recnext_m0", "--checkpoint_path", "pretrain/checkpoint_best.pth", "--epochs", "300"]


def accuracy_line(capsys) -> str:
    line = capsys.readouterr().out.splitlines()[-1]
    assert ACCURACY.fullmatch(line), line
    return line


def test_published_file_holds_weights_and_facts_alone(run_folder, capsys):
    publish.run([*PUBLISHED, "--distillation"])
    said = capsys.readouterr().out
    saved = torch.load("pretrain/recnext_m0_distill_300e.pth", weights_only=True)
    original = torch.load("pretrain/checkpoint_best.pth", weights_only=True)
    assert saved["model"].keys() == original["model"].keys()
    assert all(torch.equal(value, original["model"][name]) for name, value in saved["model"].items())
    assert {"optimizer", "lr_scheduler", "scaler", "model_ema"} & set(saved) == set()
    assert saved["args"] == {"model": "recnext_m0", "epochs": 3, "distillation_type": "hard"}
    assert [saved[name] for name in ("class_names", "input_size", "crop_pct")] == [NAMES, 32, 1.0] and tuple(saved["mean"]) == FACTS["mean"]
    beside = weights.load_trained(None, "pretrain/recnext_m0_distill_300e.safetensors")
    assert beside.class_names == NAMES and torch.equal(beside.net.stem.stem[0].conv.weight, original["model"]["stem.stem.0.conv.weight"])
    assert (run_folder / "pretrain/recnext_m0_distill_300e.txt").read_text() == '{"epoch": 0}\n'
    assert "raw weights of epoch 2 (epochs 0 to 2), the last and the best so far" in said
    assert "of a run of 3 epochs, the file's name will say 300" in said and "distillation hard" not in said
    assert "accuracy: not measured" in said


def test_name_follows_the_flags_and_contradictions_are_noted(run_folder, capsys):
    saved = torch.load("pretrain/checkpoint_best.pth", weights_only=True)
    cycles = {"lr_cycle_limit": 2, "lr_cycle_mul": 2.0}  # of 3 and 6 epochs
    torch.save({**saved, "args": {**saved["args"], **cycles}}, "pretrain/checkpoint_best.pth")
    publish.run([*PUBLISHED[:4], "--use-ema"])
    said = capsys.readouterr().out
    assert "trained with distillation hard: add --distillation" in said
    assert "EMA weights of epoch 2 (epochs 0 to 8), not the best so far" in said
    saved = torch.load("pretrain/recnext_m0_without_distill_9e.pth", weights_only=True)
    ema = torch.load("pretrain/checkpoint_best.pth", weights_only=True)["model_ema"]
    assert all(torch.equal(value, ema[name]) for name, value in saved["model"].items())
    again = weights.load_trained(None, "pretrain/recnext_m0_without_distill_9e.pth")
    assert weights.describe_weights(again).startswith("EMA weights of epoch 2 (epochs 0 to 8)")


def test_fused_file_is_evaluated_before_it_is_named_and_by_every_command_alike(run_folder, digits_folder, capsys):
    data = ["--data-path", str(digits_folder)]
    publish.run([*PUBLISHED, "--fused", *data])
    said = capsys.readouterr().out
    described = json.loads((run_folder / "pretrain/recnext_m0_without_distill_300e_fused.pt.json").read_text())
    assert described["accuracy"]["num_images"] == 40
    assert f"acc1 {described['accuracy']['acc1']:.3f} " in said and "on 40 validation images of" in said
    settings = ["--model", "recnext_m0", "--input-size", "32", "--num_workers", "0", "--device", "cpu", *data]
    fuse_eval.main([*settings, "--resume", "pretrain/recnext_m0_without_distill_300e_fused.pt"])
    fused = accuracy_line(capsys)
    assert f"acc1 {described['accuracy']['acc1']:.3f} acc5 {described['accuracy']['acc5']:.3f}" in fused
    fuse_eval.main([*settings, "--resume", "pretrain/recnext_m0_without_distill_300e_fused.safetensors"])
    assert accuracy_line(capsys) == fused
    fuse_eval.main([*settings, "--resume", "pretrain/checkpoint_best.pth"])
    assert accuracy_line(capsys) == fused
    main.main(["--eval", *settings, "--resume", "pretrain/checkpoint_best.pth"])
    assert accuracy_line(capsys) == fused


def test_wrong_file_has_no_accuracy_and_is_not_written(run_folder, digits_folder, tmp_path):
    with pytest.raises(InputError, match="--data-path .* holds neither images of val, of test nor of train"):
        publish.run([*PUBLISHED, "--fused", "--data-path", str(tmp_path)])
    assert sorted(path.name for path in (run_folder / "pretrain").iterdir()) == ["checkpoint_best.pth", "log.txt"]


def test_epochs_are_asked_for_where_the_checkpoint_has_none(run_folder):
    torch.save(model.create_model("recnext_m0", num_classes=4).state_dict(), "pretrain/bare.pth")
    with pytest.raises(InputError, match="does not say how long it was trained: add --epochs"):
        publish.run(["--model", "recnext_m0", "--ckpt", "pretrain/bare.pth"])
    state = torch.load("pretrain/bare.pth", weights_only=True)
    state["stem.stem.0.conv.weight"][0] = torch.nan
    torch.save(state, "pretrain/bare.pth")
    with pytest.raises(InputError, match="pretrain/bare.pth: stem.stem.0.conv.weight is not finite"):
        publish.run(["--model", "recnext_m0", "--ckpt", "pretrain/bare.pth", "--epochs=1"])


def test_publish_verifies_too(run_folder, capsys):
    publish.run(PUBLISHED)
    capsys.readouterr()
    publish.run([*PUBLISHED, "--verify", "pretrain/recnext_m0_without_distill_300e.pth"])
    assert "stored tensors are the checkpoint's" in capsys.readouterr().out
    assert command.run_command(publish.run, [*PUBLISHED, "--use_ema", "--verify", "pretrain/recnext_m0_without_distill_300e.pth"]) == 1
    assert re.match(r"error: pretrain/.*pth is refused: it differs from the network by [^\n]*\n$", capsys.readouterr().err)


def test_flags_are_taken_with_either_hyphen_and_never_shortened(run_folder, capsys):
    publish.run(["--model-name=recnext_m0", "--checkpoint-path=pretrain/checkpoint_best.pth", "--output-dir=out", "--epochs=1"])
    assert (run_folder / "out" / "recnext_m0_without_distill_1e.pth").is_file()
    with pytest.raises(SystemExit):
        publish.run([*PUBLISHED, "--dist"])
    assert "--dist" in capsys.readouterr().err


def test_fuse_eval_refuses_what_does_not_fit(run_folder, digits_folder):
    torch.save({"model": model.create_model("recnext_m0", num_classes=5).state_dict()}, "pretrain/five.pth")
    settings = ["--model", "recnext_m0", "--input-size", "32", "--data-path", str(digits_folder)]
    with pytest.raises(InputError, match=r"five.pth gives \[1, 5\] for an image, the data has 4 classes"):
        fuse_eval.main([*settings, "--resume", "pretrain/five.pth"])
    with pytest.raises(InputError, match="add --resume FILE"):
        fuse_eval.main([*settings, "--pretrained"])


def test_moganet_valid_is_main_under_another_name(run_folder, digits_folder, capsys):
    net = randomise(model.create_model("repnext_m0", num_classes=4))
    torch.save({"state_dict": net.state_dict(), "args": argparse.Namespace(model="x"), "epoch": 299}, "net.pth.tar")
    published = f"--model repnext_m0 --img_size 48 --crop_pct 0.9 --data_dir {digits_folder} --checkpoint net.pth.tar".split()
    assert moganet_valid.translate(published) == [
        "--eval", "--input-size=48", f"--data-path={digits_folder}", "--resume=net.pth.tar", "--model", "repnext_m0", "--crop_pct", "0.9",
    ]  # fmt: skip
    main.main([*moganet_valid.translate(published), "--device", "cpu", "--num_workers", "0"])
    line = accuracy_line(capsys)
    main.main(f"--eval --model repnext_m0 --input-size 48 --crop-pct 0.9 --data-path {digits_folder} --resume net.pth.tar --num_workers 0".split())
    assert accuracy_line(capsys) == line
