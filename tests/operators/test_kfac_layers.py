"""What a layer computes, and its gradients, follow from the features and gradients K-FAC takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop.errors import KFACCoverageError
from torchlinop.operators.kfac.features import Dense, OneHot
from torchlinop.operators.kfac.patches import patches
from torchlinop.operators.kfac.rules import layer_of
from torchlinop.testing import dense_kfac, gallery

CONVOLUTIONS = {
    "1d": (nn.Conv1d, (2, 3, 2), {}, (7,)),
    "1d, strided and dilated": (nn.Conv1d, (2, 3, 3), {"stride": 2, "dilation": 2}, (9,)),
    "2d": (nn.Conv2d, (2, 4, (3, 2)), {"stride": (1, 2), "padding": (2, 1)}, (5, 4)),
    "same": (nn.Conv2d, (2, 4, (3, 2)), {"padding": "same", "dilation": (1, 2)}, (4, 5)),
    "valid": (nn.Conv2d, (2, 4, 2), {"padding": "valid"}, (4, 3)),
    "groups": (nn.Conv2d, (4, 6, 2), {"groups": 2, "padding": 1}, (3, 3)),
    "depthwise": (nn.Conv1d, (4, 4, 2), {"groups": 4}, (5,)),
    "circular": (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (4, 4)),
    "reflect": (nn.Conv2d, (2, 3, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (4, 4)),
    "replicate": (nn.Conv1d, (2, 3, 3), {"padding": 2, "padding_mode": "replicate"}, (4,)),
    "same, circular": (
        nn.Conv1d,
        (2, 3, 4),
        {"padding": "same", "padding_mode": "circular"},
        (6,),
    ),
    "3d": (nn.Conv3d, (2, 3, (2, 1, 2)), {"stride": (1, 2, 1), "padding": (0, 1, 1)}, (3, 4, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_its_weight_times_the_patches(name):
    build, arguments, options, size = CONVOLUTIONS[name]
    module = build(*arguments, **options).double()
    x = torch.randn(3, arguments[0], *size).double()
    a = patches(module, x)  # (R, positions, groups, d_in)
    W = module.weight.flatten(1).unflatten(0, (module.groups, -1))
    y = torch.einsum("rpgi,goi->rgop", a, W).flatten(1, 2) + module.bias[:, None]
    torch.testing.assert_close(y, module(x).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_are_those_of_loops_over_places_and_kernels(name):
    build, arguments, options, size = CONVOLUTIONS[name]
    module = build(*arguments, **options).double()
    x = torch.randn(1, arguments[0], *size).double()
    assert torch.equal(patches(module, x)[0], dense_kfac._positions(module, x))


class ShiftedRMSNorm(nn.Module):
    """As Gemma has it: scaled by 1 + w."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(4))

    def forward(self, x):
        return F.rms_norm(x, (4,)) * (1 + self.weight)


def conv1d_of_hugging_face():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(3, 4)


LAYERS = {
    "Linear": (lambda: nn.Linear(4, 3), torch.randn(2, 5, 4)),
    "Linear without bias": (lambda: nn.Linear(4, 3, bias=False), torch.randn(2, 4)),
    "Conv1D": (conv1d_of_hugging_face, torch.randn(2, 5, 4)),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), torch.randn(2, 4, 3, 3)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2, padding=1), torch.randn(2, 1, 2, 3, 2)),
    "Embedding": (lambda: nn.Embedding(5, 3), torch.tensor([[0, 3, 3], [1, 4, 0]])),
    "Embedding, padded": (
        lambda: nn.Embedding(5, 3, padding_idx=3),
        torch.tensor([[0, 3], [3, 1]]),
    ),
    "LayerNorm": (lambda: nn.LayerNorm((2, 4)), torch.randn(2, 3, 2, 4)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), torch.randn(2, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), torch.randn(2, 3, 4)),
    "1 + w": (ShiftedRMSNorm, torch.randn(2, 3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4).eval(), torch.randn(2, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 3, 2)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(4, affine=True), torch.randn(2, 4, 5)),
}


def of_samples(layer, key, x, g):
    """The gradient of every sample, by K-FAC's features."""
    samples = len(x)
    g_ns = layer.by_position(g[None], samples)
    if layer.kind == "normalisation":
        a = layer.normalised(x, samples)
        return ((a if key == "weight" else 1) * g_ns[0]).sum(1)
    features = layer.features(x, samples, None)
    if key == "bias":
        features = features.ones()
    G = features.pair(layer.without_padding(g_ns, x, samples))[0]
    return G.mT if layer.inputs_first else G


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_samples_follow_from_features_and_output_gradients(name):
    build, x = LAYERS[name]
    module, x = build().double(), x.double() if x.is_floating_point() else x
    layer = layer_of("layer", module)
    g = torch.randn_like(module(x))
    for key, parameter in module.named_parameters():
        found = of_samples(layer, key, x, g)
        for n in range(len(x)):
            (exact,) = torch.autograd.grad(module(x[n : n + 1]), parameter, g[n : n + 1])
            torch.testing.assert_close(found[n].reshape(exact.shape), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(1, 1, 2),
        nn.LSTM(2, 2),
        nn.Bilinear(2, 2, 2),
        nn.Embedding(3, 2, max_norm=1.0),
        nn.Embedding(3, 2, scale_grad_by_freq=True),
    ],
)
def test_other_modules_have_no_rule(layer):
    assert layer_of("layer", layer) is None


def test_inputs_that_do_not_begin_with_samples_are_refused():
    message = r"input of inner to begin with an axis of 4 samples, got shape \(5, 6, 3\); put"
    with pytest.raises(KFACCoverageError, match=message):
        layer_of("inner", nn.Linear(3, 2)).refuse_other_axes(torch.zeros(5, 6, 3), 4)
    with pytest.raises(KFACCoverageError, match="input of the model itself to begin"):
        layer_of("", nn.Linear(3, 2)).refuse_other_axes(torch.zeros(5, 3), 4)


def fits(layer, x, y):
    try:
        return layer.fits(x.to("meta"), y.to("meta"), len(x))
    except RuntimeError:  # the shapes do not even allow the products
        return False


@pytest.mark.parametrize("name", LAYERS)
def test_layers_fit_the_shapes_they_have_and_no_others(name):
    build, x = LAYERS[name]
    module = build().to(torch.float32)
    x = x.to(torch.float32) if x.is_floating_point() else x
    layer, y = layer_of("layer", module), module(x)
    assert fits(layer, x, y)
    assert not fits(layer, x, y.new_empty(*y.shape[:-1], 11))
    assert not fits(layer, x, y.new_empty(2, 13, *y.shape[2:]))


@pytest.mark.parametrize("groups", [1, 2])
def test_rotated_pairs_are_pairs_rotated(groups):
    a, g = torch.randn(3, 4, groups, 5).double(), torch.randn(2, 3, 4, 6).double()
    Q_out, Q_in = (torch.linalg.qr(torch.randn(d, d).double())[0] for d in (6, 5))
    features = Dense(torch.ones(3, 4).double(), a)
    expected = Q_out.T @ features.pair(g) @ Q_in
    torch.testing.assert_close(features.rotated_pair(g, Q_out, Q_in), expected)
    torch.testing.assert_close(features.rotated_pair(g, None, None), features.pair(g))


def test_squares_of_single_positions_are_products_of_squares():
    features = Dense(torch.ones(3, 1).double(), torch.randn(3, 1, 1, 5).double())
    g = torch.randn(2, 3, 1, 6).double()
    Q_out, Q_in = (torch.linalg.qr(torch.randn(d, d).double())[0] for d in (6, 5))
    expected = features.rotated_pair(g, Q_out, Q_in).square().sum((0, 1))
    torch.testing.assert_close(features.squared_pair(g, Q_out, Q_in), expected)


@pytest.mark.parametrize("rotated", [True, False])
def test_one_hot_features_are_unit_vectors(rotated):
    ids, counted = (
        torch.tensor([[0, 2, 2], [1, 0, 3]]),
        torch.tensor([[1, 1, 0], [1, 1, 1]]).double(),
    )
    one_hot, dense = OneHot(counted, ids, 5), Dense(counted, F.one_hot(ids, 5).double()[:, :, None])
    g = torch.randn(2, 2, 3, 4).double()
    Q_out, Q_in = (torch.linalg.qr(torch.randn(d, d).double())[0] for d in (4, 5))
    Q_in = Q_in if rotated else None
    expected = dense.rotated_pair(g, Q_out, Q_in)
    torch.testing.assert_close(one_hot.rotated_pair(g, Q_out, Q_in), expected)
    torch.testing.assert_close(one_hot.moment().diag(), dense.moment())


def test_features_are_averaged_over_positions_that_count():
    a, counted = torch.randn(2, 3, 1, 4).double(), torch.tensor([[1, 1, 0], [1, 0, 0]]).double()
    reduced = Dense(counted, a).reduced()
    torch.testing.assert_close(reduced.a[0, 0, 0], (a[0, 0, 0] + a[0, 1, 0]) / 2)
    torch.testing.assert_close(reduced.a[1, 0, 0], a[1, 0, 0])


def test_the_gallery_has_convolutions_of_every_sort():
    kinds = [m for m in gallery.convolutions().model if isinstance(m, nn.Conv2d)]
    assert [m.padding_mode for m in kinds] == ["circular", "zeros"]
    assert [m.groups for m in kinds] == [2, 1]
