"""Core ML's operators in torch: what a saved model computes, worked out where Core ML itself cannot run.

`Program` evaluates ML Programs, `Network` neural networks of the old format; both know the operators that our architectures come to, and name
those they do not know."""

import math
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from run.errors import InputError

# ---- ML Program


def _conv(x, weight, bias=None, *, strides, pad_type, pad, dilations, groups):
    if pad_type == "custom":
        x = F.pad(x, [*pad[2:], *pad[:2]])
    elif pad_type != "valid":
        raise NotImplementedError(f"padding {pad_type}")
    return F.conv2d(x, weight, bias, tuple(strides), 0, tuple(dilations), int(groups))


def _conv_transpose(x, weight, bias=None, *, strides, pad_type, pad, dilations, groups, output_shape=None):
    out = F.conv_transpose2d(x, weight, bias, tuple(strides), 0, 0, int(groups), tuple(dilations))
    top, bottom, left, right = _ints(pad) if pad_type == "custom" else (0, 0, 0, 0)
    out = out[..., top : out.shape[2] - bottom, left : out.shape[3] - right]
    if pad_type not in ("custom", "valid") or (output_shape is not None and _ints(output_shape)[2:] != out.shape[2:]):
        raise NotImplementedError(f"transposed convolution to {output_shape} with padding {pad_type}")
    return out


def _gelu(x, *, mode):
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise NotImplementedError(f"gelu {mode}")
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _nearest(x, *, scale_factor_height, scale_factor_width):
    for dim, factor in ((2, scale_factor_height), (3, scale_factor_width)):
        size = math.floor(x.shape[dim] * factor)
        x = x.index_select(dim, (torch.arange(size) / factor).floor().long().clamp(max=x.shape[dim] - 1))
    return x


def _bilinear(x, *, scale_factor_height, scale_factor_width, align_corners):
    factors = (float(scale_factor_height), float(scale_factor_width))
    return F.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=bool(align_corners), recompute_scale_factor=False)


def _batch_norm(x, *, mean, variance, gamma, beta, epsilon):
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _layer_norm(x, *, axes, epsilon, gamma=None, beta=None):
    axes = sorted(int(axis) % x.ndim for axis in axes)
    if axes != list(range(axes[0], x.ndim)):
        raise NotImplementedError(f"layer_norm over {axes} of {x.ndim} dimensions")
    return F.layer_norm(x, x.shape[axes[0] :], gamma, beta, float(epsilon))


def _split(x, *, axis, split_sizes=None, num_splits=None):
    axis = int(axis)
    return x.split(tuple(map(int, split_sizes)) if split_sizes is not None else x.shape[axis] // int(num_splits), dim=axis)


def _concat(*, values, axis, interleave):
    if not interleave:
        return torch.cat(values, int(axis))
    axis = int(axis) % values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def _slice(x, *, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    steps = [1] * x.ndim if stride is None else stride
    from_start, to_end = (mask if mask is not None else [False] * x.ndim for mask in (begin_mask, end_mask))
    if (squeeze_mask is not None and any(squeeze_mask)) or any(step < 1 for step in steps):
        raise NotImplementedError("slice_by_index with negative steps or squeezing")
    ranges = zip(begin, end, steps, from_start, to_end, strict=True)
    return x[tuple(slice(None if first else int(a), None if last else int(b), int(step)) for a, b, step, first, last in ranges)]


def _scatter(*, data, indices, updates, axis, mode):
    if mode != "update":
        raise NotImplementedError(f"scatter {mode}")
    return data.index_copy(int(axis), torch.as_tensor(indices).long().flatten(), updates)


def _matmul(x, y, *, transpose_x, transpose_y):
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _ints(values) -> tuple[int, ...]:
    return tuple(int(value) for value in np.atleast_1d(values))


OPERATORS: dict[str, Callable] = {  # of ML Program, as its documentation defines them
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "square": lambda x: x.square(),
    "sqrt": lambda x: x.sqrt(),
    "exp": lambda x: x.exp(),
    "log": lambda x, epsilon: (x + float(epsilon)).log(),
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x),
    "silu": lambda x: F.silu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "elu": lambda x, alpha: F.elu(x, float(alpha)),
    "softplus": lambda x: F.softplus(x),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "cast": lambda x, dtype: x,  # results are rounded to their type anyway
    "identity": lambda x: x,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(_ints(axes), keepdim=bool(keep_dims)),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(_ints(axes), keepdim=bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(_ints(shape)),
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "squeeze": lambda x, axes: x.squeeze(_ints(axes)),
    "expand_dims": lambda x, axes: x[tuple(None if i in _ints(axes) else slice(None) for i in range(x.ndim + len(_ints(axes))))],
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "gelu": _gelu,
    "upsample_nearest_neighbor": _nearest,
    "upsample_bilinear": _bilinear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "split": _split,
    "concat": _concat,
    "slice_by_index": _slice,
    "scatter": _scatter,
    "matmul": _matmul,
}


class Program:
    """A saved ML Program, evaluated operator by operator: float32 arithmetic, each result rounded to the type the program gives it."""

    def __init__(self, function):
        self.function = function
        self.constants: dict[str, Tensor] = {}
        self.steps = []
        for op in function.operations:
            if op.op_type == "const":
                self._keep(op)
            else:
                self.steps.append(op)

    def _keep(self, op) -> None:
        value, name = np.asarray(op.outputs[0].val), op.outputs[0].name
        if value.dtype.kind in "fiu":
            is_nameless = re.fullmatch(r"const_\d+", name)  # in the file; coremltools numbers them as it reads one file after another
            self.constants[f"constant {len(self.constants)}" if is_nameless else name] = torch.from_numpy(value.copy())

    def unknown_operators(self) -> list[str]:
        return sorted({op.op_type for op in self.steps} - {*OPERATORS, "classify"})

    def _value(self, var, known: dict[str, Tensor]):
        """What an operator's input is: a tensor, a list of them, a plain value, or None."""
        if isinstance(var, list | tuple):
            return [self._value(item, known) for item in var]
        if var is None or var.name in known:
            return None if var is None else known[var.name]
        value = var.val
        is_data = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return torch.from_numpy(np.array(value, dtype=np.float32)) if is_data else value

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (1, 3, H, W) -> logits (1, C): what goes into the last softmax, whose result the labels are given for."""
        (name,) = self.function.inputs
        known, logits = {name: pixels}, {}
        for op in self.steps:
            if op.op_type == "classify":
                return logits[op.inputs["probabilities"].name]
            given = {key: self._value(var, known) for key, var in op.inputs.items()}
            out = OPERATORS[op.op_type](**{key: value for key, value in given.items() if value is not None})
            outputs = out if isinstance(out, tuple | list) else (out,)
            for var, value in zip(op.outputs, outputs, strict=True):
                known[var.name] = value.half().float() if _is_half(var) else value
            if op.op_type in ("softmax", "cast", "identity"):
                source = op.inputs["x"].name
                logits[op.outputs[0].name] = given["x"] if op.op_type == "softmax" else logits.get(source)
        raise InputError("its program ends without class labels: it was not exported as a classifier")


def _is_half(var) -> bool:
    return var.dtype is not None and var.dtype.__name__ == "fp16"


# ---- neural networks of the old format. Shapes: (B, C, H, W) or as an array; axes may count from the end.

ACTIVATIONS: dict[str, Callable] = {
    "ReLU": lambda x, own: F.relu(x),
    "sigmoid": lambda x, own: torch.sigmoid(x),
    "ELU": lambda x, own: F.elu(x, own.alpha),
    "linear": lambda x, own: own.alpha * x + own.beta,
}
UNARY: dict[str, Callable] = {
    "SQRT": lambda x, layer: x.sqrt(),
    "EXP": lambda x, layer: x.exp(),
    "POWER": lambda x, layer: x**layer.alpha,
    "LOG": lambda x, layer: (x + layer.epsilon).log(),
}


def weights_of(params) -> Tensor:
    """The numbers of a message WeightParams, flat."""
    if params.float16Value:
        return torch.from_numpy(np.frombuffer(params.float16Value, np.float16).copy())
    return torch.from_numpy(np.array(params.floatValue, dtype=np.float32))


def _layer_convolution(layer, x):
    pad = layer.valid.paddingAmounts.borderAmounts
    if layer.WhichOneof("ConvolutionPaddingType") != "valid":
        raise NotImplementedError("convolution with other than explicit padding")
    if layer.isDeconvolution:
        return _transposed_convolution(layer, x, pad)
    x = F.pad(x, [pad[1].startEdgeSize, pad[1].endEdgeSize, pad[0].startEdgeSize, pad[0].endEdgeSize])
    weight = weights_of(layer.weights).view(layer.outputChannels, layer.kernelChannels, *layer.kernelSize)
    bias = weights_of(layer.bias) if layer.hasBias else None
    return F.conv2d(x, weight, bias, tuple(layer.stride), 0, tuple(layer.dilationFactor), layer.nGroups)


def _transposed_convolution(layer, x, pad):
    """Padding is what is cut off."""
    weight = weights_of(layer.weights).view(layer.kernelChannels, layer.outputChannels // layer.nGroups, *layer.kernelSize)
    bias = weights_of(layer.bias) if layer.hasBias else None
    out = F.conv_transpose2d(x, weight, bias, tuple(layer.stride), 0, 0, layer.nGroups, tuple(layer.dilationFactor))
    rows, columns = pad
    return out[..., rows.startEdgeSize : out.shape[-2] - rows.endEdgeSize, columns.startEdgeSize : out.shape[-1] - columns.endEdgeSize]


def _layer_matmul(layer, x, y=None):
    if y is None:
        weight = weights_of(layer.weights).view(layer.weightMatrixSecondDimension, layer.weightMatrixFirstDimension)
        return F.linear(x, weight, weights_of(layer.bias) if layer.hasBias else None)
    return (x.mT if layer.transposeA else x) @ (y.mT if layer.transposeB else y)


def _layer_inner_product(layer, x):
    weight = weights_of(layer.weights).view(layer.outputChannels, layer.inputChannels)
    return F.linear(x, weight, weights_of(layer.bias) if layer.hasBias else None)


def _layer_upsample(layer, x):
    height, width = layer.fractionalScalingFactor or layer.scalingFactor
    if layer.mode == layer.NN:
        return _nearest(x, scale_factor_height=height, scale_factor_width=width)
    if layer.linearUpsampleMode != layer.ALIGN_CORNERS_FALSE:
        raise NotImplementedError("bilinear upsampling with aligned corners")
    return _bilinear(x, scale_factor_height=height, scale_factor_width=width, align_corners=False)


def _layer_pooling(layer, x):
    if not layer.globalPooling or layer.type != layer.AVERAGE:
        raise NotImplementedError("pooling other than global averages")
    return x.mean((-2, -1), keepdim=True)


def _layer_slice(layer, x):
    axis = {layer.CHANNEL_AXIS: -3, layer.HEIGHT_AXIS: -2, layer.WIDTH_AXIS: -1}[layer.axis]
    size = x.shape[axis]
    return x.index_select(axis, torch.arange(size)[layer.startIndex : layer.endIndex : layer.stride])


def _layer_reduce(reduce: Callable):
    return lambda layer, x: reduce(x, tuple(range(x.ndim)) if layer.reduceAll else tuple(layer.axes), keepdim=layer.keepDims)


def _layer_mvn(layer, x):
    dims = (-3, -2, -1) if layer.acrossChannels else (-2, -1)
    centred = x - x.mean(dims, keepdim=True)
    return centred / (x.var(dims, correction=0, keepdim=True) + layer.epsilon).sqrt() if layer.normalizeVariance else centred


def _layer_scale(layer, x):
    x = x * weights_of(layer.scale).view(tuple(layer.shapeScale))
    return x + weights_of(layer.bias).view(tuple(layer.shapeBias)) if layer.hasBias else x


def _layer_batchnorm(layer, x):
    mean, variance, gamma, beta = (weights_of(part) for part in (layer.mean, layer.variance, layer.gamma, layer.beta))
    return F.batch_norm(x, mean, variance, gamma, beta, eps=layer.epsilon)


def _layer_scatter(layer, data, indices, updates):
    if layer.mode != 0:
        raise NotImplementedError("scatter other than by overwriting")
    return data.index_copy(layer.axis, indices.long().flatten(), updates)


def _layer_reshape(layer, x):
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(layer.targetShape)])


LAYERS: dict[str, Callable] = {
    "convolution": _layer_convolution,
    "innerProduct": _layer_inner_product,
    "batchedMatmul": _layer_matmul,
    "loadConstantND": lambda layer: weights_of(layer.data).view(tuple(layer.shape)),
    "add": lambda layer, x, y=None: x + (layer.alpha if y is None else y),
    "multiply": lambda layer, x, y=None: x * (layer.alpha if y is None else y),
    "addBroadcastable": lambda layer, x, y: x + y,
    "subtractBroadcastable": lambda layer, x, y: x - y,
    "multiplyBroadcastable": lambda layer, x, y: x * y,
    "divideBroadcastable": lambda layer, x, y: x / y,
    "activation": lambda layer, x: ACTIVATIONS[layer.WhichOneof("NonlinearityType")](x, getattr(layer, layer.WhichOneof("NonlinearityType"))),
    "unary": lambda layer, x: UNARY[layer.Operation.Name(layer.type)](layer.scale * x + layer.shift, layer),
    "gelu": lambda layer, x: _gelu(x, mode=layer.GeluMode.Name(layer.mode)),
    "clip": lambda layer, x: x.clamp(layer.minVal, layer.maxVal),
    "softmaxND": lambda layer, x: x.softmax(layer.axis),
    "reduceMean": _layer_reduce(torch.mean),
    "reduceSum": _layer_reduce(torch.sum),
    "reshapeStatic": _layer_reshape,
    "rankPreservingReshape": _layer_reshape,
    "transpose": lambda layer, x: x.permute(tuple(layer.axes)),
    "squeeze": lambda layer, x: x.squeeze(tuple(layer.axes)),
    "concat": lambda layer, *values: torch.cat(values, -3),
    "concatND": lambda layer, *values: _concat(values=values, axis=layer.axis, interleave=layer.interleave),
    "splitND": lambda layer, x: x.split(tuple(layer.splitSizes) or x.shape[layer.axis] // layer.numSplits, layer.axis),
    "upsample": _layer_upsample,
    "pooling": _layer_pooling,
    "slice": _layer_slice,
    "scatter": _layer_scatter,
    "mvn": _layer_mvn,
    "scale": _layer_scale,
    "batchnorm": _layer_batchnorm,
}


class Network:
    """A neural-network classifier of the old format (its protobuf message), evaluated layer by layer in float32."""

    def __init__(self, message):
        self.message = message

    def unknown_operators(self) -> list[str]:
        return sorted({layer.WhichOneof("layer") for layer in self.message.layers} - set(LAYERS))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (1, 3, H, W) -> logits (1, C): what goes into the softmax whose result the labels are given for."""
        scaler = self.message.preprocessing[0].scaler
        bias = torch.tensor([scaler.redBias, scaler.greenBias, scaler.blueBias]).view(-1, 1, 1)
        known = {self.message.preprocessing[0].featureName: pixels * scaler.channelScale + bias}
        for layer in self.message.layers:
            kind = layer.WhichOneof("layer")
            given = [known[name] for name in layer.input]
            if kind == "softmaxND" and layer.output[0] == self.message.labelProbabilityLayerName:
                return given[0]
            out = LAYERS[kind](getattr(layer, kind), *given)
            known.update(zip(layer.output, out if isinstance(out, tuple) else (out,), strict=True))
        raise InputError("its layers do not end in the class probabilities: it was not exported as a classifier")
