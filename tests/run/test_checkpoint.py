"""Checkpoints as users have them: ours, the published ones in all their shapes, damaged and hostile ones."""

import argparse
import os
import pathlib
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import main
import model
from run import checkpoint, optim
from run.errors import InputError
from tests.conftest import SHORT_RUN, SMALL_NET, read_log


@pytest.fixture
def net():
    torch.manual_seed(1)
    return model.create_model("recnext_m0", num_classes=4, **SMALL_NET)


def namespace() -> argparse.Namespace:
    """Settings as published training scripts pickle them: paths and numpy scalars among plain values."""
    return argparse.Namespace(
        lr=np.float64(1e-3), epochs=300, output_dir=pathlib.Path("/data/out"), best=np.float32(1.5), steps=np.int64(3), opt_betas=None, flag=np.bool_(True)
    )


def equal_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "bare", "namespace", "module", "compiled"])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_published_shapes_of_checkpoints_are_read(net, tmp_path, wrap, suffix):
    state = net.state_dict()
    saved = {
        "model": {"model": state},
        "state_dict": {"state_dict": state, "epoch": 3, "arch": "recnext_m0"},
        "bare": dict(state),
        "namespace": {"model": state, "args": namespace(), "epoch": np.int64(7)},
        "module": {"model": {f"module.{name}": value for name, value in state.items()}},
        "compiled": {"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
    }[wrap]
    path = tmp_path / f"weights{suffix}"
    torch.save(saved, path)
    assert equal_weights(checkpoint.weights(checkpoint.read(str(path)), where="x"), dict(state))


def test_old_file_format_and_safetensors_are_read(net, tmp_path):
    torch.save({"model": net.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(dict(net.state_dict()), tmp_path / "w.safetensors")
    for name in ("old.pth", "w.safetensors"):
        assert equal_weights(checkpoint.weights(checkpoint.read(str(tmp_path / name)), where="x"), dict(net.state_dict()))


def test_ema_weights_are_chosen_by_name(net):
    state = dict(net.state_dict())
    ema = {name: value + 1 for name, value in state.items()}
    for saved in ({"model": state, "model_ema": ema}, {"state_dict": state, "state_dict_ema": ema}):
        assert equal_weights(checkpoint.weights(saved, use_ema=True, where="x"), ema)
        assert equal_weights(checkpoint.weights(saved, where="x"), state)
    with pytest.raises(InputError, match="holds no EMA weights"):
        checkpoint.weights({"model": state, "model_ema": None}, use_ema=True, where="x")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/understudy_was_here",)


class Unknown:
    pass


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_refused_and_named(tmp_path, is_zip):
    """Also for a global that is unknown rather than blocked."""
    torch.save({"model": Unknown()}, tmp_path / "unknown.pth")
    with pytest.raises(InputError, match=r"asks for tests\.run\.test_checkpoint\.Unknown"):
        checkpoint.read(str(tmp_path / "unknown.pth"))
    marker = pathlib.Path("/tmp/understudy_was_here")
    path = tmp_path / "hostile.pth"
    torch.save({"model": {"w": torch.ones(1)}, "args": Hostile()}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match=r"hostile\.pth is refused: .*(posix|os)\.system"):
        checkpoint.read(str(path))
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match=r"hostile\.pth is refused"):
        checkpoint.read(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_checkpoints_are_refused(net, tmp_path, keep, name):
    path = tmp_path / name
    save_file(dict(net.state_dict()), path) if name.endswith("safetensors") else torch.save({"model": net.state_dict()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"w\.(pth|safetensors) is (no complete|refused)"):
        checkpoint.read(str(path))


def test_what_is_no_checkpoint_is_refused(tmp_path, net):
    with pytest.raises(InputError, match="there is no such file"):
        checkpoint.read(str(tmp_path / "missing.pth"))
    with pytest.raises(InputError, match="there is no such file"):
        checkpoint.read(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list"):
        checkpoint.read(str(tmp_path / "list.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(InputError, match="text.pth is"):
        checkpoint.read(str(tmp_path / "text.pth"))
    with pytest.raises(InputError, match="holds no weights.*found epoch"):
        checkpoint.weights({"epoch": 3}, where="x")


def test_sources_on_the_network_tell_what_to_do_without_one(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(checkpoint, "download_cached_file", fail)
    monkeypatch.setattr(checkpoint, "load_state_dict_from_hf", fail)
    for source in ("https://example.org/w.pth", "hf-hub:someone/net"):
        with pytest.raises(InputError, match=r"could not be fetched \(no network\).*give its path"):
            checkpoint.read(source)


def test_mismatch_names_the_first_tensors_that_differ(net):
    other = model.create_model("recnext_m1", num_classes=4).state_dict()
    where = r"stem\.stem\.0\.conv\.weight is \[24, 3, 3, 3\] there, \[8, 3, 3, 3\] here"
    with pytest.raises(InputError, match=f"does not fit RecNeXtM.*{where}.*Check the model's name"):
        checkpoint.load_weights(net, other, where="x.pth")
    few = {name: value for name, value in net.state_dict().items() if "blocks.0" not in name}
    with pytest.raises(InputError, match=r"stages\.0\.blocks\.0\.token_mixer\.down\.weight is missing there"):
        checkpoint.load_weights(net, few, where="x.pth")
    with pytest.raises(InputError, match="extra is unknown here"):
        checkpoint.load_weights(net, {**net.state_dict(), "extra": torch.ones(1)}, where="x.pth")


def test_counters_that_old_checkpoints_lack_are_no_mismatch(net):
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    other = model.create_model("recnext_m0", num_classes=4, **SMALL_NET)
    checkpoint.load_weights(other, state, where="x.pth")
    assert equal_weights({name: other.state_dict()[name] for name in state}, state)


def test_names_of_an_old_timm_go_through_the_models_own_filter():
    """torchvision's RegNet names, which timm's filter renames; DeiT's teacher file is loaded the same way."""
    net = timm.create_model("regnety_002", num_classes=4)
    renames = [("stem.conv", "stem.0"), ("stem.bn", "stem.1"), ("head.fc.", "fc."), ("downsample.conv", "proj.0"), ("downsample.bn", "proj.1")]
    renames += [("conv1.conv", "f.a.0"), ("conv1.bn", "f.a.1"), ("conv2.conv", "f.b.0"), ("conv2.bn", "f.b.1"), ("conv3.conv", "f.c.0"), ("conv3.bn", "f.c.1")]
    renames += [(f"s{s}.b{b}.", f"trunk_output.block{s}.block{s}-{b - 1}.") for s in range(1, 5) for b in range(1, 20)]
    renames += [("se.fc1", "f.se.excitation.0"), ("se.fc2", "f.se.excitation.2")]
    old = {}
    for name, value in net.state_dict().items():
        for new, published in renames:
            name = name.replace(new, published)
        old[name] = value
    assert not set(old) & set(net.state_dict())
    other = timm.create_model("regnety_002", num_classes=4)
    checkpoint.load_weights(other, old, where="teacher.pth")
    assert equal_weights(dict(other.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("name", ["recnext_m0", "resnet18", "mobilenetv3_small_050", "repvit_m0_9"])
def test_fine_tuning_drops_heads_of_any_name_by_shape_and_says_so(name, tmp_path, short_run):
    torch.manual_seed(3)
    options = SMALL_NET if name == "recnext_m0" else {}
    source = timm.create_model(name, num_classes=7, **options)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    net = timm.create_model(name, num_classes=4, **options)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    checkpoint.load_finetune(net, str(tmp_path / "w.pth"))
    after = net.state_dict()
    heads = [key for key, value in after.items() if value.shape != source.state_dict()[key].shape]
    assert heads and all(torch.equal(after[key], before[key]) for key in heads)
    body = [key for key in after if not key.startswith(("head", "fc", "classifier"))]
    assert all(torch.equal(after[key], source.state_dict()[key]) for key in body)
    if name == "recnext_m0":
        out = short_run(f"--finetune={tmp_path / 'w.pth'}", "--set_bn_eval", "--epochs=1", f"--output_dir={tmp_path / 'run'}")
        assert "new heads in place of head.head.linear.weight" in out and "teacher" not in out
        trained = checkpoint.read(str(tmp_path / "run" / "checkpoint_last.pth"))["model"]
        assert torch.equal(trained["stem.stem.0.norm.running_mean"], source.state_dict()["stem.stem.0.norm.running_mean"])
        assert not torch.equal(trained["stem.stem.0.conv.weight"], source.state_dict()["stem.stem.0.conv.weight"])


def test_fine_tuning_from_another_model_is_refused(net, tmp_path):
    torch.save({"model": timm.create_model("resnet18", num_classes=4).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not fit RecNeXtM"):
        checkpoint.load_finetune(net, str(tmp_path / "w.pth"))


def test_training_checkpoint_of_the_published_scripts_resumes_here(net, tmp_path, digits_folder):
    """Optimiser of two groups, timm's schedule, Namespace args; no key of ours."""
    from run import config

    cfg, _ = config.parse([*SHORT_RUN, f"--data-path={digits_folder}", "--distillation-type=none", "--epochs=3"])
    optimizer = optim.build_optimizer(cfg, net, 16)
    scheduler = optim.build_scheduler(cfg, optimizer)
    scheduler.step(0)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(), "epoch": 0}
    torch.save({**saved, "model_ema": net.state_dict(), "scaler": {}, "args": namespace()}, tmp_path / "checkpoint_0.pth")
    flags = [*SHORT_RUN, f"--data-path={digits_folder}", "--distillation-type=none", "--epochs=3", f"--resume={tmp_path / 'checkpoint_0.pth'}"]
    assert main.main([*flags, f"--output_dir={tmp_path / 'run'}"]) == 0
    assert [record["epoch"] for record in read_log(tmp_path / "run")] == [1, 2]


def test_weights_alone_cannot_be_resumed(net, tmp_path, short_run):
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="holds weights alone.*--finetune.*--eval"):
        short_run(f"--resume={tmp_path / 'w.pth'}", f"--output_dir={tmp_path / 'run'}")


def test_evaluating_a_checkpoint_of_another_class_count_names_the_head(tmp_path, short_run):
    torch.save({"model": model.create_model("recnext_m0", num_classes=9, **SMALL_NET).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"head\.head\.linear\.weight is \[9, 128\] there, \[4, 128\] here"):
        short_run("--eval", f"--resume={tmp_path / 'w.pth'}")


def test_pretrained_without_a_network_says_how_to_use_a_file(short_run, monkeypatch):
    asked = []

    def fail(model_id, *args, **kwargs):
        asked.append(model_id)
        raise OSError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    for kind, tag in (("none", "base"), ("hard", "dist")):
        with pytest.raises(InputError, match=r"--pretrained: .*offline.*--resume FILE with --eval"):
            short_run("--eval", "--pretrained", f"--distillation-type={kind}")
        assert asked[-1] == f"suous/recnext_m0.{tag}_300e_in1k"
