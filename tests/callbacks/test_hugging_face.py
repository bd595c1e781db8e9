"""The Trainer of Hugging Face trains, logs and saves the same with the callback and without."""

import sys

import pytest
import torch

from torchlinop import HessianOperator
from torchlinop.callbacks import CurvatureWatch, TopEigenvalues, Trace, hugging_face_callback
from torchlinop.errors import OptionError
from torchlinop.losses import hf_lm_loss

TOKENS = torch.randint(0, 40, (12, 8))
HELD = {"input_ids": TOKENS[:2], "labels": TOKENS[:2]}


def hessian_of(model):
    return HessianOperator(model, [HELD], hf_lm_loss())


def watch_every(steps, *measures):
    return CurvatureWatch(hessian_of, measures or [TopEigenvalues(1)], every=steps)


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OptionError, match=r'transformers; run: pip install "torchlinop\[hf\]"'):
        hugging_face_callback(watch_every(1))


class State:
    """What the Trainer tells its callbacks."""

    global_step, log_history = 0, []


class Control:
    """What callbacks tell the Trainer."""

    should_log = True


def test_numbers_go_to_log_or_else_to_the_history_of_the_trainer():
    transformers = pytest.importorskip("transformers")
    logged, state, model = [], State(), tiny_gpt2()
    told = hugging_face_callback(watch_every(1), logged.append)
    assert isinstance(told, transformers.TrainerCallback)
    told.on_train_begin(None, state, Control(), model=model)
    hugging_face_callback(watch_every(1)).on_train_begin(None, state, Control(), model=model)
    (ours,), (theirs,) = logged, state.log_history
    assert ours["curvature/eigenvalue_1"] == theirs["curvature/eigenvalue_1"]
    assert theirs["step"] == 0


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # dropout 0.1 wherever there is one


@pytest.fixture
def trained(tmp_path):
    """Trains a tiny GPT-2: the weights, the Trainer and the random state of after."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def train(watch=None, **options):
        arguments = TrainingArguments(
            tmp_path / str(watch is None), use_cpu=True, seed=3, max_steps=6, save_strategy="no",
            per_device_train_batch_size=4, logging_steps=2, learning_rate=1e-2,
            disable_tqdm=True, **{"report_to": []} | options,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in TOKENS]
        trainer = Trainer(tiny_gpt2(), arguments, train_dataset=data)
        if watch is not None:
            trainer.add_callback(hugging_face_callback(watch, trainer.log))
        trainer.train()
        return trainer, torch.rand(3)

    return train


def without_times(history):
    """Rows of the Trainer's own, without what a clock measured."""
    clocks = ("runtime", "per_second", "total_flos")
    own = [row for row in history if not any(name.startswith("curvature") for name in row)]
    return [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in own]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [1, 2])
def test_training_is_bit_identical_with_and_without(trained, every):
    plain, plain_random = trained()
    watch = watch_every(every, TopEigenvalues(1), Trace(4))
    watched, watched_random = trained(watch)
    weights = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert torch.equal(plain_random, watched_random)
    assert without_times(plain.state.log_history) == without_times(watched.state.log_history)
    curvature = [row for row in watched.state.log_history if "curvature/trace" in row]
    assert [row["step"] for row in curvature] == list(range(0, 7, every))
    assert [row["curvature/trace"] for row in curvature] == [
        row["curvature/trace"] for row in watch.history
    ]


@pytest.mark.filterwarnings("ignore")
def test_numbers_are_those_of_the_model_in_full_precision_where_it_trains_in_bfloat16(trained):
    watch = watch_every(6, Trace(4))
    trainer, _ = trained(watch, bf16=True)
    model = tiny_gpt2()
    model.load_state_dict(trainer.model.state_dict())
    alone = watch_every(6, Trace(4))(6, model)
    assert watch.scalars()["curvature/trace"] == alone["curvature/trace"]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_the_numbers(trained, tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained(watch_every(3), report_to=["tensorboard"])
    events = tensorboard.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/curvature/eigenvalue_1")] == [0, 3, 6]
