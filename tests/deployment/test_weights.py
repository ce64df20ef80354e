"""Loading a trained network from whatever it was saved as, and what is said of it."""

import argparse
import dataclasses

import pytest
import torch

import model
from deployment import formats, weights
from run.errors import InputError
from tests.nets import build, randomise, relative_error

NAMES = ["one", "two", "three", "four", "five", "six", "seven"]
FACTS = {"class_names": NAMES, "input_size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "crop_pct": 0.9, "epoch": 3}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return randomise(model.create_model("recnext_m0", num_classes=7, distillation=True)).eval()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("wrap", "which"),
    [
        (lambda state: {"model": state, "optimizer": {}, "args": argparse.Namespace(model="other")}, "model"),
        (lambda state: {"state_dict": state}, "state_dict"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "bare state dict"),
        (lambda state: {"model_ema": state}, "model_ema"),
    ],
    ids=["published", "state_dict", "bare", "ema alone"],
)
def test_reads_what_checkpoints_are_met_as(net, wrap, which, tmp_path):
    torch.save(wrap(net.state_dict()), tmp_path / "net.pth.tar")
    trained = weights.load_trained("recnext_m0", str(tmp_path / "net.pth.tar"))
    assert same_weights(trained.net, net) and not trained.net.training
    assert (trained.num_classes, trained.class_names, trained.input_size, trained.crop_pct) == (7, None, 224, 0.875)
    assert (trained.which, trained.is_fused) == (which, False)


def test_own_checkpoints_bring_their_facts_and_arguments(tmp_path):
    net = randomise(model.create_model("recnext_t", num_classes=7, attn_kernel="relu"))
    args = {"model": "recnext_t", "model_kwargs": {"attn_kernel": "relu"}, "epochs": 5}
    ema = {name: value + 1 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "model_ema": ema, "args": args, **FACTS}, tmp_path / "net.pth")
    trained = weights.load_trained(None, str(tmp_path / "net.pth"), use_ema=True)
    assert (trained.name, trained.class_names, trained.input_size, trained.mean, trained.crop_pct) == ("recnext_t", NAMES, 64, (0.5, 0.5, 0.5), 0.9)
    assert trained.net.stages[1].blocks[0].token_mixer.attn.down[1].kernel == "relu"
    assert all(torch.equal(value, ema[name]) for name, value in trained.net.state_dict().items())
    assert weights.load_trained(None, str(tmp_path / "net.pth"), img_size=96).input_size == 96


@pytest.mark.parametrize(("suffix", "is_fused"), [(".pth", True), (".pth", False), (".safetensors", True), (".safetensors", False), (".pt", True)])
def test_written_files_are_read_with_their_facts(net, suffix, is_fused, tmp_path):
    torch.save({"model": net.state_dict(), **FACTS}, tmp_path / "net.pth")
    trained = weights.load_trained("recnext_m0", str(tmp_path / "net.pth"))
    fmt = {".pth": formats.STATE, ".safetensors": formats.SAFETENSORS, ".pt": formats.TORCHSCRIPT}[suffix]
    way = {".pt": "torch.jit.script"}.get(suffix, "fused" if is_fused else "as trained")
    fmt.ways[way](trained, tmp_path / f"out{suffix}", torch.float32)
    again = weights.load_trained("recnext_m0", str(tmp_path / f"out{suffix}"))
    assert same_weights(again.net, weights.fused(trained) if is_fused else net)
    assert again.is_fused is is_fused
    assert weights.facts(again) == weights.facts(trained)
    assert again.class_names == NAMES and again.mean == (0.5, 0.5, 0.5) and again.epoch == 3


def test_fused_copy_leaves_the_network_alone(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    trained = weights.load_trained("recnext_m0", str(tmp_path / "net.pth"), img_size=64)
    fused = weights.fused(trained)
    assert same_weights(trained.net, net)
    assert not any("running_mean" in name for name in fused.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(fused(x), net(x)) < 1e-5


@pytest.mark.parametrize("distillation", [True, False])
def test_keys_decide_about_the_distillation_head(distillation, tmp_path):
    net = randomise(build("lsnet_t", (64, 64), num_classes=7, distillation=distillation))
    torch.save({"model": net.state_dict()}, tmp_path / "net.pth")
    trained = weights.load_trained("lsnet_t", str(tmp_path / "net.pth"), img_size=64)
    assert same_weights(trained.net, net)


def test_random_weights_for_measuring():
    trained = weights.load_trained("lsnet_t", None, img_size=64, num_classes=5)
    assert trained.net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert (trained.which, trained.source) == ("random", None)


def test_what_does_not_fit_is_refused_in_words(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    source = str(tmp_path / "net.pth")
    with pytest.raises(InputError, match="does not say what network it is of: add --model"):
        weights.load_trained(None, source)
    with pytest.raises(InputError, match="did you mean recnext_m"):
        weights.load_trained("recnext_m", source)
    with pytest.raises(InputError, match="does not fit RepNeXt"):
        weights.load_trained("repnext_m0", source)
    with pytest.raises(InputError, match="no EMA weights"):
        weights.load_trained("recnext_m0", source, use_ema=True)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="cut.pt"):
        weights.load_trained("recnext_m0", str(tmp_path / "cut.pt"))


def test_labels_are_for_people_and_differ():
    trained = weights.load_trained("recnext_m0", None, num_classes=3)
    assert weights.labels(trained) == ["0", "1", "2"]
    imagenet = weights.labels(dataclasses.replace(trained, num_classes=1000))
    assert len(set(imagenet)) == 1000
    assert imagenet[0] == "tench, Tinca tinca" and imagenet[134] == "crane (n02012849)"
    folders = dataclasses.replace(trained, class_names=["n02012849", "mine", "n03126707"])
    assert weights.labels(folders) == ["crane (n02012849)", "mine", "crane (n03126707)"]


def test_weights_are_described_as_far_as_known():
    trained = weights.load_trained("recnext_m0", None, num_classes=3)
    assert weights.describe_weights(trained) == "random weights"
    metrics = {"test_acc1": 90.0, "best_acc1": 91.0, "test_ema_acc1": 92.0, "best_ema_acc1": 92.0}
    last = dataclasses.replace(trained, which="model", epoch=4, metrics=metrics, args={"epochs": 5})
    assert weights.describe_weights(last) == "raw weights of epoch 4 (epochs 0 to 4), the last and not the best so far"
    ema = dataclasses.replace(last, which="model_ema", epoch=2)
    assert weights.describe_weights(ema) == "EMA weights of epoch 2 (epochs 0 to 4), the best so far"
    assert weights.describe_weights(dataclasses.replace(trained, which="state_dict")) == "raw weights"


@pytest.mark.parametrize(
    ("name", "args", "how"),
    [
        ("recnext_m0_distill_300e.pth", None, "hard"),
        ("recnext_m0_without_distill_300e.pth", None, "none"),
        ("net.pth", None, None),
        ("net.pth", {"distillation_type": None}, "hard"),
        ("net.pth", {"distillation_type": None, "finetune": "x"}, "none"),
        ("recnext_m0_distill_300e.pth", {"distillation_type": "none"}, "none"),
    ],
)
def test_settings_or_the_published_name_tell_of_distillation_not_the_weights(name, args, how, tmp_path):
    torch.save({"model": build("recnext_m0", (32, 32), num_classes=7).state_dict(), **({"args": args} if args else {})}, tmp_path / name)
    assert weights.distillation(weights.load_trained("recnext_m0", str(tmp_path / name), img_size=32)) == how
