"""A short version of benchmarks/failing_rewards.py: rewards that are killed, raise, give nan and hang; the counts must add up."""

from __future__ import annotations

import pytest
from failing_rewards import TROUBLE, chaos


@pytest.mark.usefixtures("ray_cluster")
def test_the_run_completes_and_every_group_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TROUBLE, "nan", 0.3)  # so short a run meets one soon
    found = chaos(8.0, every_s=2.5, workers=2, meet=("dropped/not_finite", "preference/pairs"))
    assert found["steps"] > 0
    assert found["killed"] > 0
    assert found["not_finite"] > 0
    assert found["asked"] == found["scored"] + sum(found[name] for name in ("lost", "deadline", "error", "not_finite"))
    assert found["pairs"] > 0
