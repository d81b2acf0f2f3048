"""LBC inside a Lightning Trainer and LightningModule that know nothing of tenfold."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.errors import StateError, UserError
from tenfold.methods import LBC
from tenfold.nn.blocks import nm_pattern
from tenfold.tasks.callback import MethodCallback
from tests.made_up import Gain

pytestmark = pytest.mark.path


class Plain(pl.LightningModule):
    def __init__(self, method=None):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)
        )
        self.method = method

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        parameters = self.network.parameters()
        if self.method is not None:
            parameters = self.method.parameters_for(self.network)
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(96) % 4), batch_size=16)


def fit(tmp_path, callback, module=None, **arguments):
    module = module or Plain()
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[callback], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **arguments,
    )  # fmt: skip
    trainer.fit(module, loader())
    return module, trainer


def test_one_callback_is_enough(tmp_path):
    callback = MethodCallback([LBC(n=2, m=4)], network="network")
    module, trainer = fit(tmp_path, callback)
    network = callback.finalize(module)
    assert network is module.network
    assert nm_pattern(network[0].weight) == (2, 4)
    assert nm_pattern(network[2].weight) == (2, 4)
    assert trainer.callback_metrics["density"] == 0.5


def test_scores_are_those_of_a_plain_loop(tmp_path):
    """Lightning's loop and a plain one end with the same weights, bit for bit."""
    callback = MethodCallback([LBC(n=2, m=4)], network="network")
    module, _ = fit(tmp_path, callback)
    plain, sparsity = Plain().network, LBC(n=2, m=4)
    sparsity.attach(plain, total_steps=24, steps_per_epoch=6)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
            sparsity.step()
    network = callback.finalize(module)
    for ours, theirs in zip(
        sparsity.finalize(plain).parameters(), network.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_micro_batches_are_not_steps(tmp_path):
    sparsity = LBC(n=2, m=4)
    callback = MethodCallback([sparsity], network="network")
    fit(tmp_path, callback, accumulate_grad_batches=4)
    assert sparsity.steps_done == 8  # 6 batches an epoch: 4 and the last 2


def test_owned_parameters_and_moments_under_lightning(tmp_path):
    gain = Gain()
    callback = MethodCallback([gain], network="network")
    module = Plain(gain)
    fit(tmp_path, callback, module)
    assert gain.calls.count("before_step") == gain.calls.count("step") == 24
    assert [c for c in gain.calls if c.startswith("epoch")] == [f"epoch {e}" for e in range(5)]
    assert gain.seen
    keys = list(callback.finalize(module).state_dict())
    assert keys == list(Plain().network.state_dict())
    again = Gain()
    with pytest.raises(UserError, match="parameters that Gain trains itself"):
        fit(tmp_path, MethodCallback([again], network="network"), Plain())


def test_a_checkpoint_carries_the_methods_state(tmp_path):
    def run(epochs, checkpoint=None):
        callback = MethodCallback([LBC(n=1, m=4)], network="network", steps_per_epoch=[6] * 4)
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[callback], logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Plain()
        trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
        return callback, module, trainer

    callback, module, _ = run(4)
    whole = callback.finalize(module)
    _, _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    callback, module, _ = run(4, tmp_path / "one.ckpt")
    resumed = callback.finalize(module)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


class BuiltInSetup(Plain):
    """Network and data come up in `setup`, as Lightning's own examples do."""

    def __init__(self):
        super().__init__()
        del self.network

    def setup(self, stage):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.data = loader()

    def train_dataloader(self):
        return self.data


def test_a_network_that_is_built_in_setup(tmp_path):
    callback = MethodCallback([LBC(n=2, m=4)], network="network")
    module = BuiltInSetup()
    trainer = pl.Trainer(
        max_steps=20, max_epochs=50, callbacks=[callback], logger=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    assert callback.methods[0].schedule.epoch_ends == [6, 12, 18, 20]
    assert nm_pattern(callback.finalize(module)[0].weight) == (2, 4)


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(UserError, match="Plain has no network 'model'"):
        fit(tmp_path, MethodCallback([LBC(n=2, m=4)]))
    with pytest.raises(StateError, match=r"call finalize after trainer\.fit"):
        MethodCallback([LBC(n=2, m=4)]).finalize(Plain())
