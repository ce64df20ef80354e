"""No file that was not run; none accepted that computes something else."""

import dataclasses
import importlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import export_coreml
import export_onnx
import model
from deployment import coreml, formats, verify, weights
from run import command
from run.errors import InputError
from tests.conftest import SMALL_NET
from tests.nets import randomise

FEW = {"depths": (1, 1, 1, 1)}
FAMILIES = {  # with few blocks where they let themselves be told
    "recnext_m0": FEW,
    "recnext_a0": FEW,
    "recnext_t_share_channel": {"depths": (0, 1, 1, 1)},
    "repnext_m0": FEW,
    "lsnet_t_distill": {"depths": (0, 1, 2, 1)},
    "rexnetv1_lite_1_0": {},
    "repvit_m0_6": {"blocks": ((40, 1, 1), (40, 0, 1), (80, 0, 2), (160, 1, 2), (320, 0, 2), (320, 1, 1))},
    "convnext_femto_downsample_a": FEW,
    "mlla_nano_recconv": FEW,
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SUFFIXES = {
    "onnx": (formats.ONNX, ".onnx"),
    "torchscript": (formats.TORCHSCRIPT, "_fused.pt"),
    "torch-export": (formats.PROGRAM, ".pt2"),
    "state": (formats.STATE, ".pth"),
    "safetensors": (formats.FUSED_SAFETENSORS, ".safetensors"),
    "coreml": (coreml.PROGRAM, ".mlpackage"),
    "coreml-legacy": (coreml.LEGACY, ".mlmodel"),
}


def make_trained(name: str, folder: Path, *, size: int = 64, seed: int = 0, **kwargs) -> weights.Trained:
    """A network in the state of a trained one, with its checkpoint in `folder`; `kwargs` are further arguments of its architecture."""
    torch.manual_seed(seed)
    kwargs |= {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    net = randomise(model.create_model(name, num_classes=7, distillation=True, **kwargs))
    source = folder / f"{name}_{seed}.pth"
    names = [f"class {i}" for i in range(7)]
    torch.save({"model": net.state_dict(), "class_names": names, "input_size": size, "epoch": 3, "args": {"model": name, "model_kwargs": kwargs}}, source)
    return weights.load_trained(name, str(source), img_size=size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def trained(folder) -> weights.Trained:
    return make_trained("recnext_m0", folder, **SMALL_NET)


@pytest.fixture(scope="module")
def written(trained, folder) -> dict[str, tuple[Path, dict]]:
    """A verified file of each format, and its sidecar."""
    files = {}
    for key, (fmt, suffix) in SUFFIXES.items():
        path = folder / f"{key}{suffix}"
        files[key] = (path, verify.write_verified(trained, path, fmt))
    return files


def recheck(path: Path, trained: weights.Trained) -> dict:
    return verify.verify(path, trained, formats.format_of(path))


ALL = "UNDERSTUDY_ALL_EXPORTS" in os.environ  # every model at its own size, also to TorchScript: about 15 minutes of one core
CASES = [(name, fmt) for name in (model.list_models() if ALL else FAMILIES) for fmt in ((formats.ONNX, formats.TORCHSCRIPT) if ALL else (formats.ONNX,))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fmt"), CASES, ids=lambda case: getattr(case, "name", case))
def test_models_export_and_agree(name, fmt, tmp_path):
    size = timm.get_pretrained_cfg(name).input_size[-1] if ALL else 64
    trained = make_trained(name, tmp_path, size=size, **({} if ALL else FAMILIES[name]))
    described = verify.write_verified(trained, tmp_path / "net.onnx", fmt)
    assert described["verified"]["largest_relative_difference"] < 1e-5
    assert described["verified"]["batch_sizes"] == [1, 3, 4]
    assert described["way"] == {"ONNX": "dynamo", "TorchScript": "torch.jit.script"}[fmt.name]


@pytest.mark.parametrize(("mixer", "key"), [("rec_7x7_unpool", "onnx"), ("rec_convtrans_3x3_group", "coreml"), ("rec_convtrans_3x3_split", "coreml-legacy")])
def test_mixers_of_the_ablation_export_too(mixer, key, tmp_path):
    fmt, suffix = SUFFIXES[key]
    trained = make_trained("recnext_m1", tmp_path, mixer=mixer, dims=[16, 32, 64, 128], depths=[1, 1, 1, 1])
    described = verify.write_verified(trained, tmp_path / f"net{suffix}", fmt)
    assert described["verified"]["largest_relative_difference"] < (1e-2 if key == "coreml" else 1e-5)  # a program is in float16


def test_batch_of_an_onnx_file_is_free_and_its_opset_stated(written):
    path, described = written["onnx"]
    proto = onnx.load(path)
    assert not proto.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    assert proto.opset_import[0].version == described["opset"] == 20


@pytest.mark.parametrize("key", SUFFIXES)
def test_written_file_passes_again(key, written, trained):
    path, described = written[key]
    figures = recheck(path, trained)
    assert figures["weights"].endswith("stored tensors are the checkpoint's")
    assert figures["largest_relative_difference"] < 1e-5
    assert figures["real_images"] == figures["random_images"] == 4
    assert ("Core ML itself" in str(figures["not_checked"])) == key.startswith("coreml")


def test_sidecar_says_what_the_file_is(written, trained):
    path, described = written["onnx"]
    beside = json.loads((path.parent / (path.name + ".json")).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert beside == json.loads(json.dumps(described))
    assert beside["sha256"] == weights.digest(path) and beside["source_sha256"] == weights.digest(Path(trained.source))
    crop = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    assert beside["input"] == {"input_size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], **crop}
    assert beside["class_names"] == [f"class {i}" for i in range(7)]
    assert (beside["model"], beside["weights"], beside["format"]) == ("recnext_m0", "raw weights of epoch 3", "ONNX")
    assert beside["compared_with"] == "the network as trained, eager"
    assert {"torch", "timm", "onnx", "onnxruntime"} <= set(beside["versions"])


# ---- what must be refused


@pytest.mark.parametrize("name", ["net.onnx", "net.pt", "net.pt2", "net.pth", "net.safetensors", "net.mlmodel", "net.mlpackage", "net.txt"])
def test_damaged_files_are_refused_in_one_line(name, trained, tmp_path):
    (tmp_path / name).write_bytes(b"neither this nor that")
    with pytest.raises(InputError, match=rf"{name} is (refused|no kind of file that can be verified): [^\n]*$"):
        recheck(tmp_path / name, trained)


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one value changed by a ten-thousandth of its largest: too little for any logit to show."""
    changed = tensor.detach().clone().contiguous()
    changed.view(-1)[0] += 2e-4 * changed.abs().max()
    return changed


def perturb_onnx(path: Path, target: Path) -> None:
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "stages.2.blocks.1.channel_mixer.0.weight")
    value = nudge(torch.from_numpy(onnx.numpy_helper.to_array(weight).copy()))
    weight.CopyFrom(onnx.numpy_helper.from_array(value.numpy(), weight.name))
    onnx.save(proto, target)


def perturb_script(path: Path, target: Path) -> None:
    net, _ = weights.load_torchscript(path)
    weight = dict(net.named_parameters())["stages.2.blocks.1.channel_mixer.0.weight"]
    weight.data.copy_(nudge(weight))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", formats.JIT_IS_DEPRECATED, FutureWarning)
        torch.jit.save(net, target)


def perturb_state(path: Path, target: Path) -> None:
    saved = torch.load(path, weights_only=True)
    name = "stages.2.blocks.1.channel_mixer.0.conv.weight"
    torch.save({**saved, "model": {**saved["model"], name: nudge(saved["model"][name])}}, target)


@pytest.mark.parametrize(("key", "perturb"), [("onnx", perturb_onnx), ("torchscript", perturb_script), ("state", perturb_state)])
def test_one_slightly_changed_weight_is_refused(key, perturb, written, trained, tmp_path):
    path, _ = written[key]
    changed = tmp_path / path.name
    perturb(path, changed)
    fmt = formats.format_of(changed)
    assert verify.compare(fmt.open(changed, trained), verify.make_probe(trained, is_pixels=fmt.takes_pixels))["largest_relative_difference"] < 1e-4
    with pytest.raises(InputError, match="1 of its [0-9]+ stored tensors are not the checkpoint's"):
        recheck(changed, trained)


def test_one_changed_byte_is_refused(written, trained, tmp_path):
    """Of a Core ML package's weights."""
    path, _ = written["coreml"]
    changed = tmp_path / path.name
    weights = changed / "Data/com.apple.CoreML/weights/weight.bin"
    for file in (file for file in path.rglob("*") if file.is_file()):
        (changed / file.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
        (changed / file.relative_to(path)).write_bytes(file.read_bytes())
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 + 3 - len(content) // 2 % 4] ^= 0x40  # an exponent
    weights.write_bytes(content)
    with pytest.raises(InputError, match="is refused"):
        recheck(changed, trained)


def test_file_changed_beside_its_sidecar_is_refused(written, trained, tmp_path):
    path, described = written["torchscript"]
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    assert recheck(copied, trained)["same_top1"] == 8
    (tmp_path / (path.name + ".json")).write_text(json.dumps({**described, "sha256": "0" * 64}))
    with pytest.raises(InputError, match="changed since it was written"):
        recheck(copied, trained)
    (tmp_path / (path.name + ".json")).write_text("[]")
    with pytest.raises(InputError, match="no sidecar of this project"):
        recheck(copied, trained)


@pytest.mark.parametrize("key", ["onnx", "torchscript", "safetensors", "coreml"])
def test_another_models_file_is_refused(key, written, folder):
    path, _ = written[key]
    with pytest.raises(InputError, match="is refused: it differs from the network"):
        recheck(path, make_trained("recnext_m0", folder, seed=1, **SMALL_NET))


def test_another_architecture_or_class_count_is_refused(written, trained, folder):
    with pytest.raises(InputError, match="is refused: .*(differs from the network|does not run)"):
        recheck(written["onnx"][0], make_trained("repnext_m0", folder))
    with pytest.raises(InputError, match="does not fit RepNeXt"):
        recheck(written["state"][0], make_trained("repnext_m0", folder))
    other = dataclasses.replace(trained, net=randomise(model.create_model("recnext_m0", num_classes=5)).eval(), num_classes=5)
    with pytest.raises(InputError, match=r"gives \[1, 7\] for 1 images where \[1, 5\] are due"):
        recheck(written["torchscript"][0], other)


class Unsteady(nn.Module):
    """A network with a branch that is dropped at random while training, as stochastic depth does."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.net(x) * self.drop(torch.ones_like(x[:, :1, 0, 0]))


def save_in_training_mode(net: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters say themselves that this is wrong
        if path.suffix == ".pt":
            torch.jit.save(torch.jit.trace(net, IMAGES, check_trace=False), path)
        elif path.suffix == ".pt2":
            torch.export.save(torch.export.export(net, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
        else:
            settings = {"training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False, "opset_version": 18, "dynamo": False}
            torch.onnx.export(net, (IMAGES,), path, dynamic_axes={"x": {0: "batch"}}, input_names=["x"], **settings)


@pytest.mark.parametrize(
    ("kind", "suffix", "found"),
    [
        ("batchnorm", ".pt", "[0-9]+ of its modules are in it, first: the network"),
        ("batchnorm", ".onnx", "it holds BatchNormalization, Dropout"),
        ("dropout", ".pt2", "it holds aten.dropout.default"),
    ],
)
def test_training_mode_is_refused(kind, suffix, found, trained, tmp_path):
    plain = model.create_model("recnext_m0", num_classes=7, **SMALL_NET)
    plain.load_state_dict(trained.net.state_dict())
    net = plain.train() if kind == "batchnorm" else Unsteady(plain.eval()).train(False)
    if kind == "dropout":
        net.drop.train()
    path = tmp_path / f"net{suffix}"
    save_in_training_mode(net, path)
    with pytest.raises(InputError, match=f"is refused: it was exported in training mode: {found}"):
        recheck(path, trained)


def test_training_mode_that_changes_nothing_is_refused_too(trained, tmp_path):
    """Fused, without dropout, a network computes the same in both modes; but not after the next change of its options."""
    save_in_training_mode(weights.fused(trained).train(), tmp_path / "net.pt")
    assert torch.equal(weights.load_torchscript(tmp_path / "net.pt")[0](IMAGES), weights.fused(trained)(IMAGES))
    with pytest.raises(InputError, match="training mode"):
        recheck(tmp_path / "net.pt", trained)


def test_results_that_change_from_run_to_run_are_refused(trained):
    opened = verify.Opened(run=lambda x: trained.net(x) * (1 + 1e-5 * torch.rand(1)), tensors={}, faults=[])
    with pytest.raises(InputError, match="other results when run again"):
        verify.compare(opened, verify.make_probe(trained))


def test_distillation_pair_left_in_is_refused(trained):
    opened = verify.Opened(run=lambda x: (trained.net(x), trained.net(x)), tensors={}, faults=[])
    with pytest.raises(InputError, match="gives 2 outputs where one is due"):
        verify.compare(opened, verify.make_probe(trained))


def test_top_class_counts_wherever_the_margin_exceeds_the_error():
    images = torch.zeros(8, 3, 4, 4)
    reference = torch.tensor([[100.0, 0.0020, 0.0]]).repeat(8, 1)
    reference[0] = torch.tensor([0.0, 0.0080, 0.0079])
    out = reference.clone()
    probe = verify.Probe(images=images, reference=reference, num_real=4, origin="here")
    rows = iter([0, 1, 4, 0])
    out[0, 2] += 0.00015  # the top class changes, by an error above the margin

    def run(x):
        first = next(rows)
        return out[first : first + len(x)]

    figures = verify.compare(verify.Opened(run=run, tensors={}, faults=[]), probe)
    assert figures["same_top1"] == 7
    out[0] = torch.tensor([0.0, 0.0080, 0.0079])
    out[0, 1], out[0, 2] = 0.00795 - 5e-5 * 0.9, 0.0079 + 5e-5 * 0.9
    rows = iter([0, 1, 4, 0])
    with pytest.raises(InputError, match="top class differs on 1 of 8 images"):
        verify.compare(verify.Opened(run=run, tensors={}, faults=[]), probe)


def test_files_built_otherwise_are_compared_on_more_images(trained, tmp_path):
    path = tmp_path / "unfused.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", formats.JIT_IS_DEPRECATED, FutureWarning)
        torch.jit.save(torch.jit.trace(trained.net, IMAGES, check_trace=False), path)
    figures = recheck(path, trained)
    assert figures["weights"].startswith("not compared") and figures["random_images"] == 28


# ---- writing


def wrong_writer(fmt: verify.Format, way: str):
    """A way of writing that gives another network's file."""

    def write(trained, path, dtype):
        other = randomise(model.create_model(trained.name, num_classes=trained.num_classes, distillation=True, **SMALL_NET)).eval()
        other.stem.stem[0].conv.weight.data.mul_(1.5)
        return fmt.ways[way](dataclasses.replace(trained, net=other), path, dtype)

    return write


def test_wrong_exporter_is_passed_over_and_named(trained, tmp_path):
    fmt = dataclasses.replace(formats.ONNX, ways={"first": wrong_writer(formats.TORCHSCRIPT, "torch.jit.script"), "second": formats.write_onnx_legacy})
    described = verify.write_verified(trained, tmp_path / "net.onnx", fmt)
    assert (described["way"], described["opset"]) == ("second", 18)
    assert described["ways_refused"][0].startswith("first: it is no ONNX file that onnxruntime runs")
    assert described["verified"]["largest_relative_difference"] < 1e-5


def test_no_file_is_left_where_none_is_right(trained, tmp_path):
    fmt = dataclasses.replace(formats.TORCHSCRIPT, ways={"wrong": wrong_writer(formats.TORCHSCRIPT, "torch.jit.script")})
    with pytest.raises(InputError, match="net.pt was not written. wrong: it differs from the network"):
        verify.write_verified(trained, tmp_path / "net.pt", fmt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "net.pt").write_text("what was there before")
    with pytest.raises(InputError, match="was not written"):
        verify.write_verified(trained, tmp_path / "net.pt", fmt)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"] and (tmp_path / "net.pt").read_text() == "what was there before"


def test_folder_that_cannot_be_written_and_full_disk_give_one_line(trained, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="net.pth cannot be written .*choose another place"):
        verify.write_verified(trained, tmp_path / "file" / "net.pth", formats.STATE)

    def no_room(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(InputError, match="net.pth cannot be written .No space left on device"):
        verify.write_verified(trained, tmp_path / "net.pth", formats.STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_export_left_goes_with_the_next(trained, tmp_path):
    (tmp_path / ".net.pth.partial").mkdir()
    (tmp_path / ".net.pth.partial" / "net.pth").write_text("half")
    verify.write_verified(trained, tmp_path / "net.pth", formats.STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "net.pth.json"]


def test_float16_has_its_own_tolerance(trained, tmp_path):
    described = verify.write_verified(trained, tmp_path / "net.onnx", formats.ONNX, dtype=torch.float16)
    assert described["way"] == "dynamo" and described["verified"]["precision"] == "float16" and described["verified"]["tolerance"] == 2e-2
    assert 1e-5 < described["verified"]["largest_relative_difference"] < 2e-2


def test_missing_packages_are_named_with_their_cure(trained, tmp_path, monkeypatch):
    real = importlib.import_module

    def missing(name, *args):
        if name in ("onnx", "coremltools"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InputError, match="needs the package onnx: pip install -r requirements-export.txt"):
        verify.write_verified(trained, tmp_path / "net.onnx", formats.ONNX)
    with pytest.raises(InputError, match="needs the package coremltools: pip install -r requirements-export.txt"):
        verify.write_verified(trained, tmp_path / "net.mlpackage", coreml.PROGRAM)


# ---- Core ML


@pytest.mark.parametrize(("fmt", "dtype"), [(coreml.PROGRAM, torch.float16), (coreml.LEGACY, torch.float32)], ids=["program", "legacy"])
def test_resizing_by_a_fraction_stays_nearest_and_float16_reports_its_difference(fmt, dtype, tmp_path):
    """At 96 pixels the last stage goes from 2 x 2 to 3 x 3, which the old format would do bilinearly."""
    trained = make_trained("recnext_a0", tmp_path, size=96, **FEW)
    figures = verify.write_verified(trained, tmp_path / ("net" + (".mlpackage" if fmt is coreml.PROGRAM else ".mlmodel")), fmt, dtype=dtype)["verified"]
    assert figures["precision"] == str(dtype).removeprefix("torch.")
    assert figures["largest_relative_difference"] < 1e-5 if dtype == torch.float32 else 1e-5 < figures["largest_relative_difference"] < 2e-2


@pytest.mark.parametrize("key", ["coreml", "coreml-legacy"])
def test_image_and_labels_are_the_checkpoints(key, written, trained):
    path, _ = written[key]
    spec = coreml.load_coremltools().utils.load_spec(str(path))
    image = spec.description.input[0].type.imageType
    assert (image.width, image.height, image.ColorSpace.Name(image.colorSpace)) == (64, 64, "RGB")
    with pytest.raises(InputError, match="class labels are not the checkpoint's"):
        recheck(path, dataclasses.replace(trained, class_names=["other"] * 7))
    darker = dataclasses.replace(trained, mean=(0.6, 0.456, 0.406))
    with pytest.raises(InputError, match="normalisation|differs from the network"):
        recheck(path, darker)


def test_a_raw_photograph_gets_the_networks_class(written, trained):
    """Pixels as a camera gives them, through the saved program, against the normal pipeline."""
    pixels = torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    normalised = (pixels / 255 - torch.tensor(trained.mean).view(-1, 1, 1)) / torch.tensor(trained.std).view(-1, 1, 1)
    for key in ("coreml", "coreml-legacy"):
        path, _ = written[key]
        evaluate = formats.format_of(path).open(path, trained).run.args[0]
        with torch.no_grad():
            out = torch.cat([evaluate(image.unsqueeze(0)) for image in pixels])
            torch.testing.assert_close(out, trained.net(normalised), rtol=1e-4, atol=1e-4)


def test_core_ml_itself_is_asked_on_macos(written, trained, monkeypatch):
    """A stand-in for Core ML answers from the network, and then from another."""
    path, _ = written["coreml"]
    factor = 1.0

    class StandIn:
        def __init__(self, *args, **kwargs):
            pass

        def predict(self, given):
            pixels = torch.from_numpy(np.array(given["image"])).permute(2, 0, 1).float()
            probabilities = (trained.net(verify.from_pixels(pixels, trained).unsqueeze(0)) * factor).softmax(1)[0].tolist()
            return {"classLabel": "class 0", "classLabel_probs": dict(zip(trained.class_names, probabilities, strict=True))}

    opened = coreml._open_program(path, trained)
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(coreml.load_coremltools().models, "MLModel", StandIn)
    on_mac = coreml._opened(path, trained, None, opened.tensors, [])
    probe = verify.make_probe(trained, is_pixels=True)
    figures = verify.compare(on_mac, probe)
    assert figures["not_checked"] == [] and figures["same_top1"] == 8
    factor = 1.01
    with pytest.raises(InputError, match="differs from the network"):
        verify.compare(on_mac, probe)


def test_operators_that_cannot_be_checked_are_named(written, trained, monkeypatch):
    monkeypatch.delitem(coreml.Program.__call__.__globals__["OPERATORS"], "gelu")
    with pytest.raises(InputError, match="operators that can be checked on macOS alone: gelu"):
        recheck(written["coreml"][0], trained)


# ---- the commands


def test_commands_write_and_verify(trained, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named = tmp_path / "recnext_m0_distill_1e.pth"
    named.write_bytes(Path(trained.source).read_bytes())
    export_onnx.run([f"--ckpt={named}", "--format=torchscript"])
    assert "pretrain/recnext_m0_distill_1e_fused.pt: TorchScript" in capsys.readouterr().out
    assert command.run_command(export_onnx.run, ["--ckpt", str(named), "--verify", "pretrain/recnext_m0_distill_1e_fused.pt"]) == 0
    assert "computes what the checkpoint does" in capsys.readouterr().out
    other = make_trained("recnext_m0", tmp_path, seed=1, **SMALL_NET)
    assert command.run_command(export_coreml.run, ["--ckpt", other.source, "--verify", str(written["coreml"][0])]) == 1
    assert "coreml.mlpackage is refused: it differs from the network by" in capsys.readouterr().err
    assert verify.default_target(trained, "_64.mlpackage") == Path("pretrain/recnext_m0_0_64.mlpackage")
    assert verify.default_target(dataclasses.replace(trained, source="x/checkpoint_best.pth"), ".onnx") == Path("pretrain/recnext_m0.onnx")
    assert command.run_command(export_onnx.run, ["--ckpt", str(named), "--verify", "nothing.onnx"]) == 1
    assert capsys.readouterr().err == "error: nothing.onnx: there is no such file\n"


def test_real_images_come_from_the_data(trained, digits_folder):
    probe = verify.make_probe(trained, str(digits_folder))
    assert probe.origin == str(digits_folder) and probe.num_real == 4
    assert not torch.equal(probe.images[:4], verify.make_probe(trained).images[:4])
    with pytest.raises(InputError, match="holds neither images of val, of test nor of train"):
        verify.make_probe(trained, str(digits_folder / "val"))
