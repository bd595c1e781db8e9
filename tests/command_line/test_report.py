"""Results on stdout; warnings and logs on stderr, a line each, and as many as were asked for."""

import logging
import sys
import warnings

import pytest

from torchlinop.command_line import main
from torchlinop.command_line.report import place_of

SOURCE = """
def build():
    import logging, warnings
    logging.getLogger("torchlinop").info("a decision")
    logging.getLogger("torchlinop").warning("an oddity")
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 3))
    return model, (torch.randn(9, 6), torch.randint(0, 3, (9,))), nn.CrossEntropyLoss()
"""


def test_warnings_and_logs_are_a_line_each_on_stderr(spec, capsys):
    assert main(["trace", spec(SOURCE)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("TraceResult")
    told = err.splitlines()
    assert told[0] == "WARNING: an oddity"
    assert told[1].startswith("warning: model.training is True; 1 Dropout")
    assert len(told) == 2


def test_decisions_are_logged_if_asked_for(spec, capsys):
    assert main(["trace", spec(SOURCE), "--verbose"]) == 0
    assert "INFO: a decision\n" in capsys.readouterr().err


def test_what_is_not_converged_is_said_once_by_the_result(mlp, capsys):
    assert main(["eigs", mlp, "-k", "5", "--max-matvecs", "8"]) == 1
    out, err = capsys.readouterr()
    assert "of 5 pairs reached tol" in out
    assert err == ""


def test_the_matrix_is_told_on_a_terminal(mlp, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["trace", mlp]) == 0
    assert capsys.readouterr().err.startswith("<HessianOperator 53x53 float32 cpu | ")


def test_filters_and_handlers_are_put_back(mlp):
    logger = logging.getLogger("torchlinop")
    before = [*logger.handlers], logger.level, [*warnings.filters], warnings.showwarning
    assert main(["trace", mlp, "-v"]) == 0
    assert ([*logger.handlers], logger.level, [*warnings.filters], warnings.showwarning) == before


def test_an_error_is_placed_in_the_line_of_the_user():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 3)(torch.ones(5))
    assert place_of(caught.value).startswith("test_report.py, line ")
