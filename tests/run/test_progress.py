"""Progress: plain lines in a log, a bar on a (pseudo) terminal."""

import io
import os
import pty
import re
import subprocess
import sys
from queue import Queue

from flashdmd_ray.run import progress
from flashdmd_ray.run.progress import Pace, Progress, clock, still


def test_lines_first_step_at_once_then_by_share_and_last_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(total=100, done=10, stream=stream) as display:
        display.say("loading models")
        for step in range(11, 101):
            now[0] += 2.0
            display.step(step, {"score": 0.25})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  0:00  loading models"
    assert lines[1] == "step  11/100   11 %  2.00 s/step  ETA 2:58  score 0.25"
    assert [int(line.split("/")[0].split()[-1]) for line in lines[1:]] == [*range(11, 101, 5), 100]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_long_steps_get_a_line_a_minute_and_short_ones_no_flood(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    for seconds, steps_between in ((61.0, 1), (0.011, 500)):
        stream = io.StringIO()
        display = Progress(total=10_000, stream=stream)
        for step in range(1, 2001):
            now[0] += seconds
            display.step(step, {})
        shown = [int(line.split("/")[0].split()[-1]) for line in stream.getvalue().splitlines()]
        assert shown == [*range(1, 2001, steps_between)]


def test_pace_leaves_out_steps_before_the_resume_and_loading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    pace = Pace(total=20, done=10)
    assert (pace.eta, pace.speed) == ("-:--", "- s/step")
    now[0] = 100.0
    pace.pause()
    for step in (11, 12):
        now[0] += 3.0
        pace.step(step)
    assert pace.speed == "3.00 s/step"
    assert pace.eta == "0:24"


def test_pace_forgets_the_first_interval_with_its_warm_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    pace = Pace(total=10, done=0)
    shown = []
    for step, seconds in enumerate((50.0, 2.0, 4.0), start=1):
        now[0] += seconds
        pace.step(step)
        shown.append(pace.speed)
    assert shown == ["50.00 s/step", "2.00 s/step", "3.00 s/step"]


def test_clock():
    assert [clock(s) for s in (0, 59.6, 75, 3675)] == ["0:00", "1:00", "1:15", "1:01:15"]


def test_a_terminal_gets_one_bar_with_messages_above_it():
    script = (
        "import logging; from flashdmd_ray.run.progress import Progress\n"
        "with Progress(3) as p:\n"
        " p.say('loading [models]'); logging.getLogger('x').warning('a warning')\n"
        " for s in (1, 2, 3): p.step(s, {'score': s / 4})\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while chunk := _read(ours):
            written += chunk
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    assert "loading [models]" in text, "square brackets are no markup"
    assert "a warning" in text
    assert re.search(r"step 3/3 ━+ 100 %  \d+\.\d\d s/step  ETA 0:00", text)
    assert "score 0.75" in text


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other side was closed
        return b""


def test_something_slow_says_that_it_goes_on(monkeypatch):
    monkeypatch.setattr("flashdmd_ray.run.progress.QUIET_S", 0.01)
    said: Queue[str] = Queue()
    with still(said.put, lambda: "still loading"):
        assert said.get(timeout=60) == "still loading"
