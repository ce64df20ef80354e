"""What every architecture owes its users. A model joins by being registered; if its input size is fixed, it is built for the small test size."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import model
import utils
from benchmarks.models import to_plain
from model.registration import REGISTERED
from tests.nets import BATCH_NORMS, SIZE, build, build_few, images, randomise, relative_error

NAMES = model.list_models()


def kinds() -> list[str]:
    """The first model of each class and set of named choices: what depends on neither width nor depth is tested once per kind.

    Networks of transposed convolutions differ from others by their mixer alone, which test_recconv.py tests, and do not take every size."""
    first_of = {}
    for name, (net_cls, settings) in REGISTERED.items():
        if name.endswith("_convtrans"):
            continue
        choices = frozenset((key, value) for key, value in settings.items() if isinstance(value, bool | str))
        first_of.setdefault((net_cls, choices), name)
    return list(first_of.values())


KINDS = kinds()

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.(script|trace|trace_method|save|load)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python (boolean|integer):torch.jit.TracerWarning"),  # as meant
]


@pytest.mark.parametrize("name", NAMES)
def test_forward_shape_and_every_weight_learns(name):
    net = randomise(build(name, num_classes=7, distillation=True)).eval()
    logits = net(images())
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", KINDS)
def test_fused_is_close_complete_and_final(name):
    net = randomise(build_few(name, num_classes=7, distillation=True)).eval()
    with torch.no_grad():
        reference = net(images())
        fused = utils.replace_batchnorm(net)
        assert relative_error(fused(images()), reference) < 1e-4
    assert [key for key, module in fused.named_modules() if isinstance(module, BATCH_NORMS)] == []
    state = {key: value.clone() for key, value in fused.state_dict().items()}
    again = utils.replace_batchnorm(fused).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in state.items())


@pytest.mark.parametrize("name", KINDS)
def test_fused_is_exact_by_either_way_to_fuse(name):
    net = randomise(build_few(name, num_classes=7, distillation=True)).double().eval()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        reference = net(x)
        assert relative_error(reparameterize_model(net)(x), reference) < 1e-12  # timm's, on a copy
        assert relative_error(utils.replace_batchnorm(net)(x), reference) < 1e-12


@pytest.mark.parametrize("is_fused", [False, True], ids=["trained", "fused"])
@pytest.mark.parametrize("name", KINDS)
def test_network_scripts_traces_and_exports(name, is_fused, tmp_path):
    net = randomise(build_few(name, num_classes=7, distillation=True)).eval()
    net = utils.replace_batchnorm(net) if is_fused else net
    torch.jit.script(net).save(tmp_path / "net.pt")
    x = images()
    with torch.no_grad():
        assert relative_error(torch.jit.load(tmp_path / "net.pt")(x), net(x)) < 1e-5
        # The other two take longer: exporters trace fused networks, and test_verify.py exports them.
        other = torch.jit.trace(net, x, check_trace=False) if is_fused else torch.export.export(net, (x,)).module()
        assert relative_error(other(x), net(x)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    net = randomise(build(name, features_only=True)).eval()
    with torch.no_grad():
        features = net(images())
    assert len(features) == 4
    for feature, chs, reduction in zip(features, net.feature_info.channels(), net.feature_info.reduction(), strict=True):
        assert feature.shape == (2, chs, -(-SIZE[0] // reduction), -(-SIZE[1] // reduction))
    # any size, also where the network was built for one alone; transposed convolutions take multiples of 64
    for size in ((64, 64), (64, 128)) if name.endswith("_convtrans") else ((32, 32), (37, 75), (150, 41)):
        with torch.no_grad():
            features = net(images(1, size))
        for feature, chs, reduction in zip(features, net.feature_info.channels(), net.feature_info.reduction(), strict=True):
            assert feature.shape[:2] == (1, chs)
            assert all(side // reduction <= part <= -(-side // reduction) for part, side in zip(feature.shape[2:], size, strict=True))
            assert feature.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_chosen_features_need_no_later_layers(name):
    net = build_few(name, features_only=True, out_indices=(0, 2))
    assert [feature.shape[1] for feature in net(images())] == net.feature_info.channels()
    full = build_few(name).eval()
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in full.parameters())
    assert [info["module"] in dict(full.named_modules()) for info in full.feature_info] == [True] * 4
    full.load_state_dict({key: value for key, value in net.model.state_dict().items() if not key.startswith("head.")}, strict=False)
    x = images()
    last, all_features = full.forward_intermediates(x)
    assert last.shape[1] == full.num_features
    assert all(torch.equal(feature, all_features[i]) for feature, i in zip(net.eval()(x), (0, 2), strict=True))
    early = full.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], all_features[1])
    with pytest.raises(ValueError, match="NCHW"):
        full.forward_intermediates(x, output_fmt="NHWC")


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", NAMES)
def test_config_shapes_heads_and_groups(name):
    """What timm's tests ask of every network, without its arithmetic: layers are where its config says, the last map has `pool_size` where images
    have `input_size`, classes and channels are free, and parameters are in a group per block, or stage, in the order in which images meet them."""
    with torch.device("meta"):
        net = model.create_model(name, in_chans=4, distillation=True)
    cfg = net.pretrained_cfg
    assert net.get_submodule(cfg["first_conv"]).in_channels == 4
    assert all(net.get_submodule(layer).weight.shape[0] == 1000 for layer in as_tuple(cfg["classifier"]))
    assert cfg["input_size"] == ((3, 256, 256) if "mlla" in name else (3, 224, 224))
    assert cfg["crop_pct"] == 0.875

    met = []
    for key, module in net.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            module.register_forward_hook(lambda *_, parameter=f"{key}.{parameter}": met.append(parameter))
    with torch.device("meta"), torch.no_grad():
        maps = net.forward_features(torch.empty(2, 4, *cfg["input_size"][1:]))
        assert maps.shape == (2, net.num_features, *cfg["pool_size"])
        assert [logits.shape for logits in as_tuple(net.forward_head(maps))] == [(2, 1000)] * (1 + getattr(net, "distillation", False))
        num_blocks = sum(type(module).__name__.endswith(("Block", "Bottleneck", "PatchMerging")) for module in net.modules())
        num_stages = 3 if name.startswith(("recnext_t", "recnext_s", "lsnet_t")) else 4  # their first one is empty
        for coarse, num_between in ((False, num_blocks + ("rexnet" in name)), (True, num_stages)):  # ReXNet's last convolution is one more
            group_of = group_parameters(net, net.group_matcher(coarse), reverse=True)
            assert group_of.keys() == {key for key, _ in net.named_parameters()}
            groups = [group_of[key] for key in met]
            assert groups == sorted(groups)
            assert set(groups) == set(range(num_between + 2))  # between the stem and the heads
            assert {group_of[f"{layer}.weight"] for layer in as_tuple(cfg["classifier"])} == {num_between + 1}
        assert net.forward_head(maps, pre_logits=True).shape == (2, net.head_hidden_size)
        net.reset_classifier(5)
        assert [logits.shape for logits in as_tuple(net.forward_head(maps))] == [(2, 5)] * (1 + getattr(net, "distillation", False))
        assert all(list(head.parameters()) for head in as_tuple(net.get_classifier()))
        net.reset_classifier(0)
        assert net.forward_head(maps).shape == (2, net.head_hidden_size)
        assert not any(list(head.parameters()) for head in as_tuple(net.get_classifier()))
    with pytest.raises(ValueError, match="num_classes=0"):
        net.reset_classifier(5, "")
    with pytest.raises(ValueError, match="'avg' or ''"):
        net.reset_classifier(5, "max")


@pytest.mark.parametrize("name", KINDS)
def test_heads_come_off(name):
    net = randomise(build_few(name, num_classes=7, distillation=True)).eval()
    x = images()
    with torch.no_grad():
        maps = net.forward_features(x)
        pooled = net.forward_head(maps, pre_logits=True)
        assert torch.equal(net.forward_head(maps), net(x))
        net.reset_classifier(0)
        assert net.num_classes == 0
        assert torch.equal(net(x), pooled)
        net.reset_classifier(0, "")
        assert torch.equal(net(x), maps)
        bare = build_few(name, num_classes=0, global_pool="").eval()
        assert bare(x).shape == maps.shape
    cfg = model.create_model(name).pretrained_cfg  # the plain network's, which has its heads
    assert {f"{layer}.weight" for layer in as_tuple(cfg["classifier"])} <= set(build_few(name).state_dict()) - set(bare.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_copies_compute_the_same_and_unknown_options_are_refused(name, tmp_path):
    net = randomise(build_few(name, num_classes=7)).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = build_few(name, num_classes=7).eval()
    loaded.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    copies = [loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    with torch.no_grad():
        expected = net(images())
        assert all(torch.equal(one(images()), expected) for one in copies)
        copies[1].get_parameter(next(key for key, _ in net.named_parameters())).zero_()
        assert torch.equal(net(images()), expected)
    with pytest.raises(TypeError, match="drop_pathh"):
        build_few(name, drop_pathh=0.1)


def train_once(net: nn.Module, x: Tensor, *, grad_checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step and the statistics after it, by name, and the bytes that the forward pass kept for backward."""
    net = copy.deepcopy(net)
    net.set_grad_checkpointing(grad_checkpointing)
    num_bytes = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal num_bytes
        num_bytes += tensor.nbytes
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = net(x)
    sum(out.square().mean() for out in as_tuple(outputs)).backward()
    return {**{key: parameter.grad for key, parameter in net.named_parameters()}, **dict(net.named_buffers())}, num_bytes


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_memory_alone(name):
    """Gradients, random draws and BatchNorm's statistics, which see a batch twice, are those of the plain step, bit for bit."""
    net = randomise(build_few(name, num_classes=7, distillation=True, drop_path_rate=0.2)).train()
    (plain, plain_bytes), (saving, saving_bytes) = (train_once(net, images(), grad_checkpointing=flag) for flag in (False, True))
    assert plain.keys() == saving.keys()
    assert [key for key in plain if not torch.equal(plain[key], saving[key])] == []
    assert saving_bytes < 0.75 * plain_bytes
    net.eval()
    with torch.no_grad():
        features = net.forward_intermediates(images())[1]
        net.set_grad_checkpointing()
        assert all(torch.equal(one, other) for one, other in zip(net.forward_intermediates(images())[1], features, strict=True))


@pytest.mark.parametrize("name", ["recnext_t_share_channel", "repvit_m0_6"])
def test_gradient_checkpointing_compiles(name):
    torch._dynamo.reset()
    net = randomise(build_few(name, num_classes=7, distillation=True)).train()
    plain, _ = train_once(net, images(), grad_checkpointing=False)
    net.compile(backend="aot_eager")
    compiled, _ = train_once(net, images(), grad_checkpointing=True)
    largest = max(plain[key].abs().max() for key, _ in net.named_parameters())
    assert all((plain[key] - compiled[key]).abs().max() < 1e-4 * largest for key, _ in net.named_parameters())
    for key, statistics in net.named_buffers():
        torch.testing.assert_close(compiled[key], plain[key])
        assert "num_batches" not in key or compiled[key] == statistics + 1


@pytest.mark.parametrize("name", KINDS)
def test_distillation_trains_a_pair_of_logits_and_evaluates_their_mean(name):
    net = build_few(name, num_classes=7, distillation=True)
    outputs = net(images())
    if isinstance(outputs, Tensor):  # one output, for both terms of the loss
        assert outputs.shape == (2, 7)
        assert not any("dist" in key for key in net.state_dict())
        return
    assert [logits.shape for logits in outputs] == [(2, 7), (2, 7)]
    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()  # so that both modes see the same statistics
    pair, mean = net(images()), net.eval()(images())
    torch.testing.assert_close(sum(pair) / 2, mean)
    assert build_few(name, num_classes=7, distillation=False)(images()).shape == (2, 7)


@pytest.mark.parametrize("name", KINDS)
def test_drop_path_and_dropout_act_in_training_only(name):
    torch.manual_seed(0)
    for options in ({"drop_path_rate": 0.5}, {"drop_rate": 0.5}):
        net = randomise(build_few(name, num_classes=7, **{"drop_rate": 0.0, "drop_path_rate": 0.0, **options}))
        net.train()
        for module in net.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        assert not torch.equal(net(images()), net(images()))
        assert torch.equal(net.eval()(images()), net(images()))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (97, 64)])
def test_any_size_gives_what_the_plain_form_does(name, size):
    """Merged kernels, cheaper orders of evaluation and channel factors against the operators they stand for, gradients too."""
    net = randomise(build_few(name, size, num_classes=7)).double().eval()
    plain = to_plain(net)
    x = images(1, size, torch.float64)
    outputs = [one(x) for one in (net, plain)]
    assert relative_error(*outputs) < 1e-12
    gradients = [torch.autograd.grad(out.square().sum(), list(one.parameters())) for out, one in zip(outputs, (net, plain), strict=True)]
    largest = max(gradient.abs().max() for gradient in gradients[1])
    assert max((a - b).abs().max() / largest for a, b in zip(*gradients, strict=True)) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_gives_the_same(name):
    net = randomise(build_few(name, num_classes=7)).double().eval()
    reference = net(images(dtype=torch.float64))
    out = net.to(memory_format=torch.channels_last)(images(dtype=torch.float64).contiguous(memory_format=torch.channels_last))
    assert relative_error(out, reference) < 1e-12


@pytest.mark.parametrize("name", ["recnext_m0", "recnext_a0", "recnext_t", "recnext_t_share_channel", "repnext_m0", "repvit_m0_6", "lsnet_t"])
def test_training_in_channels_last_never_leaves_that_layout(name):
    """No gradient reaches a BatchNorm, or LSNet's GroupNorm, in another: it would go on so, and through memory against the grain."""
    net = build(name, num_classes=7).to(memory_format=torch.channels_last).train()
    others = []

    def look_at_gradient(module, inputs, out):
        out.register_hook(lambda grad: others.append(grad.shape) if not grad.is_contiguous(memory_format=torch.channels_last) else None)

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.register_forward_hook(look_at_gradient)
    net(images().contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert others == []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close(name, dtype):
    net = randomise(build_few(name, num_classes=7)).eval()
    with torch.no_grad():
        reference = net(images())
        with torch.autocast("cpu", dtype):
            outputs = [net(images())]
        outputs.append(net.to(dtype)(images(dtype=dtype)))
    assert outputs[1].dtype == dtype
    for out in outputs:
        assert out.isfinite().all()
        assert relative_error(out.float(), reference) < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize("name", KINDS)
def test_pretrained_weights_adapt_to_classes_and_channels(name, tmp_path):
    source = build_few(name)
    state = source.state_dict()
    torch.save({"model": state, "epoch": 299}, tmp_path / "weights.pth")  # as published, without a filter of names
    overlay = {"file": str(tmp_path / "weights.pth"), "hf_hub_id": None}
    same = build_few(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in same.items())
    first = f"{source.pretrained_cfg['first_conv']}.weight"
    rgb = state[first]
    expected = {1: rgb.sum(1, keepdim=True), 4: torch.cat((rgb, rgb[:, :1]), dim=1) * 3 / 4}
    for in_chans, adapted in expected.items():
        other = build_few(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=in_chans).state_dict()
        torch.testing.assert_close(other[first], adapted)
        same_shape = [key for key, value in state.items() if value.shape == other[key].shape]
        assert len(same_shape) > 0.9 * len(other)
        assert all(torch.equal(other[key], state[key]) for key in same_shape)


def test_hub_ids_follow_the_distillation():
    def hub_id(name: str, distillation: bool) -> str | None:
        return build(name, distillation=distillation).pretrained_cfg["hf_hub_id"]

    assert hub_id("recnext_m1", False) == "suous/recnext_m1.base_300e_in1k"
    assert hub_id("recnext_m1", True) == "suous/recnext_m1.dist_300e_in1k"
    assert hub_id("recnext_t_share_channel", True) == "suous/recnext_t_share_channel.dist_300e_in1k"
    assert hub_id("lsnet_t", False) == "jameslahm/lsnet_t"
    assert hub_id("lsnet_t", True) == hub_id("lsnet_t_distill", False) == "jameslahm/lsnet_t_distill"
    assert timm.create_model("recnext_a0.dist_300e_in1k", distillation=True).pretrained_cfg["tag"] == "dist_300e_in1k"


def test_timm_networks_come_through_the_same_door():
    net = model.create_model("deit_tiny_distilled_patch16_224", distillation=True, num_classes=7, img_size=32, depth=1)
    assert [logits.shape for logits in net.train()(torch.zeros(2, 3, 32, 32))] == [(2, 7), (2, 7)]
    net = model.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=32, depth=1)
    assert net.train()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model.create_model("resnet18", num_classes=7, distillation=True)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
