"""Every published architecture against numbers measured on its reference implementation. A golden file joins by its name."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import model
from tests.conftest import ROOT
from tests.golden.golden import golden_input, load_golden_weights
from tests.nets import relative_error

GOLDENS = sorted((ROOT / "tests" / "golden" / "models").glob("*.npz"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_reference_is_met(path):
    golden = np.load(path)
    name = path.stem.replace(".", "_")
    has_dist_head = any("dist" in key for key in golden["keys"])
    net = model.create_model(name, distillation=has_dist_head, drop_rate=0.0, drop_path_rate=0.0)
    state = net.state_dict()
    assert list(state) == golden["keys"].tolist()
    assert [",".join(map(str, value.shape)) for value in state.values()] == golden["shapes"].tolist()
    assert sum(parameter.numel() for parameter in net.parameters()) == golden["n_parameters"]

    net, seed = load_golden_weights(net.double(), skip=("rotations",)).eval(), int(golden["x_seed"])
    x = golden_input(golden["x_shape"], seed, dtype=torch.float64)
    logits = torch.from_numpy(golden["logits"])
    with torch.no_grad():
        assert relative_error(net(x), logits) < 1e-6
        assert relative_error(copy.deepcopy(net).float()(x.float()), logits) < 1e-5

    outputs = net.train()(golden_input(golden["train_shape"], seed + 1, dtype=torch.float64))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    targets = torch.arange(len(outputs[0])) * 37 % 1000
    loss = sum(cross_entropy(logits, targets) for logits in outputs) / len(outputs)
    loss.backward()
    assert abs(loss.item() - golden["train_loss"]) < 1e-8
    norms = {key: parameter.grad.norm().item() for key, parameter in net.named_parameters()}
    assert norms.keys() == set(golden["grad_names"])
    errors = [abs(norms[key] - norm) for key, norm in zip(golden["grad_names"], golden["grad_norms"], strict=True)]
    assert max(errors) < 1e-6 * golden["grad_norms"].max()


def test_every_published_family_has_goldens():
    assert len(GOLDENS) == 46
