"""The layout maps named tensors to slots of one flat vector, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchlinop import ParameterLayout, match_names, match_regex
from torchlinop.errors import NoParametersError, OptionError, ParameterError, VectorError
from torchlinop.testing import gallery

MODEL = gallery.mlp().model
LAYOUT = ParameterLayout.of(MODEL)


def test_slots_follow_named_parameters_row_major():
    flat = torch.cat([p.detach().flatten() for p in MODEL.parameters()])
    assert LAYOUT.names == tuple(dict(MODEL.named_parameters()))
    assert torch.equal(LAYOUT.flatten(dict(MODEL.named_parameters())), flat)


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=5))
def test_unflatten_inverts_flatten(shapes):
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
    layout = ParameterLayout.of(model)
    v = torch.randn(layout.size)
    assert torch.equal(layout.flatten(layout.unflatten(v)), v)
    V = torch.randn(layout.size, 2)
    assert torch.equal(layout.flatten(layout.unflatten(V)), V)


@pytest.mark.parametrize("patterns", ["2.*", ["0.weight"]])
def test_patterns_are_no_filter(patterns):
    message = r"expected param_filter to be a function .*; pass match_names\(...\)"
    with pytest.raises(OptionError, match=message):
        ParameterLayout.of(MODEL, patterns)


@pytest.mark.parametrize("select", [ParameterLayout.of, lambda m, f: LAYOUT.restrict(f)])
def test_a_filter_of_names_alone_is_refused(select):
    def is_a_weight(name):
        return name.endswith("weight")

    message = r"function \(name, parameter\) -> bool, got is_a_weight, which does not take two .*;"
    with pytest.raises(OptionError, match=message):
        select(MODEL, is_a_weight)


def test_unflatten_gives_views():
    v = torch.zeros(LAYOUT.size).double()
    LAYOUT.unflatten(v)["2.bias"].fill_(1)
    assert v.sum() == 3


def test_split_is_differentiable_and_shares_tensors_between_aliases():
    layout = ParameterLayout.of(gallery.tied().model)
    theta = torch.randn(layout.size).double().requires_grad_()
    named = layout.split(theta)
    assert named["head.weight"] is named["embed.weight"]
    (g,) = torch.autograd.grad(sum(named[n].sum() for n in layout.names), theta)
    assert torch.equal(g, torch.ones_like(g))


@pytest.mark.parametrize(
    ("param_filter", "selected"),
    [
        (match_names("0.*"), ("0.weight", "0.bias")),
        (match_names("*.bias"), ("0.bias", "2.bias")),
        (match_names("0.weight", "2.bias"), ("0.weight", "2.bias")),
        (match_regex(r"^2\."), ("2.weight", "2.bias")),
        (match_regex("weight"), ("0.weight", "2.weight")),
        (lambda name, p: p.ndim == 1, ("0.bias", "2.bias")),
    ],
)
def test_filters_select_by_name_or_parameter(param_filter, selected):
    assert ParameterLayout.of(MODEL, param_filter).names == selected


def test_a_tied_parameter_is_selected_by_any_of_its_names():
    layout = ParameterLayout.of(gallery.tied().model, match_names("head.*"))
    assert layout.names == ("embed.weight",)


def test_status_tells_what_became_of_every_name():
    model = gallery.tied().model
    model.mix.bias.requires_grad_(False)
    status = ParameterLayout.of(model, match_names("embed.*")).status
    assert status == {
        "embed.weight": "selected",
        "head.weight": "alias of embed.weight",
        "mix.bias": "frozen",
        "mix.weight": "filtered out",
    }


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_vectors_have_the_widest_dtype_and_float32_at_least(dtypes, expected):
    model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=d)) for d in dtypes])
    assert ParameterLayout.of(model).dtype == expected


def test_nothing_selected_counts_frozen_matches_and_names_the_closest():
    model = gallery.mlp().model
    model[0].weight.requires_grad_(False)
    message = (
        r"matches none of the 3 trainable parameters; 1 frozen ones match. Closest names: .*0.bias"
    )
    with pytest.raises(NoParametersError, match=message):
        ParameterLayout.of(model, match_names("0.weight"))


def test_a_model_without_trainable_parameters_is_refused():
    model = gallery.mlp().model.requires_grad_(False)
    with pytest.raises(NoParametersError, match=r"no trainable parameters \(4 are frozen\)"):
        ParameterLayout.of(model)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (nn.Parameter(torch.zeros(2, dtype=torch.complex64)), "is complex"),
        (nn.Parameter(torch.zeros(2, device="meta")), "is on the meta device"),
        (nn.UninitializedParameter(), "is not initialised"),
    ],
)
def test_parameters_that_do_not_fit_a_flat_real_vector_are_refused(parameter, message):
    with pytest.raises(ParameterError, match=f"parameter '0' {message}.*param_filter"):
        ParameterLayout.of(nn.ParameterList([parameter]))


@pytest.mark.parametrize("shape", [(5,), (1, 53), ()])
def test_unflatten_refuses_other_shapes(shape):
    with pytest.raises(VectorError, match=r"expected a vector of shape \(53,\) or a block"):
        LAYOUT.unflatten(torch.zeros(shape))


def test_flatten_names_the_tensor_that_is_missing():
    with pytest.raises(VectorError, match=r"'0\.bias' is missing; pass all of: 0\.weight, 0\.bias"):
        LAYOUT.flatten({"0.weight": torch.zeros(5, 6)})
