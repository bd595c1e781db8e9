"""Configurations mean what they say, or are refused."""

import pytest
import torch

from torchlinop.errors import OptionError
from torchlinop.spectrum import LanczosConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reorth_mode": "sliding"}, "unknown reorth_mode 'sliding'; choose one of auto, full"),
        ({"regularization_mode": "on"}, "unknown regularization_mode 'on'; choose one of off"),
        ({"regularization": -1.0}, "expected regularization from 0 on, got -1.0"),
        ({"dtype_tridiag": torch.float32}, "expected dtype_tridiag to be torch.float64"),
        ({"num_steps": 0}, "expected num_probes from 0 and num_steps from 1 on, got 4 and 0"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        LanczosConfig(**options)
