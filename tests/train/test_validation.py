"""The standard error that a validation states, against the spread over seeds of its noise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from support.modules import make_module

from dlm.data.noise import stratified_t, uniforms
from dlm.train.objectives.masked_diffusion import MaskedDiffusion

SEQUENCES, DRAWS, LENGTH, SEEDS = 8, 8, 16, 60


@pytest.mark.parametrize("estimator", ["mc", "exact_count"])
def test_the_standard_error_of_a_validation_is_its_spread_over_seeds(estimator):
    """Exactly so for independent times; for the stratified ones that a run draws it is an upper bound."""
    objective = MaskedDiffusion(vocab_size=256, estimator=estimator, eps=0.1)
    module = make_module(objective=objective)
    with torch.no_grad():
        module.model.head.weight.mul_(8)  # wrong in different ways at different places, as a trained model is
    texts_BT = np.random.default_rng(0).integers(0, 256, (SEQUENCES, LENGTH)).repeat(DRAWS, axis=0)
    draw_B = np.arange(len(texts_BT))

    def spread_and_stated(times):
        losses, errors = zip(*(validated(module, objective.probe(texts_BT, times(seed), noise(seed)))
                               for seed in range(SEEDS)), strict=True)  # fmt: skip
        return np.std(losses, ddof=1), np.sqrt(np.mean(np.square(errors)))

    def noise(seed):
        return uniforms(seed, 0, len(draw_B), LENGTH)

    spread, stated = spread_and_stated(lambda seed: np.random.default_rng(seed).random(len(draw_B)))
    low, high = np.sqrt(stats.chi2.ppf([1e-3, 1 - 1e-3], SEEDS - 1) / (SEEDS - 1))
    assert low < spread / stated < high
    spread, stated = spread_and_stated(lambda seed: stratified_t(seed, 0, draw_B))
    assert spread / stated < high


def validated(module, batch):
    """(loss, standard error) of a validation of one batch."""
    datamodule = SimpleNamespace(validation_rows=lambda: np.arange(SEQUENCES))
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor, root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(datamodule=datamodule, strategy=strategy, global_step=0, precision="32-true")
    module.log = lambda *_, **__: None
    module.setup("validate")
    tensors = {name: torch.as_tensor(value) for name, value in batch.items()}
    module.on_validation_epoch_start()
    with torch.no_grad():
        module.validation_step({**tensors, "sequence": np.arange(SEQUENCES), "draws": DRAWS}, 0)
    module.on_validation_epoch_end()
    return module.validation_loss
