"""A checkpoint as a timm model on the Hugging Face hub or in a folder, with a card of measured figures."""

import argparse
import inspect
import tempfile
from pathlib import Path

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from deployment import accuracy, options, verify, weights
from deployment.weights import Trained
from measuring import operations
from model.registration import REGISTERED
from run.errors import InputError, first_line

TEMPLATE = Path(__file__).with_name("model_card_template.md")
DATA_SETS = {"IMNET": "ImageNet-1K", "CIFAR": "CIFAR-100", "INAT": "iNaturalist 2018", "INAT19": "iNaturalist 2019", "FLOWERS": "Flowers"}
DATA_SETS |= {"DIGITS": "scikit-learn's handwritten digits"}
PAPERS = {
    "RecNeXt": "[RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations](https://arxiv.org/abs/2412.19628)",
    "RepNeXt": "[RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization](https://arxiv.org/abs/2406.16004)",
    "LSNet": "[LSNet: See Large, Focus Small](https://arxiv.org/abs/2503.23135)",
    "ReXNet": "[Rethinking Channel Dimensions for Efficient Model Design](https://arxiv.org/abs/2007.00992)",
    "RepViT": "[RepViT: Revisiting Mobile CNN From ViT Perspective](https://arxiv.org/abs/2307.09283)",
}


def _data_set(trained: Trained) -> str | None:
    """Name of the data set the checkpoint is of, as far as it tells; 1000 classes are ImageNet's."""
    key = trained.args.get("data_set", "IMNET")
    return None if key == "IMNET" and trained.num_classes != 1000 else DATA_SETS[key]


def _configuration(trained: Trained) -> dict:
    """The card's figures of the network: counted, or of its table of variants."""
    net_cls, variant = REGISTERED.get(trained.name, (None, {}))
    settings = {**_defaults(net_cls), **variant} if net_cls else {}
    net = weights.fused(trained).to("meta")
    size = trained.input_size
    return {
        "params": f"{operations.count_parameters(net) / 1e6:.1f}M",
        "macs": f"{operations.count_macs(net, (3, size, size)) / 1e9:.2g}G",
        "image_size": f"{size}x{size}",
        "embed_dim": settings.get("dims"),
        "depth": settings.get("depths"),
        "mlp_ratio": settings.get("mlp_ratio", settings.get("mlp_ratios")),
    }


def _defaults(net_cls: type) -> dict:
    parameters = inspect.signature(net_cls).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _accuracies(trained: Trained, measured: dict | None) -> list[dict]:
    """Rows of the card's table: what the run logged for these weights, and what was measured of them now."""
    prefix = "test_ema" if trained.which in ("model_ema", "state_dict_ema") else "test"
    rows = []
    if f"{prefix}_acc1" in trained.metrics:
        what = f"by the training run, after epoch {trained.epoch}"
        rows.append({"what": what, "acc1": trained.metrics[f"{prefix}_acc1"], "acc5": trained.metrics[f"{prefix}_acc5"], "num_images": None})
    if measured:
        rows.append({"what": "of these weights, before the upload", **measured})
    return rows


def build_card(trained: Trained, source: str, measured: dict | None) -> ModelCard:
    """The model card: our template, filled with what is known. `source` is what timm loads it by."""
    data_set = _data_set(trained)
    accuracies = _accuracies(trained, measured)
    results = [
        EvalResult(task_type="image-classification", dataset_type="imagenet-1k", dataset_name=data_set, metric_type="accuracy", metric_value=row["acc1"])
        for row in accuracies[-1:]
        if data_set == "ImageNet-1K"
    ]
    card_data = ModelCardData(
        language="en", license="apache-2.0", library_name="timm", pipeline_tag="image-classification", metrics=["accuracy"], model_name=trained.name,
        datasets=["imagenet-1k"] if data_set == "ImageNet-1K" else None, eval_results=results or None,
        tags=["vision", "image-classification", "pytorch", "timm"],
    )  # fmt: skip
    series = trained.name.partition("_")[2][:1].upper()
    return ModelCard.from_template(
        card_data, template_path=str(TEMPLATE), model_name=trained.name, distillation=weights.distillation(trained) in ("soft", "hard"),
        series=series if series.isalpha() else None, config=_configuration(trained), dataset=data_set, weights=weights.describe_weights(trained),
        paper=next((paper for family, paper in PAPERS.items() if trained.name.startswith(family.lower())), None), num_classes=trained.num_classes,
        has_names=trained.class_names is not None, accuracies=accuracies, source=source,
    )  # fmt: skip


def _label_config(trained: Trained) -> dict:
    """Class names for timm's configuration, with ImageNet's words where they are its folders; the tag of other, published weights goes."""
    config = {"pretrained_cfg": {"tag": ""}}
    if trained.class_names is None:
        return config
    info = ImageNetInfo()
    words = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    descriptions = {name: words[name] for name in trained.class_names if name in words}
    return {**config, "label_names": trained.class_names, **({"label_descriptions": descriptions} if descriptions else {})}


def write_folder(trained: Trained, folder: Path, card: ModelCard) -> None:
    """Weights, configuration and card in `folder`; InputError where timm does not load the checkpoint's logits from it."""
    size, chans = trained.input_size, 3
    preprocessing = {"input_size": (chans, size, size), "mean": trained.mean, "std": trained.std, "crop_pct": trained.crop_pct}
    preprocessing |= {"crop_mode": trained.crop_mode, "interpolation": trained.interpolation}
    save_for_hf(trained.net, str(folder), model_config=_label_config(trained), safe_serialization=True, data_config=preprocessing)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    probe = verify.make_probe(trained)
    with torch.no_grad():
        if not torch.equal(again(probe.images), probe.reference):
            raise InputError(f"timm loads other logits from {folder} than the checkpoint's: {trained.name} cannot be uploaded")


def push(folder: Path, repo_id: str, *, is_private: bool) -> str:
    """Upload the folder's files; the address. InputError where the hub is out of reach or refuses."""
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"{repo_id}: weights, configuration and card")
    except Exception as error:  # the hub's client raises many kinds, all of which mean: not uploaded
        raise InputError(f"{repo_id} was not uploaded ({first_line(error)}): log in with `hf auth login`, check the name and the network") from error
    return str(address)


def upload(args: argparse.Namespace, trained: Trained) -> list[str]:
    """Write the folder and put it in place or upload it; what to say of it."""
    measured = accuracy.measure(args, trained, args.ckpt, use_ema=args.use_ema) if options.has_data(args) else None
    card = build_card(trained, f"hf-hub:{args.repo_id}" if args.repo_id else f"local-dir:{args.dry_run}", measured)
    said = f"{trained.name}, {weights.describe_weights(trained)}: timm loads the checkpoint's logits from the folder, bit for bit"
    if args.dry_run:
        target = Path(args.dry_run)
        with verify.staging(target) as folder:
            write_folder(trained, folder / target.name, card)
            verify.put(folder / target.name, target)
        return [said, f"{target}: model.safetensors, config.json, README.md; load with timm.create_model('local-dir:{target}', pretrained=True)"]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(trained, Path(folder), card)
        address = push(Path(folder), args.repo_id, is_private=args.private)
    return [said, f"{address}: load with timm.create_model('hf-hub:{args.repo_id}', pretrained=True)"]
