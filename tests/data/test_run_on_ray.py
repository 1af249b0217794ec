"""A run on archives with images decoded by Ray Data gives the bits of the run in one process."""

import pytest
import torch
from scenes_on_disk import samples, write_tars

from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.runtime import build_runtime

STEPS = 4


class Recorded:
    preference_rate = 1.0

    def __init__(self):
        self.metrics = []

    def steps(self):
        return range(STEPS)

    def finish(self, step, metrics):
        self.metrics.append(metrics)


@pytest.mark.usefixtures("ray_cluster")
def test_decoding_on_ray_is_bit_identical(tmp_path):
    write_tars(tmp_path / "data", samples(30), each=8)
    common = [f"data.source={tmp_path / 'data'}", f"data.cache={tmp_path / 'cache'}", "batch=2", "preference.updates=0"]

    def run(*settings):
        config = load_config(None, [*common, *settings])
        recorded, runtime = Recorded(), build_runtime(config)
        try:
            train(config, runtime, build_images(config.data, config.seed), recorded)
            return recorded.metrics, runtime.generator.weights(), runtime.discriminator.data_report()
        finally:
            runtime.close()

    threads = torch.get_num_threads()
    try:
        here, mine, one = run("runtime=local")
        there, theirs, two = run(
            "runtime=ray", "data.decode=ray", "placement.discriminator.within=learner", "deadlines.start_s=600"
        )
    finally:
        torch.set_num_threads(threads)
    assert here == there
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one == two == ()
