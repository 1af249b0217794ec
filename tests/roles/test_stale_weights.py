"""A worker that samples with stale weights is named."""

import pytest
import torch
from torch import nn

from flashdmd_ray.batch import PublishedWeights
from flashdmd_ray.config import load_config
from flashdmd_ray.roles.rollout import UNCHANGED_VERSIONS_ALLOWED, Rollout, StaleWeightsCheck


def test_new_weights_must_show_at_once_in_float32():
    proof = StaleWeightsCheck("rollout-3", exact=True)
    proof.check(0, True, "one")
    proof.check(1, False, "one")  # the same weights again
    proof.check(2, True, "two")
    with pytest.raises(ValueError, match=r"^rollout-3: weights of version 3 differ .* stale weights$"):
        proof.check(3, True, "two")


def test_half_precision_may_round_small_changes_away_but_not_for_ever():
    proof = StaleWeightsCheck("rollout-0", exact=False)
    for version in range(UNCHANGED_VERSIONS_ALLOWED + 1):
        proof.check(version, True, "same")
    with pytest.raises(ValueError, match="rollout-0"):
        proof.check(99, True, "same")
    patient = StaleWeightsCheck("rollout-0", exact=False)
    for version in range(5 * UNCHANGED_VERSIONS_ALLOWED):
        patient.check(version, True, f"output {version // UNCHANGED_VERSIONS_ALLOWED}")


def test_a_rollout_worker_proves_that_its_output_follows_its_weights(monkeypatch):
    rollout = Rollout.from_config(load_config(None, ["runtime=local"]), rank=2)
    weights = {name: tensor.clone() for name, tensor in rollout.network.state_dict().items()}

    def publish(version: int) -> PublishedWeights:
        return PublishedWeights(version, weights, str(version))

    rollout.load_weights(publish(0))
    name = next(name for name in weights if name.endswith("conv_in.weight"))
    weights[name][0, 0, 0, 0] += 1e-5  # less than one update
    rollout.load_weights(publish(1))
    monkeypatch.setattr(type(rollout.network), "forward", lambda self, noisy, *rest: noisy)
    weights[name][0, 0, 0, 0] += 1e-5
    rollout.load_weights(publish(2))  # the output changed, if only because the network became another
    weights[name][0, 0, 0, 0] += 1e-5
    with pytest.raises(ValueError, match="rollout-2: weights of version 3 differ"):
        rollout.load_weights(publish(3))
    assert isinstance(rollout.network, nn.Module)
    assert rollout.version == 2
    assert not torch.is_grad_enabled() or all(not p.requires_grad for p in rollout.network.parameters())
