"""Looking into a network: opening it, naming its layers, feeding it photos, and the figures that show what was found."""

import dataclasses
import difflib
import math
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from deployment.weights import Trained, eval_transform, load_trained
from loading import augment
from loading.images import open_file
from run.config import Config
from run.errors import InputError, first_line

MIXER_NAMES = ("token_mixer", "mixer", "attn")  # last part of a mixer's name, in our families and in timm's
COLOR_MAP = "viridis"  # perceptually uniform, and readable in grey and to the colour-blind
DPI = 160


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode and what captions say of it: its name and where its weights come from; `trained`: what its checkpoint says of
    images, or what is usual for it."""

    label: str
    trained: Trained
    weights: str

    @property
    def net(self) -> nn.Module:
        return self.trained.net

    @property
    def is_trained(self) -> bool:
        return self.trained.source is not None

    @property
    def input_size(self) -> int | None:
        """That of the checkpoint."""
        return self.trained.input_size if self.is_trained else None

    @property
    def statistics(self) -> augment.Statistics:
        return augment.Statistics(self.trained.mean, self.trained.std)


def open_network(name: str, *, source: str | None, seed: int, change: Callable[[nn.Module], nn.Module] = nn.Module.eval, label: str | None = None) -> Network:
    """Model `name`, changed by `change`, with the weights of the checkpoint `source`, or with random ones drawn from `seed`.

    Two networks of the same seed have the same weights wherever `change` leaves them alone. InputError for unknown models and weights
    that do not fit."""
    torch.manual_seed(seed)
    trained = load_trained(name, source, change=change)
    trained.net.requires_grad_(False)
    return Network(label or name, trained, f"weights of {Path(source).name}" if source else f"untrained: random weights, seed {seed}")


def as_map(output) -> Tensor | None:
    """A layer's output as a feature map (B, C, h, w): of convolutions, of channels-last layers or of tokens; None where it is none.

    Images are square, so the two equal sides of a map tell where its channels are. Tokens (B, N, C) fill a square; those before it
    (class token, registers) are left out."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return None
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        return output[:, output.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side)) if side else None
    if output.shape[2] == output.shape[3]:
        return output
    return output.permute(0, 3, 1, 2) if output.shape[1] == output.shape[2] else None


def mixers_and_stages(net: nn.Module) -> list[str]:
    """Names of the layers that are worth a look: token mixers in order, then the stages."""
    mixers = [name for name, _ in net.named_modules() if name.rpartition(".")[2] in MIXER_NAMES]
    return mixers + [info["module"] for info in getattr(net, "feature_info", [])]


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """The module of that name. InputError with the closest names and some candidates."""
    modules = dict(net.named_modules())
    if name and name in modules:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=3)
    candidates = mixers_and_stages(net) or list(modules)[1:]
    raise InputError(
        f"--layer {name}: {type(net).__name__} has no layer of that name"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + f" Candidates: {', '.join(candidates[:8])}{', ...' if len(candidates) > 8 else ''}; `features --list-layers` prints all"
    )


def first_mixer(net: nn.Module) -> str:
    """Name of the first token mixer. InputError where no layer is called one."""
    name = next((name for name in mixers_and_stages(net) if name.rpartition(".")[2] in MIXER_NAMES), None)
    if name is None:
        raise InputError(
            f"no layer of {type(net).__name__} is called {', '.join(MIXER_NAMES[:-1])} or {MIXER_NAMES[-1]}: choose one with --layer; --list-layers prints all"
        )
    return name


def stage_layers(net: nn.Module, stages: list[int] | None) -> list[str]:
    """Names of the layers that end the given stages, counted from 0; of all stages by default. InputError where there is none."""
    ends = [info["module"] for info in getattr(net, "feature_info", [])]
    unknown = [stage for stage in stages or [] if not 0 <= stage < len(ends)]
    if unknown or not ends:
        raise InputError(f"--stage: {type(net).__name__} tells of {len(ends)} stages, counted from 0; choose layers with --layer")
    return ends if stages is None else [ends[stage] for stage in stages]


@contextmanager
def hooks(*handles):
    """Hooks that are removed at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(net: nn.Module, images: Tensor) -> None:
    """A forward pass, for its hooks. InputError where the network refuses images (B, 3, H, W) of that size."""
    try:
        net(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        side = images.shape[-1]
        raise InputError(f"--input-size {side}: {type(net).__name__} refuses images of {side} pixels ({first_line(error)}): try another size") from error


def list_layers(net: nn.Module, input_size: int) -> list[tuple[str, str, str]]:
    """(name, type, output shape without the batch) of every layer that runs, in the order of definition."""
    shapes = {}

    def note(name, module, inputs, output):
        shapes[name] = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else type(output).__name__

    modules = {name: module for name, module in net.named_modules() if name}
    with torch.no_grad(), hooks(*(module.register_forward_hook(partial(note, name)) for name, module in modules.items())):
        run(net, torch.randn(1, 3, input_size, input_size))
    return [(name, type(module).__name__, shapes[name]) for name, module in modules.items() if name in shapes]


def to_pixels(image: Tensor, values: augment.Statistics) -> Tensor:
    """An image (3, H, W) that was normalised by `values`, as colours (H, W, 3) from 0 to 1."""
    mean, std = augment.tensors_of(values, image.device)
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0)


def need_matplotlib():
    """matplotlib's figure type, and its logarithmic scale of colours; without pyplot, which would look for a screen: PNGs are drawn by Agg.

    Raises InputError without the package."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install -r requirements-plots.txt") from error
    return Figure, LogNorm


def hide_frame(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def add_caption(figure, text: str) -> None:
    """Lines of small type under the whole figure, as wide as it is."""
    letters = int(figure.get_figwidth() * 16)
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, letters)]
    figure.supxlabel("\n".join(lines), fontsize=8, color="#444444", parse_math=False)


def short_name(name: str) -> str:
    return name if len(name) <= 24 else name[:11] + "..." + name[-10:]


def load_photo(path: Path, network: Network, input_size: int) -> Tensor:
    """A photo, turned as its EXIF orientation says, as the network's evaluation sees it: (3, input_size, input_size), normalised. InputError where it
    cannot be read."""
    crop_pct = network.trained.crop_pct if network.is_trained else augment.crop_pct(Config(input_size=input_size))
    return eval_transform(dataclasses.replace(network.trained, input_size=input_size, crop_pct=crop_pct))(open_file(str(path), turns=True))


def find_photos(sources: list[str], count: int) -> list[Path]:
    """Up to `count` files, evenly spread over the photos given and those in the folders given. InputError where a folder holds none."""
    paths = []
    for source in map(Path, sources):
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS) if source.is_dir() else [source]
        if not found:
            raise InputError(f"--images {source}: no photo lies in that folder or below it ({', '.join(IMG_EXTENSIONS)})")
        paths += found
    count = min(count, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def load_inputs(network: Network, files: list[Path], input_size: int, *, count: int, seed: int) -> list[Tensor]:
    """Images (3, input_size, input_size) for a receptive field: the photos in `files`, or without any `count` of random noise drawn from `seed`."""
    if files:
        return [load_photo(path, network, input_size) for path in files]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, input_size, input_size, generator=generator) for _ in range(count)]


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def print_layers(layers: list[tuple[str, str, str]]) -> None:
    widths = [max(len(layer[column]) for layer in layers) for column in (0, 1)]
    for name, kind, shape in layers:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape}")
