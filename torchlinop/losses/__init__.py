"""Losses of the model's outputs, with their derivatives in closed form where there is one."""

from torchlinop.losses.autograd import AutogradLoss, WithHvp
from torchlinop.losses.base import LossOfOutput, OutputMap, Terms, Uniform
from torchlinop.losses.binary_cross_entropy import BinaryCrossEntropyWithLogits
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.elementwise import ElementwiseLikelihood, ElementwiseLoss
from torchlinop.losses.huggingface import (
    hf_lm_forward,
    hf_lm_loss,
    hf_lm_loss_of_output,
    hf_lm_shifted_ce,
    hf_seq2seq_forward,
    hf_seq2seq_loss,
    hf_seq2seq_loss_of_output,
)
from torchlinop.losses.poisson import PoissonNLL, PoissonRateNLL
from torchlinop.losses.real_targets import GaussianNLL, Huber, MeanSquaredError, SmoothL1
from torchlinop.losses.recognition import criterion, loss_of_output
from torchlinop.losses.supervised import (
    cross_entropy_loss_of_output,
    mse_loss_of_output,
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
    supervised_per_sample_loss,
)
from torchlinop.losses.targets import targets_of
from torchlinop.losses.transformer_lens import tlens_forward, tlens_loss, tlens_loss_of_output

__all__ = [
    "AutogradLoss",
    "BinaryCrossEntropyWithLogits",
    "CrossEntropy",
    "ElementwiseLikelihood",
    "ElementwiseLoss",
    "GaussianNLL",
    "Huber",
    "LossOfOutput",
    "MeanSquaredError",
    "OutputMap",
    "PoissonNLL",
    "PoissonRateNLL",
    "SmoothL1",
    "Terms",
    "Uniform",
    "WithHvp",
    "criterion",
    "cross_entropy_loss_of_output",
    "hf_lm_forward",
    "hf_lm_loss",
    "hf_lm_loss_of_output",
    "hf_lm_shifted_ce",
    "hf_seq2seq_forward",
    "hf_seq2seq_loss",
    "hf_seq2seq_loss_of_output",
    "loss_of_output",
    "mse_loss_of_output",
    "supervised_forward",
    "supervised_loss",
    "supervised_loss_of_output",
    "supervised_per_sample_loss",
    "targets_of",
    "tlens_forward",
    "tlens_loss",
    "tlens_loss_of_output",
]
