"""An error on one rank is an error on all: the same class and sentence, in time."""

import pytest
import torch
import torch.distributed as dist
from processes import failures, on_ranks

from torchlinop.distributed.agreement import agreed, process_group
from torchlinop.errors import OptionError, ProcessGroupError, WeightingError


class OddError(Exception):
    def __init__(self, code, reason):
        super().__init__(code, reason)


def raises(errors):
    """``errors[rank]`` is raised, unless it is None; afterwards the ranks can still talk."""
    rank = dist.get_rank()
    caught = None
    try:
        with agreed():
            if errors[rank] is not None:
                raise errors[rank]
    except BaseException as error:
        caught = error
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert float(ones) == dist.get_world_size()
    if caught is not None:
        raise caught


def in_a_group_of_others():
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        process_group(group)


def test_nothing_raised_is_nothing_raised():
    assert failures(2, raises, [None, None]) == [None, None]


def test_what_one_rank_raises_all_raise_naming_it():
    expected = ("WeightingError", "on rank 1 of 2: no rule fits")
    assert failures(2, raises, [None, WeightingError("no rule fits")]) == [expected] * 2


def test_what_all_raise_alike_names_no_rank():
    error = OptionError("expected seed to be an integer")
    assert failures(2, raises, [error, error]) == [("OptionError", str(error))] * 2


def test_of_several_errors_that_of_the_lowest_rank_is_told():
    errors = [None, ValueError("one"), KeyError("two"), None]
    expected = ("ValueError", "on rank 1 of 4: one (1 other rank failed too)")
    assert failures(4, raises, errors) == [expected] * 4


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("weight"), "on rank 0 of 2: 'weight' (KeyError)"),  # str() puts it in quotes
        (OddError(3, "odd"), "on rank 0 of 2: (3, 'odd') (OddError)"),
    ],
)
def test_an_error_that_cannot_be_made_again_keeps_its_sentence(error, sentence):
    assert failures(2, raises, [error, None]) == [("RankError", sentence)] * 2


def test_an_interruption_of_one_rank_ends_the_others():
    interrupted, other = failures(2, raises, [KeyboardInterrupt(), None])
    assert interrupted == ("KeyboardInterrupt", "")
    assert other == ("RankError", "on rank 0 of 2: no message (KeyboardInterrupt)")


def test_without_a_process_group_the_message_says_how_to_make_one():
    with pytest.raises(ProcessGroupError, match="init_process_group"):
        process_group()


def test_a_group_without_this_process_is_refused():
    (first, second) = failures(2, in_a_group_of_others)
    assert first is None
    assert second == (
        "ProcessGroupError",
        "expected a process group with this process in it, which is rank 1 of all; "
        "build the operator on the ranks of its group only",
    )


def test_the_harness_runs_one_rank_too():
    assert on_ranks(1, raises, [None]) == [None]
