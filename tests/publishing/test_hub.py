"""The folder that goes to the hub: timm loads the checkpoint's logits from it, and its card says what was measured."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import upload
from deployment import weights
from publishing import hub
from run import command
from run.errors import InputError
from tests.deployment.test_verify import make_trained
from tests.publishing.test_publish import run_folder  # noqa: F401  (a fixture)

CHECKPOINT = "pretrain/checkpoint_best.pth"


def test_timm_loads_the_checkpoints_logits_from_the_folder(run_folder, capsys):  # noqa: F811
    upload.run(["--model", "recnext_m0", "--ckpt", CHECKPOINT, "--dry-run", "hub/net"])
    assert "bit for bit" in capsys.readouterr().out
    assert sorted(path.name for path in (run_folder / "hub").rglob("*")) == ["README.md", "config.json", "model.safetensors", "net"]
    trained = weights.load_trained("recnext_m0", CHECKPOINT)
    again = timm.create_model("local-dir:hub/net", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), trained.net(x))
    config = json.loads((run_folder / "hub/net/config.json").read_text())
    assert config["label_names"] == ["0", "1", "2", "3"] and config["num_classes"] == 4 and config["architecture"] == "recnext_m0"
    data = timm.data.resolve_model_data_config(again)
    assert (data["input_size"], data["crop_pct"], tuple(data["mean"]), data["interpolation"]) == ((3, 32, 32), 1.0, (0.485, 0.456, 0.406), "bicubic")


@pytest.mark.parametrize("name", ["lsnet_t", "rexnetv1_1_0", "mlla_nano_recconv"])
def test_other_families_survive_the_way_through_timm(name, tmp_path):
    """With a distillation head that only exists when asked for, and an image size that weights depend on."""
    trained = make_trained(name, tmp_path)
    hub.write_folder(trained, tmp_path / "hub", hub.build_card(trained, "hf-hub:a/b", None))
    assert (tmp_path / "hub" / "model.safetensors").is_file()


def test_card_says_what_is_known_and_no_more(run_folder, digits_folder, capsys):  # noqa: F811
    upload.run(["--ckpt", CHECKPOINT, "--dry-run", "hub/net", "--repo_id", "me/recnext_m0", "--data_path", str(digits_folder)])
    card = ModelCard.load("hub/net/README.md")
    front = card.data.to_dict()
    assert (front["library_name"], front["pipeline_tag"], front["license"], front["model_name"]) == ("timm", "image-classification", "apache-2.0", "recnext_m0")
    assert "datasets" not in front and "model-index" not in front  # four classes are not ImageNet
    text = card.text
    assert "Model Card for recnext_m0 (With Knowledge Distillation)" in text
    assert "**Parameters**: 2.2M (fused)" in text and "**Image Size**: 32x32" in text and "(40, 80, 160, 320)" in text and "**MLP Ratio**: 2" in text
    assert "| by the training run, after epoch 2 |  | 30.00 |" in text
    assert "| of these weights, before the upload | 40 | " in text
    assert 'timm.create_model("hf-hub:me/recnext_m0", pretrained=True)' in text and "import model  # registers" in text
    assert "Latency" not in text and "N/A" not in text and "None" not in text and "{{" not in text and "{%" not in text


def test_card_of_published_weights_is_imagenets(tmp_path):
    net = weights.load_trained("recnext_a0", None).net
    torch.save({"model": net.state_dict()}, tmp_path / "recnext_a0_distill_300e.pth")
    trained = weights.load_trained("recnext_a0", str(tmp_path / "recnext_a0_distill_300e.pth"))
    card = hub.build_card(trained, "hf-hub:a/b", {"acc1": 75.0, "acc5": 92.0, "num_images": 50000})
    front = card.data.to_dict()
    assert front["datasets"] == ["imagenet-1k"] and front["metrics"] == ["accuracy"]
    assert card.data.eval_results[0].metric_value == 75.0
    assert "**Dataset**: ImageNet-1K" in card.text and "**Model Series**: A" in card.text
    assert "| of these weights, before the upload | 50000 | 75.00 | 92.00 |" in card.text
    unmeasured = hub.build_card(trained, "hf-hub:a/b", None)
    assert "Accuracy" not in unmeasured.text and unmeasured.data.eval_results is None
    assert "params" not in unmeasured.text and "2.8M" in unmeasured.text


def test_push_sends_the_folder_to_the_hub(run_folder, monkeypatch, capsys):  # noqa: F811
    sent = []

    class StandIn:
        def create_repo(self, repo_id, *, private, exist_ok):
            sent.append((repo_id, private, exist_ok))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            again = timm.create_model(f"local-dir:{folder_path}", pretrained=True)
            sent.append((repo_id, again.num_classes))

    monkeypatch.setattr(hub, "HfApi", StandIn)
    upload.run(["--ckpt", CHECKPOINT, "--repo-id", "me/net", "--private"])
    assert sent == [("me/net", True, True), ("me/net", 4)]
    assert "https://hub/me/net" in capsys.readouterr().out
    assert not [path for path in run_folder.iterdir() if path.name.startswith(".")]


def test_hub_out_of_reach_gives_one_line(run_folder, monkeypatch, capsys):  # noqa: F811
    class Unreachable:
        def create_repo(self, *args, **kwargs):
            raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    assert command.run_command(upload.run, ["--ckpt", CHECKPOINT, "--repo-id", "me/net"]) == 1
    assert capsys.readouterr().err == "error: me/net was not uploaded (no route to host): log in with `hf auth login`, check the name and the network\n"


def test_what_timm_would_load_otherwise_is_refused(run_folder, monkeypatch):  # noqa: F811
    real = hub.save_for_hf

    def save_another(net, *args, **kwargs):
        net.stem.stem[0].conv.weight.data[0] *= 1.001
        real(net, *args, **kwargs)
        net.stem.stem[0].conv.weight.data[0] /= 1.001

    monkeypatch.setattr(hub, "save_for_hf", save_another)
    with pytest.raises(InputError, match="timm loads other logits"):
        upload.run(["--ckpt", CHECKPOINT, "--dry-run", "hub/net"])
    assert not (run_folder / "hub/net").exists()


def test_what_cannot_be_uploaded_is_refused(run_folder, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="say where to"):
        upload.run(["--ckpt", CHECKPOINT])
    with pytest.raises(InputError, match="is not empty: name a new folder"):
        upload.run(["--ckpt", CHECKPOINT, "--dry-run", "pretrain"])
    torch.save({"model": weights.fused(weights.load_trained(None, CHECKPOINT)).state_dict()}, "fused.pth")
    with pytest.raises(InputError, match="is fused, timm loads what was trained"):
        upload.run(["--model", "recnext_m0", "--ckpt", "fused.pth", "--dry-run", "hub/net"])
