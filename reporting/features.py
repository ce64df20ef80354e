"""Pictures of what a network sees: the branches of a token mixer, and effective receptive fields."""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from model.repnext import ChunkConv
from reporting.inspection import (
    COLOR_MAP,
    DPI,
    Network,
    add_caption,
    as_map,
    count_of,
    find_layer,
    first_mixer,
    hide_frame,
    hooks,
    list_layers,
    load_photo,
    need_matplotlib,
    open_network,
    print_layers,
    run,
    short_name,
    to_pixels,
)
from reporting.plots import checked_path
from run.errors import InputError

BRANCH_NAMES = {"conv_s": "small branch", "conv_m": "medium branch", "conv_l": "large branch"}  # as the RepNeXt README calls them
TILE_RANGE = (0.01, 0.99)  # quantiles of a feature map that become its darkest and its brightest colour: borders often stick out
Maps = list[tuple[str, Tensor]]  # (name, (C, h, w)), in the order in which they are computed


# ---- networks and their layers


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


# ---- effective receptive field


# ---- figures


@dataclass(frozen=True)
class PhotoMaps:
    """A photo's name, its colours as the network sees it, (H, W, 3) from 0 to 1, and what the branches give for it."""

    name: str
    colors: Tensor
    maps: Maps


def draw_features(photos: list[PhotoMaps], *, num_channels: int | None, caption: str, out: Path) -> None:
    """A grid: a row per photo (and channel), the original and a column per branch."""
    figure_type, _ = need_matplotlib()
    side = photos[0].colors.shape[0]
    rows = [(photo, row, i == 0) for photo in photos for i, row in enumerate(tile_rows(photo.maps, num_channels, side))]
    num_columns = 1 + len(photos[0].maps)
    figure = figure_type(figsize=(max(1.75 * num_columns, 4), (1.85 if num_channels else 1.67) * len(rows) + 0.95), layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False)
    for axes_row, (photo, tiles, is_first) in zip(grid, rows, strict=True):
        for axes in axes_row:
            hide_frame(axes)
        if is_first:
            axes_row[0].imshow(photo.colors.numpy())
            axes_row[0].set_ylabel(short_name(photo.name), fontsize=8, parse_math=False)
        for axes, (text, plane) in zip(axes_row[1:], tiles, strict=False):
            axes.imshow(plane.numpy(), cmap=COLOR_MAP, vmin=0, vmax=1)
            axes.set_xlabel(text, fontsize=7)
    headings = ["original\n"] + [f"{name}\n{'x'.join(map(str, feature_map.shape))}" for name, feature_map in photos[0].maps]
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=9)
    add_caption(figure, caption)
    figure.savefig(out, dpi=DPI, facecolor="white")


# ---- commands


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
    out = checked_path(args.out, flag="--out", endings=(".png",))
    layer = args.layer or first_mixer(network.net)
    images = [load_photo(path, network, input_size) for path in args.photos]
    photos = [
        PhotoMaps(path.name, to_pixels(image, network.statistics), branches(network.net, layer, image)) for path, image in zip(args.photos, images, strict=True)
    ]
    reduction = "mean absolute activation over the branch's channels"
    if args.channels:
        reduction = f"absolute activation of a branch's {count_of(args.channels, 'strongest channel')} for the photo (largest mean), strongest first"
    caption = (
        f"{network.label}, {layer} ({network.weights}). Each picture: {reduction}, enlarged bilinearly to {input_size} x {input_size}; "
        f"dark to bright: from its own {100 * TILE_RANGE[0]:.0f}st to {100 * TILE_RANGE[1]:.0f}th percentile."
    )
    draw_features(photos, num_channels=args.channels, caption=caption, out=out)
    for name, feature_map in photos[0].maps:
        print(f"{name:<20} {'x'.join(map(str, feature_map.shape))}")
    print(f"{out}: {layer} for {count_of(len(photos), 'photo')}")
