"""Pictures of what a network sees: the branches of a token mixer, and effective receptive fields."""

import argparse
import difflib
import itertools
import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading.augment import MEAN, SMALL_INPUT, STD, eval_transform
from loading.images import open_file
from model.mixers import RecConv2d
from model.repnext import ChunkConv
from run import checkpoint
from run.config import Config
from run.errors import InputError, first_line
from run.network import build as build_network

PLAIN = "plain7x7"
MIXER_NAMES = ("token_mixer", "mixer", "attn")  # last part of a mixer's name, in our families and in timm's
BRANCH_NAMES = {"conv_s": "small branch", "conv_m": "medium branch", "conv_l": "large branch"}  # as the RepNeXt README calls them
COLOR_MAP = "viridis"  # perceptually uniform, and readable in grey and to the colour-blind
TILE_RANGE = (0.01, 0.99)  # quantiles of a feature map that become its darkest and its brightest colour: borders often stick out
AREA_SHARES = (50, 90, 99)  # percent of the gradient
ERF_DECADES = 5  # powers of ten that the colours of a receptive field span
DPI = 160
Maps = list[tuple[str, Tensor]]  # (name, (C, h, w)), in the order in which they are computed


# ---- networks and their layers


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode and what captions say of it: its name and where its weights come from."""

    label: str
    net: nn.Module
    weights: str
    is_trained: bool
    input_size: int | None = None  # that of the checkpoint


def plain_7x7(net: nn.Module) -> nn.Module:
    """`net`, with a biased depthwise 7x7 convolution in place of every RecConv2d; changed in place. InputError where it has none."""
    mixers = {name: module for name, module in net.named_modules() if isinstance(module, RecConv2d)}
    if not mixers:
        raise InputError(
            f"--against {PLAIN} replaces recursive convolutions, of which this --model has none: name another model with --against, or a RecNeXt-M"
        )
    for name, mixer in mixers.items():
        dim = mixer.down.in_channels
        net.set_submodule(name, nn.Conv2d(dim, dim, 7, padding=3, groups=dim))
    return net


def count_classes(name: str, stored: dict, state: dict[str, Tensor]) -> int:
    """Classes of the head whose weights are in a checkpoint; 1000 where it does not tell."""
    if stored.get("class_names"):
        return len(stored["class_names"])
    classifier = get_pretrained_cfg_value(name, "classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    return next((len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state), 1000)


def open_network(name: str, *, source: str | None, seed: int, change: Callable[[nn.Module], nn.Module] = nn.Module.eval, label: str | None = None) -> Network:
    """Model `name`, changed by `change`, with the weights of the checkpoint `source`, or with random ones drawn from `seed`.

    Two networks of the same seed have the same weights wherever `change` leaves them alone. InputError for unknown models and weights
    that do not fit."""
    stored = checkpoint.read(source) if source else {}
    state = checkpoint.weights(stored, where=source) if source else {}
    num_classes = count_classes(name, stored, state) if source else 1000
    torch.manual_seed(seed)
    net = change(build_network(Config(model=name), num_classes, distillation=any("_dist" in key for key in state)))
    if source:
        checkpoint.load_weights(net, state, where=source)
    weights = f"weights of {Path(source).name}" if source else f"untrained: random weights, seed {seed}"
    return Network(label or name, net.eval().requires_grad_(False), weights, bool(source), stored.get("input_size"))


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


# ---- what the branches of a layer see


def parts_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The direct children of a layer by name; of lists and dicts of modules, which do not run themselves, their members."""
    parts = {}
    for name, child in layer.named_children():
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        parts |= {f"{name}.{key}": member for key, member in child.named_children()} if is_container else {name: child}
    return parts


def record(net: nn.Module, layer: nn.Module, image: Tensor) -> Maps:
    """The layer's input, what its parts give, and its output, for an image (3, H, W); one map per call, those that are no maps left out."""
    maps = []

    def note(name: str, output) -> None:
        feature_map = as_map(output)
        if feature_map is not None and len(feature_map) == 1:
            maps.append((name, feature_map[0].clone()))  # layers after it may work in place

    parts = parts_of(layer)
    handles = [layer.register_forward_pre_hook(lambda module, inputs: note("input", inputs[0]) if inputs else None)]
    handles += [part.register_forward_hook(lambda module, inputs, output, name=name: note(name, output)) for name, part in parts.items()]
    handles += [layer.register_forward_hook(lambda module, inputs, output: note("output", output))]
    with torch.no_grad(), hooks(*handles):
        run(net, image.unsqueeze(0))
    return maps


def branches(net: nn.Module, layer_name: str, image: Tensor) -> Maps:
    """What each branch of a layer gives for an image (3, H, W), as (name, (C, h, w)).

    Of RepNeXt's ChunkConv: identity, small, medium and large branch, which together are its output. Of other layers: the input, the output
    of each child and each call of it, the layer's output; a map equal to the one before is left out. InputError where there are no maps."""
    layer = find_layer(net, layer_name)
    maps = record(net, layer, image)
    if isinstance(layer, ChunkConv):
        (_, entering), *parts, _ = maps
        return [("identity", entering.chunk(4)[0]), *((BRANCH_NAMES[name], part) for name, part in parts)]
    if not any(name != "input" for name, _ in maps):
        raise InputError(f"--layer {layer_name} gives no feature map of its own: --list-layers prints each layer's output shape")
    kept = [one for i, one in enumerate(maps) if i == 0 or not torch.equal(one[1], maps[i - 1][1])]
    return _numbered([(BRANCH_NAMES.get(name, name), feature_map) for name, feature_map in kept])


def _numbered(maps: Maps) -> Maps:
    """Names that come several times, as of a convolution that all levels share, get the number of the call."""
    totals, seen = Counter(name for name, _ in maps), Counter()
    numbered = []
    for name, feature_map in maps:
        seen[name] += 1
        numbered.append((f"{name}, call {seen[name]}" if totals[name] > 1 else name, feature_map))
    return numbered


def mean_activation(feature_map: Tensor) -> Tensor:
    """Mean absolute activation over the channels: (C, h, w) -> (h, w)."""
    return feature_map.abs().mean(0)


def strongest_channels(feature_map: Tensor, count: int) -> list[int]:
    """Indices of up to `count` channels of (C, h, w) with the largest mean absolute activation, largest first."""
    return feature_map.abs().mean((1, 2)).topk(min(count, len(feature_map))).indices.tolist()


def tile(plane: Tensor, side: int) -> Tensor:
    """(h, w) for display: enlarged bilinearly to (side, side), its TILE_RANGE stretched to 0 ... 1."""
    low, high = torch.quantile(plane.flatten(), torch.tensor(TILE_RANGE))
    stretched = ((plane - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return interpolate(stretched[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]


def tile_rows(maps: Maps, num_channels: int | None, side: int) -> list[list[tuple[str, Tensor]]]:
    """Rows of captioned tiles (side, side) for one photo: one row of means, or a row for each of the `num_channels` strongest channels."""
    if num_channels is None:
        return [[("", tile(mean_activation(feature_map), side)) for _, feature_map in maps]]
    rows = [[] for _ in range(min(num_channels, max(len(feature_map) for _, feature_map in maps)))]
    for _, feature_map in maps:
        channels = strongest_channels(feature_map, len(rows))
        for row, channel in zip(rows, channels, strict=False):
            row.append((f"channel {channel}", tile(feature_map[channel].abs(), side)))
    return rows


def to_pixels(image: Tensor) -> Tensor:
    """A normalised image (3, H, W) as colours (H, W, 3) from 0 to 1."""
    return (image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1).permute(1, 2, 0)


# ---- effective receptive field


def central_gradients(net: nn.Module, layers: list[str], image: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
    """For each layer, how much the centre of its output depends on each pixel, (H, W), and the output's sides (h, w).

    The absolute gradient of the output at (h // 2, w // 2), summed over its channels, with respect to the image (3, H, W), summed over
    the image's. A layer that runs several times counts with its last call. InputError where one gives no map or depends on nothing.
    Source: Luo et al., Understanding the Effective Receptive Field (arXiv:1701.04128)."""
    centres = {}

    def note(name: str, module, inputs, output) -> None:
        feature_map = as_map(output)
        if feature_map is not None and len(feature_map) == 1:
            height, width = feature_map.shape[2:]
            centres[name] = feature_map[0, :, height // 2, width // 2].sum(), (height, width)

    pixels = image.unsqueeze(0).requires_grad_(True)
    with hooks(*(find_layer(net, name).register_forward_hook(partial(note, name)) for name in layers)):
        run(net, pixels)
    fields = []
    for name in layers:
        if name not in centres:
            raise InputError(f"--layer {name} gives no feature map of its own: `features --list-layers` prints each layer's output shape")
        centre, sides = centres[name]
        gradient = torch.autograd.grad(centre, pixels, retain_graph=True, allow_unused=True)[0] if centre.requires_grad else None
        if gradient is None or not 0 < gradient.abs().sum() < math.inf:
            raise InputError(f"the centre of {name} has no finite gradient other than 0: check the weights, or choose another --layer")
        fields.append((gradient[0].abs().sum(0), sides))
    return fields


def receptive_fields(net: nn.Module, layers: list[str], images: list[Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
    """Means of `central_gradients` over images (3, H, W): for each layer (H, W), and the sides of its output."""
    per_image = [central_gradients(net, layers, image) for image in images]
    return [(torch.stack([field for field, _ in of_layer]).mean(0), of_layer[0][1]) for of_layer in zip(*per_image, strict=True)]


def area_share(field: Tensor, percent: float) -> float:
    """Percent of the area of (H, W) that the fewest pixels take which hold `percent` % of its sum."""
    held = field.flatten().double().sort(descending=True).values.cumsum(0)
    num_pixels = int((held < held[-1] * percent / 100).sum()) + 1
    return 100 * num_pixels / field.numel()


# ---- figures


def need_matplotlib():
    """matplotlib's figure type, and its logarithmic scale of colours; without pyplot, which would look for a screen: PNGs are drawn by Agg.

    Raises InputError without the package."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install -r requirements-plots.txt") from error
    return Figure, LogNorm


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _caption(figure, text: str) -> None:
    """Lines of small type under the whole figure, as wide as it is."""
    letters = int(figure.get_figwidth() * 16)
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, letters)]
    figure.supxlabel("\n".join(lines), fontsize=8, color="#444444", parse_math=False)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:11] + "..." + name[-10:]


@dataclass(frozen=True)
class PhotoMaps:
    """A photo's name, its normalised form (3, H, W) and what the branches give for it."""

    name: str
    image: Tensor
    maps: Maps


def draw_features(photos: list[PhotoMaps], *, num_channels: int | None, caption: str, out: Path) -> None:
    """A grid: a row per photo (and channel), the original and a column per branch."""
    figure_type, _ = need_matplotlib()
    side = photos[0].image.shape[-1]
    rows = [(photo, row, i == 0) for photo in photos for i, row in enumerate(tile_rows(photo.maps, num_channels, side))]
    num_columns = 1 + len(photos[0].maps)
    figure = figure_type(figsize=(max(1.75 * num_columns, 4), (1.85 if num_channels else 1.67) * len(rows) + 0.95), layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False)
    for axes_row, (photo, tiles, is_first) in zip(grid, rows, strict=True):
        for axes in axes_row:
            _bare(axes)
        if is_first:
            axes_row[0].imshow(to_pixels(photo.image).numpy())
            axes_row[0].set_ylabel(_short(photo.name), fontsize=8, parse_math=False)
        for axes, (text, plane) in zip(axes_row[1:], tiles, strict=False):
            axes.imshow(plane.numpy(), cmap=COLOR_MAP, vmin=0, vmax=1)
            axes.set_xlabel(text, fontsize=7)
    headings = ["original\n"] + [f"{name}\n{'x'.join(map(str, feature_map.shape))}" for name, feature_map in photos[0].maps]
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=9)
    _caption(figure, caption)
    figure.savefig(out, dpi=DPI, facecolor="white")


@dataclass(frozen=True)
class Field:
    """A network's effective receptive field (H, W) at a layer whose output has the given sides."""

    network: Network
    layer: str
    field: Tensor
    output_sides: tuple[int, int]

    def shares(self) -> dict[str, float]:
        """Percent of the area that holds so many percent of the gradient."""
        return {str(percent): round(area_share(self.field, percent), 3) for percent in AREA_SHARES}


def shares_text(field: Field) -> str:
    areas = " / ".join(f"{area:.3g}" for area in field.shares().values())
    return f"{' / '.join(map(str, AREA_SHARES))} % of the gradient\nin {areas} % of the area"


def draw_fields(rows: list[list[Field]], *, caption: str, out: Path) -> None:
    """A grid: a row per network and a column per layer, or, for one layer, the networks side by side.

    All in the same logarithmic colours, relative to each picture's largest gradient."""
    figure_type, log_norm = need_matplotlib()
    if len(rows[0]) == 1:
        rows = [[field for (field,) in rows]]
    figure = figure_type(figsize=(max(2.9 * len(rows[0]) + 1.0, 4.2), 3.55 * len(rows) + 1.0), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    norm = log_norm(vmin=10.0**-ERF_DECADES, vmax=1.0, clip=True)
    for axes, field in zip(grid.flat, itertools.chain(*rows), strict=True):
        _bare(axes)
        picture = axes.imshow((field.field / field.field.max()).numpy(), cmap=COLOR_MAP, norm=norm, interpolation="nearest")
        heading = f"{field.network.label}\n{field.layer} ({'x'.join(map(str, field.output_sides))})"
        axes.set_title(heading, fontsize=9, parse_math=False)
        axes.set_xlabel(shares_text(field), fontsize=8)
    bar = figure.colorbar(picture, ax=grid, shrink=0.6, pad=0.02)
    bar.set_label("gradient, as a share of the picture's largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _caption(figure, caption)
    figure.savefig(out, dpi=DPI, facecolor="white")


# ---- commands


def load_photo(path: Path, input_size: int) -> Tensor:
    """A photo as evaluation sees it: (3, input_size, input_size), normalised. InputError where it cannot be read."""
    return eval_transform(input_size, 1.0 if input_size <= SMALL_INPUT else 0.875)(open_file(str(path)))


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


def load_inputs(args: argparse.Namespace, input_size: int) -> tuple[list[Tensor], list[str], str]:
    """Images (3, input_size, input_size) for a receptive field, their files (none of random noise), and what they are, for the caption."""
    if not args.images:
        generator = torch.Generator().manual_seed(args.seed)
        images = [torch.randn(3, input_size, input_size, generator=generator) for _ in range(args.num_images)]
        return images, [], f"{_count(len(images), 'image')} of random noise (no --images given)"
    paths = find_photos(args.images, args.num_images)
    return [load_photo(path, input_size) for path in paths], list(map(str, paths)), _count(len(paths), "photo")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def check_out(name: str) -> Path:
    """Where to draw. InputError for other suffixes than .png and folders that are not there."""
    out = Path(name).expanduser()
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {name}: pictures are written as PNG; end the name in .png")
    if not out.parent.is_dir():
        raise InputError(f"--out {name}: there is no folder {out.parent}; create it first")
    return out


def print_layers(layers: list[tuple[str, str, str]]) -> None:
    widths = [max(len(layer[column]) for layer in layers) for column in (0, 1)]
    for name, kind, shape in layers:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape}")


def run_features(args: argparse.Namespace) -> None:
    if not args.list_layers and not (args.photos and args.out):
        raise InputError("features needs photos and --out FILE.png, or --list-layers")
    network = open_network(args.model, source=args.checkpoint, seed=args.seed)
    input_size = args.input_size or network.input_size or 224
    if args.list_layers:
        print_layers(list_layers(network.net, input_size))
    else:
        show_features(args, network, input_size)


def show_features(args: argparse.Namespace, network: Network, input_size: int) -> None:
    need_matplotlib()
    out = check_out(args.out)
    layer = args.layer or first_mixer(network.net)
    images = [load_photo(path, input_size) for path in args.photos]
    photos = [PhotoMaps(path.name, image, branches(network.net, layer, image)) for path, image in zip(args.photos, images, strict=True)]
    reduction = "mean absolute activation over the branch's channels"
    if args.channels:
        reduction = f"absolute activation of a branch's {_count(args.channels, 'strongest channel')} for the photo (largest mean), strongest first"
    caption = (
        f"{network.label}, {layer} ({network.weights}). Each picture: {reduction}, enlarged bilinearly to {input_size} x {input_size}; "
        f"dark to bright: from its own {100 * TILE_RANGE[0]:.0f}st to {100 * TILE_RANGE[1]:.0f}th percentile."
    )
    draw_features(photos, num_channels=args.channels, caption=caption, out=out)
    for name, feature_map in photos[0].maps:
        print(f"{name:<20} {'x'.join(map(str, feature_map.shape))}")
    print(f"{out}: {layer} for {_count(len(photos), 'photo')}")


def open_networks(args: argparse.Namespace) -> list[Network]:
    """The network of --model and, with --against, its rival: the plain 7x7 twin or another model."""
    if args.against_checkpoint and not args.against:
        raise InputError("--against-checkpoint needs --against: it holds the other network's weights")
    networks = [open_network(args.model, source=args.checkpoint, seed=args.seed)]
    if args.against == PLAIN:
        label = f"{args.model} with plain 7x7 mixers"
        networks.append(open_network(args.model, source=args.against_checkpoint, seed=args.seed, change=plain_7x7, label=label))
    elif args.against:
        networks.append(open_network(args.against, source=args.against_checkpoint, seed=args.seed))
    return networks


def training_note(networks: list[Network]) -> str:
    """What a reader must know about the weights before drawing conclusions."""
    trained = [network.is_trained for network in networks]
    if all(trained):
        return "Trained weights."
    if any(trained):
        return "Only one of the two networks is trained: the pictures differ for that reason too."
    return "Untrained weights: this shows what the architecture alone makes likely, not what training makes of it."


def run_erf(args: argparse.Namespace) -> None:
    need_matplotlib()
    out = check_out(args.out)
    networks = open_networks(args)
    input_size = args.input_size or networks[0].input_size or 224
    images, files, source = load_inputs(args, input_size)
    rows = []
    for network in networks:
        layers = args.layer or stage_layers(network.net, args.stage)
        found = receptive_fields(network.net, layers, images)
        rows.append([Field(network, layer, field, sides) for layer, (field, sides) in zip(layers, found, strict=True)])
        for field in rows[-1]:
            print(f"{network.label}, {field.layer} ({network.weights}): {' '.join(shares_text(field).splitlines())}", flush=True)
    note = training_note(networks)
    weights = "\n".join(f"{network.label}: {network.weights}." for network in networks)
    caption = (
        f"Effective receptive field: absolute gradient of the central output position, summed over channels, mean over {source}, {input_size} pixels a side.\n"
        f"{weights}\n{note}"
    )
    draw_fields(rows, caption=caption, out=out)
    report = {"input_size": input_size, "num_images": len(images), "files": files, "seed": args.seed, "note": note}
    report["fields"] = [describe(field) for row in rows for field in row]
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{source}. {note}\n{out}, {out.with_suffix('.json')}")


def describe(field: Field) -> dict:
    """A receptive field's figures, for JSON; `area_percent` by percent of the gradient."""
    height, width = field.output_sides
    return {
        "network": field.network.label,
        "layer": field.layer,
        "weights": field.network.weights,
        "n_parameters": sum(parameter.numel() for parameter in field.network.net.parameters()),
        "output_size": [height, width],
        "output_position": [height // 2, width // 2],
        "area_percent": field.shares(),
    }
