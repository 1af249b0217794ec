"""Parts are written by the processes that hold the tensors: several ranks, two groups, errors and losses."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from saving_roles import SAVING
from toy_roles import toy_config

from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors, open_store, read_state
from flashdmd_ray.runtime import WorkerLost, build_runtime
from flashdmd_ray.training.checkpoint_saver import CheckpointError, CheckpointSaver


@pytest.mark.usefixtures("ray_cluster")
def test_two_groups_and_ranks_save_and_fail(tmp_path: Path) -> None:
    config = toy_config(preference__updates=0, placement__learner__workers=2)
    with closing(build_runtime(config, SAVING)) as runtime:
        roles = (runtime.generator, runtime.score, runtime.discriminator)
        saver = CheckpointSaver(open_store(tmp_path, "run", keep=2), roles, asynchronous=True, deadline_s=120)
        for step in (1, 2):
            for role in roles:
                role.step()
            saver.save(step, {"step": step}, {})
        saver.wait()
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        found = {
            path.stem: load_tensors(path)["w"].unique().tolist() for path in newest.iterdir() if path.suffix != ".json"
        }
        assert found == {
            "Generator-0": [20],
            "Generator-1": [21],
            "ScoreEstimator-0": [20],
            "ScoreEstimator-1": [21],
            "Discriminator-0": [20],
        }

        runtime.score.name_with("x" * 300)
        saver.save(3, {"step": 3}, {})
        with pytest.raises(CheckpointError, match=r"step 3 could not be written .*ScoreEstimator-[01]\.safetensors"):
            saver.wait()
        runtime.score.step()  # the group is as well as before
        assert latest_checkpoint(tmp_path) == newest

        runtime.score.name_with("")
        saver.save(4, {"step": 4}, {})
        with pytest.raises(WorkerLost):
            runtime.generator.dies(only_rank=1)
        try:
            saver.wait()  # was the part written before the rank died?
        except WorkerLost:
            assert latest_checkpoint(tmp_path) == newest
        else:
            assert read_state(latest_checkpoint(tmp_path) or tmp_path) == {"step": 4}
