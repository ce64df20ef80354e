"""Forms in which a network is timed: eager, channels-last, compiled, ONNX Runtime in float32 and int8, ExecuTorch."""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deployment import executorch, formats, quantised
from deployment.verify import calibration_images, write_verified
from deployment.weights import Trained
from run.errors import InputError
from run.hardware import pick_amp

Call = Callable[[], Tensor]
FORMS = ("eager", "channels_last", "compiled")
NUM_CALIBRATION = 16  # images
Builder = Callable[[Trained, nn.Module, "Images"], Call]  # the trained network, its fused form on the device, images -> what is timed


class Images:
    """Random images on a device, the same numbers in every run; one batch of each size and layout, for all models together."""

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size = batch_size
        self.device = device
        self._made: dict[tuple, Tensor] = {}

    def get(self, input_size: int | tuple[int, int], memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """(batch_size, 3, height, width), standard normal; `input_size` is both sides, or the two of them."""
        key = (input_size, memory_format)
        if key not in self._made:
            generator = torch.Generator(self.device).manual_seed(0)
            sides = (input_size, input_size) if isinstance(input_size, int) else input_size
            images = torch.randn(self.batch_size, 3, *sides, generator=generator, device=self.device)
            self._made[key] = images.contiguous(memory_format=memory_format)
        return self._made[key]


def forward(net: nn.Module, images: Tensor, amp_dtype: torch.dtype | None) -> Tensor:
    """Logits, without what training would need."""
    with torch.inference_mode(), torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        return net(images)


def build_form(trained: Trained, net: nn.Module, images: Images, *, form: str, amp: str) -> Call:
    """One inference of `net`, the fused form of `trained`, in the torch form `form`, ready to be repeated; `net` itself stays as it is."""
    memory_format = torch.channels_last if form == "channels_last" else torch.contiguous_format
    if form == "channels_last":
        net = copy.deepcopy(net).to(memory_format=memory_format)
    elif form == "compiled":
        net = torch.compile(net, dynamic=False)
    return functools.partial(forward, net, images.get(trained.input_size, memory_format), pick_amp(amp, images.device))


def torch_builders(amp: str) -> dict[str, Builder]:
    return {form: functools.partial(build_form, form=form, amp=amp) for form in FORMS}


def build_onnxruntime(trained: Trained, net: nn.Module, images: Images, *, threads: int, is_int8: bool = False) -> Call:
    """One inference by ONNX Runtime of the network's verified export, with `threads` threads in each operator, on the CPU.

    With `is_int8`, of the quantised one, calibrated on a few digits: how long it takes does not depend on the ranges."""
    if images.device.type != "cpu":
        raise InputError("ONNX Runtime is measured on the CPU alone")
    onnxruntime = formats.require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        write_verified(trained, path, quantised.build_format(calibration_images(trained, None, NUM_CALIBRATION)[0]) if is_int8 else formats.ONNX)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.get(trained.input_size).numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def build_executorch(trained: Trained, net: nn.Module, images: Images, *, threads: int) -> Call:
    """One inference by ExecuTorch's XNNPACK of the network's verified program, with `threads` threads, on the CPU."""
    if images.device.type != "cpu" or images.batch_size != 1:
        raise InputError("ExecuTorch is measured on the CPU alone, on one image")
    executorch.set_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pte"
        write_verified(trained, path, executorch.PROGRAM)
        run = executorch.open_program(path, trained).run
    return functools.partial(run, images.get(trained.input_size))
