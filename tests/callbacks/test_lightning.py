"""The Trainer of Lightning trains the same with the callback and without."""

import sys

import pytest
import torch
from torch import nn

from torchlinop import HessianOperator
from torchlinop.callbacks import CurvatureWatch, TopEigenvalues, Trace, lightning_callback
from torchlinop.errors import OptionError

INPUTS, LABELS = torch.randn(24, 4), torch.randint(0, 3, (24,))
HELD = (INPUTS[:8], LABELS[:8])


def loss_fn(module, batch):
    return nn.functional.cross_entropy(module.network(batch[0]), batch[1])


def hessian_of(module):
    return HessianOperator(module, [HELD], loss_fn)


def test_without_lightning_the_message_says_what_to_install(monkeypatch):
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=r'lightning; run: pip install "torchlinop\[lightning\]"'):
        lightning_callback(CurvatureWatch(hessian_of))


@pytest.fixture
def trained(tmp_path):
    """Trains a network with dropout: the module, the rows logged and the random state of after."""
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
            )
            self.losses = []

        def training_step(self, batch, index):
            loss = loss_fn(self, batch)
            self.log("loss", loss)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    def train(*callbacks, **options):
        module = Module()
        data = torch.utils.data.TensorDataset(INPUTS, LABELS)
        loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
        logger = CSVLogger(tmp_path, name="with" if callbacks else "without")
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=logger, callbacks=[*callbacks],
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=50,
            default_root_dir=tmp_path, **{"enable_checkpointing": False} | options,
        )  # fmt: skip
        torch.manual_seed(1)
        trainer.fit(module, loader)
        return module, trainer, torch.rand(3)

    return train


@pytest.mark.filterwarnings("ignore")
def test_training_is_bit_identical_with_and_without(trained):
    plain, _, plain_random = trained()
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1), Trace(8)], every=3)
    watched, _, watched_random = trained(lightning_callback(watch))
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))
    assert torch.equal(torch.stack(plain.losses), torch.stack(watched.losses))
    assert torch.equal(plain_random, watched_random)
    assert [row["step"] for row in watch.history] == [0, 3, 6]


@pytest.mark.filterwarnings("ignore")
def test_every_number_reaches_the_logger_and_the_monitors(trained, tmp_path):
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1)], every=3)
    _, trainer, _ = trained(lightning_callback(watch))
    (written,) = tmp_path.glob("with/*/metrics.csv")
    header, *rows = [line.split(",") for line in written.read_text().splitlines()]
    column, step = header.index("curvature/eigenvalue_1"), header.index("step")
    found = {int(row[step]): float(row[column]) for row in rows if row[column]}
    assert found == {row["step"]: row["curvature/eigenvalue_1"] for row in watch.history}
    monitored = trainer.callback_metrics["curvature/eigenvalue_1"]
    assert float(monitored) == pytest.approx(watch.scalars()["curvature/eigenvalue_1"])


@pytest.mark.filterwarnings("ignore")
def test_steps_of_the_optimiser_are_counted_where_gradients_are_accumulated(trained):
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1)], every=1)
    trained(lightning_callback(watch), accumulate_grad_batches=2)
    assert [row["step"] for row in watch.history] == [0, 1, 2, 3, 4]
