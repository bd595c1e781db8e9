"""What options(...) says holds for every call inside, and for none outside."""

import io
import re
import threading

import pytest
import torch

import torchlinop
from torchlinop import HessianOperator, MatrixOperator, as_linear_operator, lanczos, options
from torchlinop.errors import NonDeterministicDataError, OptionError
from torchlinop.settings import checks_wanted, hidden

A = MatrixOperator(torch.diag(torch.arange(1.0, 31.0)))


class Stream(io.StringIO):
    """A stream that claims to be a terminal, or not to be one."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("setting", [True, False])
def test_progress_is_shown_or_hidden_in_all_calls_whatever_they_ask(setting, monkeypatch):
    screen = Stream(terminal=not setting)
    monkeypatch.setattr("sys.stderr", screen)
    with options(progress=setting):
        lanczos(A, 2, progress=not setting)
        as_linear_operator(A, progress=not setting) @ torch.ones(30).numpy()
    assert ("matvec" in screen.getvalue()) == setting


def test_calls_decide_where_no_option_does(monkeypatch):
    screen = Stream(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    with options():
        lanczos(A, 2)
        assert "matvec" not in screen.getvalue()
        lanczos(A, 2, progress=True)
    assert "matvec" in screen.getvalue()


def test_inner_options_hold_until_their_end_and_leave_the_others_as_they_are():
    with options(progress=False, checks=False):
        with options(progress=True):
            assert (hidden(False), checks_wanted()) == (False, False)
        with pytest.raises(ZeroDivisionError), options(checks=True):
            1 / (not checks_wanted())
        assert (hidden(True), checks_wanted()) == (True, False)
    assert (hidden(True), hidden(False), checks_wanted()) == (None, True, True)


def test_options_decorate_a_function():
    @options(progress=False)
    def inside():
        return hidden(True)

    assert (inside(), inside(), hidden(True)) == (True, True, None)


def test_options_hold_in_the_thread_that_entered_them():
    seen = []
    with options(checks=False):
        thread = threading.Thread(target=lambda: seen.append(checks_wanted()))
        thread.start()
        thread.join()
    assert seen == [True]


@pytest.mark.parametrize("name", ["progress", "checks"])
def test_options_that_are_no_truth_values_are_refused(name):
    message = f"expected {name} to be True or False, got 'no'; leave it out"
    with pytest.raises(OptionError, match=re.escape(message)), options(**{name: "no"}):
        pass


class Counted(torch.utils.data.Dataset):
    """Samples that are counted as they are read, and that change from pass to pass if asked."""

    def __init__(self, changing=False):
        self.reads, self.changing = 0, changing

    def __len__(self):
        return 12

    def __getitem__(self, i):
        self.reads += 1
        noise = torch.randn(3) if self.changing else torch.zeros(3)
        return torch.full((3,), float(i)) + noise, torch.tensor([i / 12])


def _hessian(dataset):
    def loss_fn(model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    data = torch.utils.data.DataLoader(dataset, batch_size=4)
    return HessianOperator(torch.nn.Linear(3, 1), data, loss_fn, pin_data=False)


def test_without_checks_two_passes_over_the_data_are_saved():
    reads = []
    for checks in (True, False):
        dataset = Counted()
        with torchlinop.options(checks=checks):
            _hessian(dataset)
        reads.append(dataset.reads)
    assert reads[0] - reads[1] == 2 * 12


def test_checks_find_what_is_not_seen_without_them():
    with pytest.raises(NonDeterministicDataError):
        _hessian(Counted(changing=True))
    with torchlinop.options(checks=False):
        assert _hessian(Counted(changing=True)).size == 4
