"""Detectors as files: what an ONNX file finds is what the network finds, and one that finds anything else is refused."""

import numpy as np
import pytest
import torch

import export_onnx
from deployment import formats, verify
from deployment.verify import Opened, Probe
from detection import exporting, networks
from features.exporting import describe
from run.errors import InputError


def objects(*scores: float, shift: float = 0.0, label: int = 1) -> list[torch.Tensor]:
    """Objects of these scores in a row, with masks of probability 0.5."""
    boxes = torch.tensor([[20.0 * i + shift, 0, 20.0 * i + 10, 10] for i in range(len(scores))]).view(-1, 4)
    return [boxes, torch.tensor(scores), torch.full((len(scores),), label), torch.full((len(scores), 1, 28, 28), 0.5)]


def compared(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict:
    """What `compare_objects` says of a file that finds `found` in the one image, of 100 pixels, in which the network finds `wanted`."""
    probe = Probe(torch.zeros(1, 3, 50, 100), [tuple(wanted)], num_real=1, origin="a picture")
    return exporting.compare_objects(Opened(run=lambda image: [one.numpy() for one in found], tensors={}, faults=[]), probe)


def test_objects_are_compared_one_by_one_whatever_their_order():
    wanted = objects(0.9, 0.8, 0.06)
    turned = [one.flip(0) for one in wanted]
    assert compared(turned, wanted)["top1_of"] == "3 objects"
    figures = compared(objects(0.9, 0.8, shift=0.005), objects(0.9, 0.8))
    assert figures["largest_relative_difference"] == pytest.approx(5e-5, rel=1e-3)  # 0.005 of 100 pixels
    assert "largest difference 5.0e-05 of the image's long side, the scores and the masks" in verify.summary(figures)
    assert compared(objects(0.9, 0.05005), objects(0.9))["same_top1"] == 1  # rounding decides whether that one is kept


def test_files_that_find_something_else_are_refused():
    wanted = objects(0.9, 0.8)
    for found, message in (
        (objects(0.9, 0.8, shift=0.02), "score 0.900 differs by 2.0e-04 from the most alike one"),
        (objects(0.9, 0.8, label=0), "score 0.900 is not found"),
        (objects(0.9, 0.79), "score 0.800 differs by 1.0e-02"),
        (objects(0.9), "score 0.800 is not found"),
        (objects(0.9, 0.8, 0.3), "finds 1 objects that the network does not, the best of score 0.300"),
        ([*wanted[:3], wanted[3] + 0.01], "score 0.900 differs by 1.0e-02"),
        ([wanted[0] * float("nan"), *wanted[1:]], "score 0.900 differs by inf"),
        (wanted[:3], "gives 3 outputs where 4 are due"),
    ):
        with pytest.raises(InputError, match=message):
            compared(found, wanted)
    with pytest.raises(InputError, match="nothing was compared, for the network finds no object in a picture: add --data-path"):
        compared(objects(), objects())


def test_files_whose_results_change_are_refused():
    answers = iter([objects(0.9), objects(0.8)])
    probe = Probe(torch.zeros(1, 3, 50, 100), [tuple(objects(0.9))], num_real=1, origin="a picture")
    opened = Opened(run=lambda image: [one.numpy() for one in next(answers)], tensors={}, faults=[])
    with pytest.raises(InputError, match="other results when run again"):
        exporting.compare_objects(opened, probe)


@pytest.mark.parametrize(("detector", "model"), [("mask_rcnn", "lsnet_t"), ("faster_rcnn", "test_resnet"), ("retinanet", "recnext_m0")])
def test_files_find_as_many_objects_as_there_are(detector, model, tmp_path):
    """Also none, and not the number that the exporter saw: the least score that is kept is set so that images have several numbers of them."""
    torch.manual_seed(0)
    net = networks.build(detector, model, 3, channels=8).eval()
    heads = net if detector == "retinanet" else net.roi_heads
    for module in (net.head.classification_head if detector == "retinanet" else heads.box_predictor.cls_score).modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    heads.score_thresh = 0.0
    images = torch.randn(6, 3, 64, 96) * torch.tensor([0.1, 0.2, 0.5, 1, 2, 4]).view(-1, 1, 1, 1)
    with torch.no_grad():
        best = [net(image[None], [(64, 96)])[0]["scores"] for image in images]
    heads.score_thresh = sorted(scores[0].item() for scores in best)[2] + 1e-4
    trained = describe(exporting.WholeImages(net), {}, name=detector, class_names=list("abc"), input_size=(64, 96), source=None)
    exporting.FORMATS["detector"].ways["TorchScript exporter"](trained, tmp_path / "net.onnx", torch.float32)
    with torch.no_grad():
        reference = [trained.net(image[None]) for image in images]
    numbers = [len(one[1]) for one in reference]
    assert min(numbers) == 0 and len(set(numbers)) >= 3, numbers
    opened = formats.ONNX.open(tmp_path / "net.onnx", trained)
    assert [len(opened.run(image[None])[1]) for image in images] == numbers
    figures = exporting.compare_objects(opened, Probe(images, reference, num_real=0, origin="noise"))
    assert figures["same_top1"] == sum(numbers)


def test_a_checkpoint_is_written_verified_and_another_is_refused(whole, tmp_path, capsys):
    source, target = whole / "checkpoint_last.pth", tmp_path / "net.onnx"
    trained = exporting.load_trained(None, str(source))
    assert (trained.name, trained.input_size, trained.class_names) == ("mask_rcnn_recnext_m0", (64, 96), ["circle", "square", "triangle"])
    export_onnx.run([f"--ckpt={source}", f"--out={target}"])
    assert "objects\n" in capsys.readouterr().out
    export_onnx.run([f"--ckpt={source}", f"--verify={target}"])
    assert "stored tensors are the checkpoint's" in capsys.readouterr().out
    with pytest.raises(InputError, match="is refused"):
        export_onnx.run([f"--ckpt={whole / 'checkpoint_0.pth'}", f"--verify={target}"])
    for flags, message in ((["--float16"], "float32 alone"), (["--format=torchscript"], "--format torchscript is not for detectors")):
        with pytest.raises(InputError, match=message):
            export_onnx.run([f"--ckpt={source}", f"--out={tmp_path / 'other.onnx'}", *flags])
    assert not (tmp_path / "other.onnx").exists()


def test_backbone_and_pyramid_alone_at_a_size_that_is_no_multiple_of_32(whole, tmp_path):
    trained = exporting.load_trained(None, str(whole / "checkpoint_last.pth"), img_size=(50, 83), part="pyramid")
    described = verify.write_verified(trained, tmp_path / "net.onnx", exporting.FORMATS["pyramid"])
    assert described["output_names"] == ["stride4", "stride8", "stride16", "stride32", "stride64"]
    assert described["input"]["input_size"] == (50, 83) and described["verified"]["largest_relative_difference"] < 1e-5
    session = formats.require("onnxruntime").InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": np.zeros((1, 3, 50, 83), np.float32)})[0].shape == (1, 16, 13, 21)
    wrong = [torch.zeros(1, 16, 3, 3)] * 5
    probe = Probe(torch.zeros(1, 3, 50, 83), [tuple(torch.ones(1, 16, 3, 3) for _ in wrong)], num_real=1, origin="x")
    with pytest.raises(InputError, match="differs from the network by 1.0e"):
        exporting.compare_maps(Opened(run=lambda image: [one.numpy() for one in wrong], tensors={}, faults=[]), probe)


def test_real_images_are_those_of_a_folder(whole, shapes):
    trained = exporting.load_trained(None, str(whole / "checkpoint_last.pth"))
    probe = exporting.make_probe(trained, str(shapes / "val2017"))
    assert (probe.num_real, tuple(probe.images.shape), probe.origin) == (4, (8, 3, 64, 96), str(shapes / "val2017"))
