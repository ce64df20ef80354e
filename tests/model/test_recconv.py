"""The mixers of RecNeXt-M's ablation: by hand, against a plain second implementation, and as networks that fuse, train and are exported."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, conv_transpose2d, gelu, interpolate, linear, max_pool2d, max_unpool2d

import model
import utils
from measuring.operations import count_parameters
from model.nets import MixerBlock
from model.recconv import MIXERS, GroupRecConv2d, RecurrentRecConv2d, SplitRecConv2d, TransposedRecConv2d, UnpoolRecConv2d, build_mixer
from tests.golden.golden import load_golden_weights
from tests.nets import BATCH_NORMS, images, randomise, relative_error

SIZE = (64, 128)  # height and width that every form takes
TINY = {"dims": (16, 32, 64, 128), "depths": (1, 1, 1, 2), "num_classes": 7}
HEADS = ("head.head", "head.head_dist")
PUBLISHED = {  # trainable parameters of recnext_m1 with 1000 classes, as its logs state them
    "3x3": 5_198_984,
    "7x7": 5_362_184,
    "11x11": 5_655_944,
    "rec_3x3": 5_303_336,
    "rec_5x5": 5_561_384,
    "rec_7x7": 5_948_456,
    "rec_7x7_nearest": 5_948_456,
    "rec_7x7_unpool": 5_748_536,
    "rec_convtrans_3x3_basic": 5_368_616,
    "rec_convtrans_7x7_basic": 6_209_576,
    "rec_convtrans_7x7_group": 6_164_129,
    "rec_convtrans_7x7_split": 5_832_926,
}
ONE_OF_EACH = (
    "7x7", "rec_3x3", "rec_3x3_nearest", "rec_7x7_unpool", "rec_5x5_recurrent",
    "rec_convtrans_3x3_basic", "rec_convtrans_5x5_group", "rec_convtrans_3x3_split",
)  # fmt: skip


@pytest.mark.parametrize("mixer", PUBLISHED)
def test_parameters_are_as_many_as_published(mixer):
    with torch.device("meta"):
        assert count_parameters(model.create_model("recnext_m1", mixer=mixer)) == PUBLISHED[mixer]


def test_the_published_count_of_5x5_basic_is_not_that_form():
    """5,406,734 of its log is what "split" has with upsampling free of parameters."""
    with torch.device("meta"):
        assert count_parameters(model.create_model("recnext_m1", mixer="rec_convtrans_5x5_basic")) == 5_708_264
        split = model.create_model("recnext_m1", mixer="rec_convtrans_5x5_split")
    upsampling = sum(count_parameters(module.ups) for module in split.modules() if isinstance(module, SplitRecConv2d))
    assert count_parameters(split) - upsampling == 5_406_734


# ---- by hand: one level, kernels with one weight in the middle, so that a convolution is a factor


def scale_by(factor: float, chs: int = 1) -> Tensor:
    """Weight (chs, 1, 3, 3) of a depthwise convolution that multiplies by `factor`."""
    weight = torch.zeros(chs, 1, 3, 3)
    weight[:, :, 1, 1] = factor
    return weight


def run(mixer: nn.Module, weights: dict[str, Tensor], x: list) -> list:
    """What a mixer with these weights makes of x (C, H, W), as nested lists."""
    mixer.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return mixer(torch.tensor(x, dtype=torch.float32).unsqueeze(0))[0].tolist()


X = [[1, 2], [3, 4]]
UP = torch.arange(16.0).view(1, 1, 4, 4)  # of a 1x1 map v, a stride of 2 and a padding of 1 leave the middle: v [[5, 6], [9, 10]]


def test_plain_by_hand():
    mixer = build_mixer("3x3", 1, level=4)
    mixer.load_state_dict({"weight": torch.ones(1, 1, 3, 3), "bias": torch.tensor([0.5])})
    assert mixer(torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]])).tolist() == [[[[12.5, 21.5, 16.5]] * 2]]


def test_nearest_by_hand():
    weights = {"down": scale_by(1), "convs.0": scale_by(2), "convs.1": scale_by(3)}
    assert run(build_mixer("rec_3x3_nearest", 1, level=1), weights, [X]) == [[[9, 12], [15, 18]]]  # 3 (x + 2 * 1)


def test_bilinear_by_hand():
    weights = {"down": scale_by(1), "convs.0": scale_by(2), "convs.1": scale_by(1)}
    rows = [[2, 0, 4, 0], [0, 0, 0, 0]] * 2  # halved: [2, 4] twice; doubled in value, then in size: [4, 5, 7, 8]
    assert run(build_mixer("rec_3x3", 1, level=1), weights, [rows]) == [[[6, 5, 11, 8], [4, 5, 7, 8]] * 2]


def test_unpool_by_hand():
    weights = {"convs.0": scale_by(2), "convs.1": scale_by(3)}
    assert run(UnpoolRecConv2d(1, kernel_size=3, level=1), weights, [X]) == [[[3, 6], [9, 36]]]  # 3 (x + 8 where the 4 was)


def test_transposed_basic_by_hand():
    weights = {"down": scale_by(1), "convs.0": scale_by(2), "convs.1": scale_by(3), "up": UP}
    assert run(TransposedRecConv2d(1, kernel_size=3, level=1), weights, [X]) == [[[33, 42], [63, 72]]]  # 3 (x + 2 [[5, 6], [9, 10]])


def test_transposed_group_by_hand():
    down, up = torch.cat((scale_by(1), scale_by(10)), dim=1), torch.cat((UP, -UP), dim=1)
    weights = {"downs.0": down, "convs.0": scale_by(2), "convs.1": scale_by(1, 2), "ups.0": up}
    # both channels become 1 + 10 * 5 = 51, then 102, then 102 [[5, 6], [9, 10]] for the first and its negative for the second
    out = run(GroupRecConv2d(2, kernel_size=3, level=1), weights, [X, [[5, 6], [7, 8]]])
    assert out == [[[511, 614], [921, 1024]], [[-505, -606], [-911, -1012]]]


def test_transposed_split_by_hand():
    weights = {"downs.0": scale_by(1), "convs.0": scale_by(2), "convs.1": scale_by(3, 2), "ups.0": UP}
    # the first channel stays; of the second, its 5 comes back as 10 [[5, 6], [9, 10]]; all times 3
    out = run(SplitRecConv2d(2, kernel_size=3, level=1), weights, [X, [[5, 6], [7, 8]]])
    assert out == [[[3, 6], [9, 12]], [[150, 180], [270, 300]]]


def test_recurrent_by_hand():
    weights = {name: scale_by(factor) for name, factor in {"n": 1, "b": 2, "c": 3, "d": 5}.items()}
    assert run(RecurrentRecConv2d(1, kernel_size=3, level=1), weights, [X]) == [[[11, 16], [21, 26]]]  # 3 * 2 * 1 + 5 x
    rows = [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]  # n leaves [[1, 2], [3, 4]], then 1: the state is 2, then 7 * 2 + 2 n(x)
    out = run(RecurrentRecConv2d(1, kernel_size=3, level=2), {**weights, "a": scale_by(7)}, [rows])
    assert out == [[[53, 48, 64, 54], [48, 48, 54, 54], [75, 60, 86, 66], [60, 60, 66, 66]]]  # 3 * [[16, 18], [20, 22]] + 5 x


# ---- a second implementation: each form as the recursion it is, on bare weights


def depthwise(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    return conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1])


def double(x: Tensor, weight: Tensor) -> Tensor:
    return conv_transpose2d(x, weight, stride=2, padding=(weight.shape[-1] - 1) // 2, groups=x.shape[1])


def plain_recursion(form: str, x: Tensor, weights: dict[str, Tensor], *, level: int, depth: int = 0) -> Tensor:
    """The mixer's output at `depth` of the recursion, by its definition."""
    conv = weights[f"convs.{level - depth}.weight"]
    if depth == level:
        return depthwise(x, conv)
    below = {"form": form, "weights": weights, "level": level, "depth": depth + 1}
    down, up = (weights.get(f"downs.{depth}.weight"), weights.get(f"ups.{level - depth - 1}.weight"))
    if form == "unpool":
        pooled, places = max_pool2d(x, 2, return_indices=True)
        return depthwise(x + max_unpool2d(plain_recursion(x=pooled, **below), places, 2, output_size=x.shape[2:]), conv)
    if form == "basic":
        return depthwise(x + double(plain_recursion(x=depthwise(x, weights["down.weight"], 2), **below), weights["up.weight"]), conv)
    if form == "group":
        halved = conv2d(x, down, stride=2, padding=down.shape[-1] // 2, groups=down.shape[0])
        return depthwise(x + double(plain_recursion(x=halved, **below), up), conv)
    if form == "split":
        first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return depthwise(torch.cat((first, double(plain_recursion(x=depthwise(second, down, 2), **below), up)), dim=1), conv)
    low = plain_recursion(x=depthwise(x, weights["down.weight"], 2), **below)
    return depthwise(x + interpolate(low, size=x.shape[2:], mode=form), conv)


def plain_recurrence(x: Tensor, weights: dict[str, Tensor], *, level: int) -> Tensor:
    maps = [x]
    for _ in range(level):
        maps.append(depthwise(maps[-1], weights["n.weight"], 2))
    state = None
    for coarse, fine in zip(maps[:0:-1], maps[-2::-1], strict=True):
        state = depthwise(coarse, weights["b.weight"]) + (0 if state is None else depthwise(state, weights["a.weight"]))
        state = interpolate(state, size=fine.shape[2:], mode="nearest")
    return depthwise(state, weights["c.weight"]) + depthwise(x, weights["d.weight"])


def plain_form(mixer: str, x: Tensor, weights: dict[str, Tensor], *, level: int) -> Tensor:
    if not mixer.startswith("rec_"):
        return depthwise(x, weights["weight"]) + weights["bias"].view(-1, 1, 1)
    form = mixer.rpartition("_")[2]
    if form == "recurrent":
        return plain_recurrence(x, weights, level=level)
    return plain_recursion(form if form in ("nearest", "unpool", "basic", "group", "split") else "bilinear", x, weights, level=level)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("level", [1, 4])
def test_every_form_is_what_its_definition_says_gradients_too(mixer, level):
    torch.manual_seed(0)
    net = build_mixer(mixer, 32, level=level).double()
    size = (32, 48) if "convtrans" in mixer else (33, 50)
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    outputs = net(x), plain_form(mixer, x, dict(net.named_parameters()), level=level)
    assert relative_error(*outputs) < 1e-12
    factors = torch.randn_like(x)
    ours, plain = (torch.autograd.grad((out * factors).sum(), [x, *net.parameters()]) for out in outputs)
    assert max(relative_error(a, b) for a, b in zip(ours, plain, strict=True)) < 1e-12


def plain_net(x: Tensor, weights: dict[str, Tensor], mixer: str) -> Tensor:
    """Logits of an evaluating RecNeXt-M with that mixer, written out on its state dict."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(x, mean, var, weight, bias)

    def conv_norm(x: Tensor, name: str, **settings) -> Tensor:
        return norm(conv2d(x, weights[f"{name}.conv.weight"], **settings), f"{name}.norm")

    def mlp(x: Tensor, name: str) -> Tensor:
        return conv_norm(gelu(conv_norm(x, f"{name}.0")), f"{name}.2")

    x = conv_norm(gelu(conv_norm(x, "stem.stem.0", stride=2, padding=1)), "stem.stem.2", stride=2, padding=1)
    for i, depth in enumerate(TINY["depths"]):
        if i > 0:
            down = f"stages.{i}.downsample"
            weight, bias = weights[f"{down}.token_mixer.weight"], weights[f"{down}.token_mixer.bias"]
            x = norm(conv2d(x, weight, bias, stride=2, padding=3, groups=x.shape[1]), f"{down}.norm")
            x = x + mlp(x, f"{down}.channel_mixer")
        for block in (f"stages.{i}.blocks.{j}" for j in range(depth)):
            own = {key.removeprefix(f"{block}.token_mixer."): weight for key, weight in weights.items() if key.startswith(f"{block}.token_mixer.")}
            x = x + mlp(norm(plain_form(mixer, x, own, level=4 - i), f"{block}.norm"), f"{block}.channel_mixer")
    heads = [linear(norm(x.mean((2, 3)), f"{head}.norm"), weights[f"{head}.linear.weight"], weights[f"{head}.linear.bias"]) for head in HEADS]
    return sum(heads) / 2


@pytest.mark.parametrize("mixer", ONE_OF_EACH)
def test_network_with_golden_weights_gives_the_plain_ones_logits(mixer):
    net = load_golden_weights(model.create_model("recnext_m1", mixer=mixer, **TINY).double()).eval()
    x = images(size=SIZE, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(net(x), plain_net(x, net.state_dict(), mixer)) < 1e-12


# ---- networks


@pytest.mark.parametrize("mixer", ONE_OF_EACH)
def test_network_fuses_and_every_weight_learns(mixer):
    net = randomise(model.create_model("recnext_m1", mixer=mixer, distillation=True, **TINY)).double().eval()
    x = images(size=SIZE, dtype=torch.float64)
    reference = net(x)
    reference.square().sum().backward()
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0] == []
    with torch.no_grad():
        fused = utils.replace_batchnorm(net)
        assert [key for key, module in fused.named_modules() if isinstance(module, BATCH_NORMS)] == []
        assert relative_error(fused(x), reference) < 1e-12
        assert relative_error(fused(x.contiguous(memory_format=torch.channels_last)), reference) < 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.(script|trace|trace_method|save|load)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")  # sizes are checked while tracing
@pytest.mark.parametrize("mixer", ONE_OF_EACH)
def test_fused_block_scripts_traces_and_exports(mixer):
    fused = utils.replace_batchnorm(randomise(MixerBlock(build_mixer(mixer, 8, level=2), 8, 2, drop_path_rate=0.0)).eval())
    x = torch.randn(2, 8, 16, 24)
    with torch.no_grad():
        reference = fused(x)
        for form in (torch.jit.script(fused), torch.jit.trace(fused, x), torch.export.export(fused, (x,)).module()):
            assert relative_error(form(x), reference) < 1e-5


@pytest.mark.parametrize("form", ["group", "split", "unpool", "recurrent"])
def test_half_precision_stays_in_range_where_sums_would_not(form):
    mixer = build_mixer(f"rec_convtrans_3x3_{form}" if form in ("group", "split") else f"rec_3x3_{form}", 16, level=2).eval()
    for parameter in mixer.parameters():
        nn.init.constant_(parameter, 20.0)
    x = torch.ones(1, 16, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert not mixer._mix(x).isfinite().all()
        assert mixer(x).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(mixer(x).float(), mixer.float()(x)) < 0.02


def test_sizes_and_widths_that_a_form_cannot_take_are_refused_with_the_reason():
    at_224 = {name: "sides have to be multiples of 8, those of images multiples of 64" for name in MIXERS if "convtrans" in name}
    for name in MIXERS:
        mixer = build_mixer(name, 16, level=3)
        assert mixer(torch.zeros(1, 16, 32, 64)).shape == (1, 16, 32, 64)
        if name in at_224:
            with pytest.raises(ValueError, match=at_224[name]):
                mixer(torch.zeros(1, 16, 32, 28))
        else:
            assert mixer(torch.zeros(1, 16, 27, 28)).shape == (1, 16, 27, 28)
    with pytest.raises(ValueError, match="7x9 cannot be pooled 3 times: its sides have to be 8 or more, those of images 64 or more"):
        build_mixer("rec_7x7_unpool", 16, level=3)(torch.zeros(1, 16, 7, 9))
    for form in ("group", "split"):
        with pytest.raises(ValueError, match="40 are not divisible by 16"):
            model.create_model("recnext_m0", mixer=f"rec_convtrans_7x7_{form}")
    with pytest.raises(ValueError, match="mixer is '5x5': it can be 3x3, 7x7, 11x11, rec_3x3, .*rec_convtrans_7x7_split"):
        model.create_model("recnext_m1", mixer="5x5")
