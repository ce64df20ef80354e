"""What every architecture owes its users. A model joins by being registered; if its input size is fixed, it is built for the small test size."""

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
from tests.nets import BATCH_NORMS, SIZE, build, images, randomise, relative_error

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


@pytest.mark.parametrize("name", NAMES)
def test_fused_is_close_complete_and_final(name):
    net = randomise(build(name, num_classes=7, distillation=True)).eval()
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
    net = randomise(build(name, num_classes=7, distillation=True)).double().eval()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        reference = net(x)
        assert relative_error(reparameterize_model(net)(x), reference) < 1e-12  # timm's, on a copy
        assert relative_error(utils.replace_batchnorm(net)(x), reference) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_fused_network_scripts_traces_and_exports(name, tmp_path):
    net = randomise(build(name, num_classes=7, distillation=True)).eval()
    fused = utils.replace_batchnorm(net)
    torch.jit.script(fused).save(tmp_path / "net.pt")
    x = images()
    with torch.no_grad():
        assert relative_error(torch.jit.load(tmp_path / "net.pt")(x), fused(x)) < 1e-5
        assert relative_error(torch.jit.trace(fused, x, check_trace=False)(x), fused(x)) < 1e-5
        assert relative_error(torch.export.export(fused, (x,)).module()(x), fused(x)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    net = randomise(build(name, features_only=True)).eval()
    full = build(name).eval()
    full.load_state_dict(net.model.state_dict(), strict=False)
    x = images()
    with torch.no_grad():
        features = net(x)
        last, expected = full.forward_intermediates(x)
    assert len(features) == 4
    for feature, chs, reduction in zip(features, net.feature_info.channels(), net.feature_info.reduction(), strict=True):
        assert feature.shape == (2, chs, -(-SIZE[0] // reduction), -(-SIZE[1] // reduction))
    assert all(torch.equal(feature, other) for feature, other in zip(features, expected, strict=True))
    assert last.shape[1] == full.num_features
    assert [info["module"] in dict(full.named_modules()) for info in full.feature_info] == [True] * 4
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
    net = build(name, features_only=True, out_indices=(0, 2))
    assert [feature.shape[1] for feature in net(images())] == net.feature_info.channels()
    full = build(name)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in full.parameters())
    x = images()
    all_features = full.eval().forward_intermediates(x, intermediates_only=True)
    early = full.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], all_features[1])
    with pytest.raises(ValueError, match="NCHW"):
        full.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_parameters_follow_the_forward_pass(name):
    """What timm's layer-wise learning rates read: a group per block, or per stage, in the order in which images meet them."""
    with torch.device("meta"):
        net = build(name, distillation=True).eval()
    met = []
    num_blocks = 0
    for key, module in net.named_modules():
        num_blocks += type(module).__name__.endswith(("Block", "Bottleneck", "PatchMerging"))
        for parameter_name, _ in module.named_parameters(recurse=False):
            module.register_forward_hook(lambda *_, parameter=f"{key}.{parameter_name}": met.append(parameter))
    with torch.no_grad():
        net(torch.empty(2, 3, *SIZE, device="meta"))
    num_layers = num_blocks + ("rexnet" in name)  # its last convolution
    num_stages = 3 if name.startswith(("recnext_t", "recnext_s", "lsnet_t")) else 4  # their first one is empty
    for coarse, num_between in ((False, num_layers), (True, num_stages)):
        group_of = group_parameters(net, net.group_matcher(coarse), reverse=True)
        assert group_of.keys() == {key for key, _ in net.named_parameters()}
        groups = [group_of[key] for key in met]
        assert groups == sorted(groups)
        assert set(groups) == set(range(num_between + 2))  # between the stem and the heads
        stem = net.pretrained_cfg["first_conv"]
        assert group_of[f"{stem}.weight"] == 0
        classifiers = net.pretrained_cfg["classifier"]
        last = classifiers[0] if isinstance(classifiers, tuple) else classifiers
        assert group_of[f"{last}.weight"] == num_between + 1


@pytest.mark.parametrize("name", NAMES)
def test_classes_and_channels_are_free(name):
    net = build(name, num_classes=0, in_chans=1, distillation=True)
    features = net(images(in_chans=1))
    assert features.shape == (2, net.head_hidden_size)
    net.eval()
    net.reset_classifier(5)
    assert net(images(in_chans=1)).shape == (2, 5)
    head = net.get_classifier()
    heads = head if isinstance(head, tuple) else (head,)
    assert all(isinstance(head, nn.Module) for head in heads)
    maps = net.forward_features(images(in_chans=1))
    assert net.forward_head(maps, pre_logits=True).shape == (2, net.head_hidden_size)
    net.reset_classifier(0, "")
    assert torch.equal(net(images(in_chans=1)), maps)
    with pytest.raises(ValueError, match="num_classes=0"):
        net.reset_classifier(5, "")
    with pytest.raises(ValueError, match="'avg' or ''"):
        net.reset_classifier(5, "max")


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_load_and_unknown_options_do_not(name, tmp_path):
    net = randomise(build(name, num_classes=7)).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    other = build(name, num_classes=7).eval()
    other.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(net(images()), other(images()))
    with pytest.raises(TypeError, match="drop_pathh"):
        build(name, drop_pathh=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_distillation_trains_a_pair_of_logits_and_evaluates_their_mean(name):
    net = build(name, num_classes=7, distillation=True)
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
    assert build(name, num_classes=7, distillation=False)(images()).shape == (2, 7)


@pytest.mark.parametrize("name", KINDS)
def test_drop_path_and_dropout_act_in_training_only(name):
    torch.manual_seed(0)
    for options in ({"drop_path_rate": 0.5}, {"drop_rate": 0.5}):
        net = randomise(build(name, num_classes=7, **{"drop_rate": 0.0, "drop_path_rate": 0.0, **options}))
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
    net = randomise(build(name, size, num_classes=7)).double().eval()
    plain = to_plain(net)
    x = images(1, size, torch.float64)
    outputs = [one(x) for one in (net, plain)]
    assert relative_error(*outputs) < 1e-12
    gradients = [torch.autograd.grad(out.square().sum(), list(one.parameters())) for out, one in zip(outputs, (net, plain), strict=True)]
    largest = max(gradient.abs().max() for gradient in gradients[1])
    assert max((a - b).abs().max() / largest for a, b in zip(*gradients, strict=True)) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_gives_the_same(name):
    net = randomise(build(name, num_classes=7)).double().eval()
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
    net = randomise(build(name, num_classes=7)).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out = net(images())
    reference = net(images())
    assert out.isfinite().all()
    assert relative_error(out.float(), reference) < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_config_names_existing_layers(name):
    net = build(name)
    cfg = net.pretrained_cfg
    classifiers = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
    assert net.get_submodule(cfg["first_conv"]).in_channels == 3
    has_one_head = getattr(net, "head_dist", net) is None or "repvit" in name
    assert all(net.get_submodule(layer).weight.shape[0] == 1000 for layer in classifiers[: 1 if has_one_head else None])
    assert cfg["input_size"] == ((3, 256, 256) if "mlla" in name else (3, 224, 224))
    assert cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("name", KINDS)
def test_pretrained_weights_adapt_to_classes_and_channels(name, tmp_path):
    source = build(name)
    state = source.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "hf_hub_id": None}
    same = build(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in same.items())
    gray = build(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1).state_dict()
    first = f"{source.pretrained_cfg['first_conv']}.weight"
    torch.testing.assert_close(gray[first], state[first].sum(1, keepdim=True))
    same_shape = [key for key, value in state.items() if value.shape == gray[key].shape]
    assert len(same_shape) > 0.9 * len(gray)
    assert all(torch.equal(gray[key], state[key]) for key in same_shape)


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
