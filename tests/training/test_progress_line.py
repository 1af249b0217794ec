"""The progress line of a training step."""

import io
import time

from flashdmd_ray.config import load_config
from flashdmd_ray.monitor import ranking
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.training.progress_line import ProgressLine, legend, shown_figures

ALWAYS = ("lr", "img/s", "GiB")
RANKING = {"ranking/latent/749": 0.2, "ranking/latent/749/best_beats_worst": 0.6}


def test_what_is_said_of_a_step_does_not_take_its_time_from_the_line():
    stream = io.StringIO()
    with Progress(total=10, stream=stream) as progress:
        time.sleep(0.05)
        ProgressLine(load_config(), progress).after_step(1, RANKING)
    assert len(ranking.summary(RANKING)) == 1
    assert set(shown_figures(load_config(None, ["preference.updates=0"])).values()) == {
        "gap",
        "D real",
        "D fake",
        *ALWAYS,
    }
    assert all(f"{label}: " in legend(load_config()) for label in shown_figures(load_config()).values())
    line = next(line for line in stream.getvalue().splitlines() if line.startswith("step"))
    assert " 0.00 s/step" not in line
