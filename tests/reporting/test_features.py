"""Pictures of features and receptive fields: what is drawn is what the network computes, and the figures are those of a known case."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from torch import nn

import model
from reporting import features, inspection, plots, receptive_field
from run.errors import InputError
from tests.conftest import run_forked
from tools import visualize


@pytest.fixture
def photo(tmp_path):
    """A coloured JPEG, 80 wide and 60 high."""
    pixels = np.random.RandomState(0).randint(0, 255, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(path)
    return path


def open_net(name: str, **settings) -> nn.Module:
    return inspection.open_network(name, source=None, seed=0, **settings).net


def noise(num_images: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, size, size, generator=generator) for _ in range(num_images)]


def save_weights(path, name: str, *, num_classes: int, **entries) -> None:
    torch.manual_seed(5)
    torch.save({"model": model.create_model(name, num_classes=num_classes).state_dict(), **entries}, path)


# ---- branches


def test_branches_of_a_chunk_conv_are_together_its_output():
    net, (image,) = open_net("repnext_m0"), noise(1, 64)
    name = "stages.1.blocks.1.token_mixer"
    maps = features.branches(net, name, image)
    outputs = []
    net.get_submodule(name).register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    with torch.no_grad():
        net(image.unsqueeze(0))
    assert [branch for branch, _ in maps] == ["identity", "small branch", "medium branch", "large branch"]
    assert torch.equal(torch.cat([feature_map for _, feature_map in maps]), outputs[0])


def test_levels_of_a_recursive_convolution_are_the_calls_of_its_children():
    maps = features.branches(open_net("recnext_m0"), "stages.1.blocks.0.token_mixer", noise(1, 64)[0])
    names = ["input", "down, call 1", "down, call 2", "down, call 3", "convs.0", "convs.1", "convs.2", "convs.3"]
    assert [(name, feature_map.shape[1]) for name, feature_map in maps] == list(zip(names, (8, 4, 2, 1, 1, 2, 4, 8), strict=True))


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("repnext_m0", "stages.1.downsample.token_mixer", ["input", "small branch", "medium branch", "output"]),
        ("repnext_m0", "stages.0.blocks.0.token_mixer.conv_s", ["input", "output"]),  # its kernels are summed, not run
        ("repnext_m0e", "stages.0.blocks.0.token_mixer", ["input", "output"]),
        ("test_vit", "blocks.0.attn", ["input", "qkv", "norm", "proj"]),
    ],
)
def test_branches_of_other_layers_are_their_children_or_their_output(name, layer, expected):
    maps = features.branches(open_net(name), layer, noise(1, 160 if name == "test_vit" else 64)[0])
    assert [branch for branch, _ in maps] == expected


def test_maps_of_channels_first_channels_last_and_tokens():
    channels_first = torch.randn(1, 5, 4, 4)
    channels_last = channels_first.permute(0, 2, 3, 1)
    tokens = torch.cat((torch.randn(1, 1, 5), channels_last.flatten(1, 2)), dim=1)
    for output in (channels_first, channels_last, tokens):
        assert torch.equal(inspection.as_map(output), channels_first)
    assert inspection.as_map(torch.randn(1, 10)) is None
    assert inspection.as_map((channels_first,)) is None


def test_channel_reductions_and_tiles():
    feature_map = torch.stack([torch.full((4, 4), value) for value in (1.0, -4.0, 2.0)])
    assert torch.allclose(features.mean_activation(feature_map), torch.full((4, 4), 7 / 3))
    assert features.strongest_channels(feature_map, 2) == [1, 2]
    (row,) = features.tile_rows([("one", feature_map), ("two", feature_map[:2])], None, 16)
    assert [plane.shape for _, plane in row] == [(16, 16)] * 2
    rows = features.tile_rows([("one", feature_map), ("two", feature_map[:2])], 5, 16)
    assert [[text for text, _ in row] for row in rows] == [["channel 1", "channel 1"], ["channel 2", "channel 0"], ["channel 0"]]
    ramp = features.tile(torch.linspace(-3, 9, 64).view(8, 8), 8)
    assert ramp.min() == 0 and ramp.max() == 1


# ---- receptive fields


@pytest.mark.parametrize(("num_convs", "side"), [(1, 7), (2, 13)])
def test_receptive_field_of_7x7_convolutions_is_exactly_their_support(num_convs, side):
    net = nn.Sequential(*(nn.Conv2d(3, 3, 7, padding=3) for _ in range(num_convs)))
    ((field, sides),) = receptive_field.receptive_fields(net, [str(num_convs - 1)], noise(2, 31))
    reached = torch.zeros(31, 31, dtype=torch.bool)
    reached[15 - side // 2 : 16 + side // 2, 15 - side // 2 : 16 + side // 2] = True
    assert sides == (31, 31)
    assert torch.equal(field > 0, reached)


def test_receptive_field_of_one_convolution_is_its_kernel():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1))
    ((field, _),) = receptive_field.receptive_fields(net, ["0"], noise(2, 9))
    assert torch.allclose(field[3:6, 3:6], net[0].weight.detach().sum(0).abs().sum(0))


def test_area_share_counts_the_fewest_pixels():
    field = torch.zeros(10, 10)
    field[0, :4] = torch.tensor([5.0, 3.0, 1.5, 0.5])
    assert [receptive_field.area_share(field, percent) for percent in (50, 80, 90, 99)] == [1, 2, 3, 4]
    assert receptive_field.area_share(torch.ones(10, 10), 90) == 90


def test_plain_network_has_the_published_size_and_else_the_same_weights():
    net, plain = open_net("recnext_m1"), open_net("recnext_m1", change=receptive_field.plain_7x7)
    assert sum(parameter.numel() for parameter in plain.parameters()) == 5_362_184
    ours, others = net.state_dict(), plain.state_dict()
    shared = ours.keys() & others.keys()
    assert all("token_mixer" in name for name in ours.keys() ^ others.keys())
    assert all(torch.equal(ours[name], others[name]) for name in shared)
    mixer = plain.get_submodule("stages.2.blocks.3.token_mixer")
    assert (mixer.kernel_size, mixer.groups, mixer.bias is None) == ((7, 7), 192, False)


def test_recursive_convolutions_cover_more_than_plain_ones_at_equal_init():
    """Early stages: measured at 128 pixels over seeds 0 to 2, 99 % of the gradient in 62 to 70 % of the area against 8 to 9 % in stage 0,
    in 69 to 72 % against 40 to 42 % in stage 1. In later ones both reach all of such an image."""
    layers, images = ["stages.0", "stages.1"], noise(2, 128)
    ours, plain = (
        receptive_field.receptive_fields(open_net("recnext_m0", change=change), layers, images) for change in (nn.Module.eval, receptive_field.plain_7x7)
    )
    areas = [[receptive_field.area_share(field, 99) for field, _ in fields] for fields in (ours, plain)]
    assert areas[0][0] > 5 * areas[1][0]
    assert areas[0][1] > 1.4 * areas[1][1]
    assert (ours[0][0] > 0).all() and (plain[0][0] > 0).float().mean() < 0.25


# ---- weights


def test_classes_input_size_and_distillation_head_are_the_checkpoints(tmp_path):
    path = tmp_path / "weights.pth"
    save_weights(path, "recnext_m0", num_classes=7, input_size=96)
    network = inspection.open_network("recnext_m0", source=str(path), seed=0)
    assert (network.net.num_classes, network.input_size, network.is_trained, network.weights) == (7, 96, True, "weights of weights.pth")
    stored = torch.load(path)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in network.net.state_dict().items())
    torch.save(model.create_model("repvit_m0_9", num_classes=5, distillation=True).state_dict(), path)
    assert inspection.open_network("repvit_m0_9", source=str(path), seed=0).net.num_classes == 5


def test_photos_are_seen_as_the_checkpoints_evaluation_sees_them_and_upright(tmp_path):
    """Squashed, not cropped, normalised by its own values, in the network that it is of; and shown in the colours that they have."""
    halves = np.zeros((60, 80, 3), np.uint8)
    halves[:, 4:] = 204
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down: the dark stripe, that a centre crop would leave out, is on the right
    Image.fromarray(halves).save(tmp_path / "photo.png", exif=exif)
    kwargs = {"channels": [4, 8, 8, 8], "layers": [1, 1, 1, 1]}
    net = timm.create_model("resnet18", num_classes=3, **kwargs)
    facts = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear", "input_size": 40}
    torch.save({"model": net.state_dict(), "args": {"model": "resnet18", "model_kwargs": kwargs}, **facts}, tmp_path / "weights.pth")
    network = inspection.open_network("resnet18", source=str(tmp_path / "weights.pth"), seed=0)
    image = inspection.load_photo(tmp_path / "photo.png", network, 40)
    assert image[0, 20, 0].item() == pytest.approx((0.8 - 0.5) / 0.25) and image[0, 20, 39].item() == pytest.approx(-2)
    colors = inspection.to_pixels(image, network.statistics)
    assert colors[20, 0].tolist() == pytest.approx([0.8] * 3, abs=1e-6) and colors[20, 39].tolist() == pytest.approx([0] * 3, abs=1e-6)
    untrained = inspection.load_photo(tmp_path / "photo.png", inspection.open_network("resnet18", source=None, seed=0), 40)
    assert untrained[0, 20, 39].item() == pytest.approx((0.8 - 0.485) / 0.229)


def test_the_caption_says_which_weights_are_trained():
    net = inspection.open_network("test_resnet", source=None, seed=0)
    trained, untrained = dataclasses.replace(net, trained=dataclasses.replace(net.trained, source="weights.pth")), net
    assert receptive_field.training_note([untrained, untrained]).startswith("Untrained weights")
    assert receptive_field.training_note([trained, untrained]).startswith("Only one of the two")
    assert receptive_field.training_note([trained, trained]) == "Trained weights."


# ---- commands


def test_features_command_draws_a_grid(photo, tmp_path):
    out = tmp_path / "grid.png"
    run = run_forked("tools/visualize.py", "features", str(photo), str(photo), "--model=repnext_m0", "--input_size=64", f"--out={out}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:4] == [f"{name:<20} 10x16x16" for name in ("identity", "small branch", "medium branch", "large branch")]
    with Image.open(out) as picture:
        assert picture.width > 1200 and picture.height > 500


def test_erf_command_draws_both_networks_and_writes_their_figures(tmp_path):
    out = tmp_path / "erf.png"
    flags = ["--model=recnext_m0", "--against=plain7x7", "--input-size=64", "--num-images=2", "--stage", "0", "1"]
    run = run_forked("tools/visualize.py", "erf", *flags, f"--out={out}")
    assert run.returncode == 0, run.stderr
    assert "2 images of random noise (no --images given). Untrained weights" in run.stdout
    report = json.loads(out.with_suffix(".json").read_text())
    assert [(field["network"], field["layer"], field["output_position"]) for field in report["fields"]] == [
        (network, layer, position)
        for network in ("recnext_m0", "recnext_m0 with plain 7x7 mixers")
        for layer, position in (("stages.0", [8, 8]), ("stages.1", [4, 4]))
    ]
    for field in report["fields"]:
        assert 0 < field["area_percent"]["50"] < field["area_percent"]["90"] < field["area_percent"]["99"] <= 100
    with Image.open(out) as picture:
        assert picture.width > 800


def test_erf_of_a_trained_network_over_a_folder_of_photos(photo, tmp_path, capsys):
    weights, out = tmp_path / "weights.pth", tmp_path / "erf.png"
    save_weights(weights, "recnext_m0", num_classes=4, input_size=64)
    code = visualize.main(["erf", "--model=recnext_m0", f"--checkpoint={weights}", "--layer", "stages.2", "--images", str(photo.parent), f"--out={out}"])
    assert code == 0
    assert "1 photo. Trained weights." in capsys.readouterr().out
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["input_size"], report["files"]) == (64, [str(photo)])


def test_photos_are_taken_evenly_from_folders(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert [path.stem for path in inspection.find_photos([str(tmp_path)], 5)] == ["0", "2", "4", "6", "8"]
    assert len(inspection.find_photos([str(tmp_path)], 50)) == 10


def test_list_layers_and_strongest_channels(photo, tmp_path, capsys):
    assert visualize.main(["features", "--model=recnext_m0", "--list-layers", "--input-size=64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["stages.0.blocks.0.token_mixer", "RecConv2d", "40x16x16"] in lines
    assert ["head", "Classifier", "1000"] in lines
    out = tmp_path / "grid.png"
    assert visualize.main(["features", str(photo), "--model=recnext_m0", "--layer=stages.1", "--channels=2", "--input-size=64", f"--out={out}"]) == 0
    assert out.exists()


REPNEXT, RECNEXT = ["--model=repnext_m0"], ["--model=recnext_m0"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["features", "PHOTO", *REPNEXT, "--layer=stages.0.block.0.token_mixer"], "did you mean stages.0.blocks.0.token_mixer or .* Candidates: stages.0"),
        (["features", "PHOTO", *REPNEXT, "--layer=head"], "--layer head gives no feature map of its own"),
        (["features", "PHOTO", "--model=rexnetv1_1_0"], "no layer of ReXNetV1 is called token_mixer, mixer or attn"),
        (["features", "PHOTO", "--model=repnext_mm0"], "no model that timm or this project knows; did you mean repnext_m0"),
        (["features", "PHOTO", *REPNEXT, "--checkpoint=none.pth"], "none.pth: there is no such file"),
        (["features", "NOPHOTO", *REPNEXT], "broken.jpg cannot be read as an image"),
        (["features", "PHOTO", "--model=test_vit", "--input-size=100"], "--input-size 100: VisionTransformer refuses images of 100 pixels"),
        (["features", *REPNEXT], "needs photos and --out FILE.png"),
        (["erf", *REPNEXT, "--against=plain7x7"], "plain7x7 replaces recursive convolutions"),
        (["erf", *RECNEXT, "--stage", "4"], "tells of 4 stages, counted from 0"),
        (["erf", *RECNEXT, "--layer", "head", "--input-size=64"], "--layer head gives no feature map"),
        (["erf", *RECNEXT, "--against-checkpoint=x.pth"], "--against-checkpoint needs --against"),
        (["erf", *RECNEXT, "--images", "FOLDER"], "no photo lies in that folder"),
    ],
)
def test_errors_say_what_to_do(args, message, photo, tmp_path, capsys):
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty"
    broken.write_text("no image")
    empty.mkdir()
    places = {"PHOTO": str(photo), "NOPHOTO": str(broken), "FOLDER": str(empty)}
    code = visualize.main([*(places.get(arg, arg) for arg in args), f"--out={tmp_path / 'out.png'}"])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("visualize.py: ") and error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(("name", "message"), [("grid.jpg", "end the name in .png"), ("nowhere/grid.png", "create it first")])
def test_out_is_checked_first(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        plots.checked_path(str(tmp_path / name), flag="--out", endings=(".png",))


def test_a_centre_that_depends_on_nothing_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    nn.init.zeros_(net[0].weight)
    with pytest.raises(InputError, match="no finite gradient other than 0"):
        receptive_field.receptive_fields(net, ["0"], noise(1, 9))


def test_missing_matplotlib_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-plots\.txt"):
        inspection.need_matplotlib()
