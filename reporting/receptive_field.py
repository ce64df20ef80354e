"""Effective receptive fields: where in the image a central output looks."""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from model.mixers import RecConv2d
from reporting.inspection import (
    COLOR_MAP,
    DPI,
    Network,
    add_caption,
    as_map,
    count_of,
    find_layer,
    find_photos,
    hide_frame,
    hooks,
    load_inputs,
    need_matplotlib,
    open_network,
    run,
    stage_layers,
)
from reporting.plots import checked_path
from run.errors import InputError

PLAIN = "plain7x7"
AREA_SHARES = (50, 90, 99)  # percent of the gradient
ERF_DECADES = 5  # powers of ten that the colours of a receptive field span


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
        hide_frame(axes)
        picture = axes.imshow((field.field / field.field.max()).numpy(), cmap=COLOR_MAP, norm=norm, interpolation="nearest")
        heading = f"{field.network.label}\n{field.layer} ({'x'.join(map(str, field.output_sides))})"
        axes.set_title(heading, fontsize=9, parse_math=False)
        axes.set_xlabel(shares_text(field), fontsize=8)
    bar = figure.colorbar(picture, ax=grid, shrink=0.6, pad=0.02)
    bar.set_label("gradient, as a share of the picture's largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    add_caption(figure, caption)
    figure.savefig(out, dpi=DPI, facecolor="white")


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
    out = checked_path(args.out, flag="--out", endings=(".png",))
    networks = open_networks(args)
    input_size = args.input_size or networks[0].input_size or 224
    files = find_photos(args.images, args.num_images) if args.images else []
    source = count_of(len(files), "photo") if files else f"{count_of(args.num_images, 'image')} of random noise (no --images given)"
    rows = []
    for network in networks:
        layers = args.layer or stage_layers(network.net, args.stage)
        found = receptive_fields(network.net, layers, load_inputs(network, files, input_size, count=args.num_images, seed=args.seed))
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
    report = {"input_size": input_size, "num_images": len(files) or args.num_images, "files": list(map(str, files)), "seed": args.seed, "note": note}
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
