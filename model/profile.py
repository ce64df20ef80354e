"""How fast linear attention is in both orders of evaluation, and how close to softmax attention on random data.

    python model/profile.py --seed 42 --resolution 8,8 --batch-size 16 --kernel softplus        cosine similarity 0.9966

All forms share their weights, have one head and add the same positional convolution.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # As a script, this file's folder comes first in the search path and would hide the standard library's `profile` from torch.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, l1_loss, mse_loss, scaled_dot_product_attention

from model.mixers import attend_scores_first, attend_values_first, kernel_feature


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q and k (..., D, N), v (..., E, N) -> (..., E, N)."""
    return scaled_dot_product_attention(q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)).transpose(-2, -1)


def build_forms(seed: int, shape: tuple[int, int, int, int], kernel: str) -> tuple[Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """An input of that shape (B, dim, H, W) and, by name, functions of it: attention in three forms with the same weights."""
    torch.manual_seed(seed)
    x = torch.randn(shape)
    dim = shape[1]
    qk = nn.Conv2d(dim, dim, 1)
    pe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def attend(x: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor], *, has_kernel: bool) -> Tensor:
        qk_features = kernel_feature(qk(x), kernel) if has_kernel else qk(x)
        q, k = qk_features.flatten(2).chunk(2, dim=1)
        return attention(q, k, x.flatten(2)).reshape(x.shape) + pe(x)

    forms = {
        "softmax": lambda x: attend(x, softmax_attention, has_kernel=False),
        "linear, values first": lambda x: attend(x, attend_values_first, has_kernel=True),
        "linear, scores first": lambda x: attend(x, attend_scores_first, has_kernel=True),
    }
    return x, forms


def time_ms(form: Callable[[Tensor], Tensor], x: Tensor, num_runs: int) -> float:
    """Mean duration of a call."""
    form(x)
    start = time.perf_counter()
    for _ in range(num_runs):
        form(x)
    return 1e3 * (time.perf_counter() - start) / num_runs


def compare(out: Tensor, reference: Tensor) -> str:
    similarity = cosine_similarity(out.flatten(), reference.flatten(), dim=0)
    largest = (out - reference).abs().max()
    return f"MSE {mse_loss(out, reference):.3e}  MAE {l1_loss(out, reference):.3e}  cosine similarity {similarity:.6f}  largest difference {largest:.3e}"


def parse_resolution(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form height,width") from None
    return height, width


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=21, help="of the input and the weights [21]")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=2, help="images [2]")
    parser.add_argument("--dim", type=int, default=64, help="channels [64]")
    parser.add_argument("--resolution", type=parse_resolution, default=(8, 8), metavar="H,W", help="of the feature map [8,8]")
    parser.add_argument("--runs", type=int, default=1000, help="calls that are timed, per form [1000]")
    parser.add_argument("--kernel", choices=("softplus", "elu", "relu"), default="softplus", help="of the linear forms [softplus]")
    args = parser.parse_args(argv)
    x, forms = build_forms(args.seed, (args.batch_size, args.dim, *args.resolution), args.kernel)
    outs = {name: form(x) for name, form in forms.items()}
    for name, form in forms.items():
        print(f"{name:<22}{time_ms(form, x, args.runs):8.3f} ms")
    softmax, values_first, scores_first = outs
    print(f"{values_first} against {scores_first}: {compare(outs[values_first], outs[scores_first])}")
    print(f"linear against {softmax}: {compare(outs[values_first], outs[softmax])}")


if __name__ == "__main__":
    main()
