"""The monitor's rules and memory, on records made by hand."""

import json

import pytest

from flashdmd_ray.config import parse_config
from flashdmd_ray.monitor.watch import SEVERITY, HackMonitor, summary

HEALTHY = {
    "monitor/reward/a": 10.0,
    "monitor/reward/b": 5.0,
    "monitor/spread/a": 2.0,
    "monitor/spread/b": 1.0,
    "monitor/edge_density": 0.4,
    "monitor/dark_share": 0.1,
    "monitor/bright_share": 0.1,
    "monitor/group_diversity": 0.3,
}


def monitor(held_out: tuple[str, ...] = ("b",), **settings: object) -> HackMonitor:
    limits = {"dark_share": 0.3, "bright_share": 0.3, "edge_density": 0.4, "held_out_gap": 1.5}
    tree = {"warmup": 3, "window": 4, "limits": limits, **settings}
    return HackMonitor(parse_config({"monitor": tree}).monitor, ("a",), held_out)


def run(watch: HackMonitor, *phases: tuple[int, dict[str, float]], start: int = 0) -> list[float]:
    """Severity after each step. A phase: so many steps of HEALTHY with these changes; odd steps differ a little from even ones."""
    found = []
    for count, changes in phases:
        for _ in range(count):
            step = start + len(found) + 1
            wobble = 1 + 1e-3 * (step % 2)
            metrics = {name: value * wobble for name, value in (HEALTHY | changes).items()}
            found.append(watch.observe(step, metrics)[0][SEVERITY])
    return found


def test_a_run_that_stays_is_healthy():
    watch = monitor()
    assert set(run(watch, (20, {}))) == {0}
    assert watch.history == []


def test_a_rising_reward_alone_is_what_training_is_for():
    assert set(run(monitor(), (3, {}), (10, {"monitor/reward/a": 14.0, "monitor/reward/b": 7.0}))) == {0}


def test_images_that_change_while_no_reward_rises_are_no_hacking():
    assert set(run(monitor(), (3, {}), (10, {"monitor/edge_density": 0.1, "monitor/dark_share": 0.9}))) == {0}


def test_one_category_is_suspicious_and_two_are_hacking():
    watch = monitor(held_out=())
    risen = {"monitor/reward/a": 14.0}
    light = risen | {"monitor/dark_share": 0.5, "monitor/bright_share": 0.5}
    both = light | {"monitor/edge_density": 0.2}
    levels = run(watch, (3, {}), (6, light), (6, both))
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2}
    assert [event.level for event in watch.history] == ["suspicious", "hacking"]
    message = watch.history[-1].message
    assert message.startswith("hacking: share of dark pixels rose from 0.1 to 0.5")
    assert "edge density fell" in message
    assert "while the optimised reward rose: a (by 2 of its spread)" in message


def test_a_held_out_reward_that_is_left_behind_is_a_category():
    watch = monitor()
    figures = [
        watch.observe(step, HEALTHY | {"monitor/reward/a": 10.0 if step < 4 else 14.0})[0] for step in range(1, 9)
    ]
    assert figures[-1]["monitor/held_out_gap"] == pytest.approx(2)
    assert figures[-1]["monitor/rise/a"] == pytest.approx(2)
    assert watch.verdict.level == "suspicious"
    assert watch.verdict.alarms == {"held_out_gap": 1}


def test_an_alarm_of_twice_its_limit_counts_twice():
    watch = monitor()
    run(watch, (3, {}), (5, {"monitor/reward/a": 14.0, "monitor/reward/b": 3.0}))
    assert watch.verdict.alarms == {"held_out_gap": 2}
    assert watch.verdict.level == "hacking"


def test_one_wild_probe_raises_no_alarm():
    watch = monitor(held_out=())
    wild = [HEALTHY | {"monitor/reward/a": 14.0, "monitor/dark_share": 0.9 if step == 7 else 0.1} for step in range(20)]
    assert {watch.observe(step, metrics)[0][SEVERITY] for step, metrics in enumerate([HEALTHY] * 3 + wild)} == {0}


def test_a_verdict_does_not_flicker():
    """An alarm once raised stays down to 0.8 of its limit; only then the run is healthy again."""
    watch = monitor(held_out=())
    risen = {"monitor/reward/a": 14.0}
    run(watch, (3, {}), (4, risen | {"monitor/dark_share": 0.41}), (6, risen | {"monitor/dark_share": 0.37}))
    assert watch.verdict.level == "suspicious"
    run(watch, (6, risen | {"monitor/dark_share": 0.32}), start=13)
    assert [event.level for event in watch.history] == ["suspicious", "healthy"]


def test_a_limit_can_be_left_out():
    watch = monitor(held_out=(), limits={"dark_share": None})
    assert set(run(watch, (3, {}), (8, {"monitor/reward/a": 14.0, "monitor/dark_share": 0.9}))) == {0}


def test_steps_without_preference_updates_and_missing_signals_do_not_count():
    watch = monitor()
    assert watch.observe(1, {"matching/real_fake_gap": 0.3}) == ({}, [])
    nan = float("nan")
    for step in range(2, 12):
        watch.observe(step, {"monitor/reward/a": nan, "monitor/dark_share": 0.1 if step < 5 else 0.9})
    assert watch.verdict.level == "healthy"


HACKED = {"monitor/reward/a": 14.0, "monitor/edge_density": 0.1, "monitor/dark_share": 0.5}


def test_lowering_the_rate_again_after_a_whole_window():
    watch = monitor(action="lower", lower_by=0.5)
    rates = []
    for step in range(1, 18):
        rates.append(watch.observe(step, HEALTHY | (HACKED if step > 3 else {}))[0].get("monitor/preference_rate"))
    first = rates.index(0.5)
    assert rates[:3] == [None] * 3
    assert rates[first:] == [0.5] * 4 + [0.25] * 4 + [0.125] * (len(rates) - first - 8)


@pytest.mark.parametrize(("action", "stops"), [("report", False), ("lower", False), ("stop", True)])
def test_only_the_action_stop_stops(action, stops):
    watch = monitor(action=action)
    run(watch, (3, {}), (6, HACKED))
    assert watch.verdict.level == "hacking"
    assert watch.wants_stop is stops
    assert (watch.preference_rate < 1) is (action == "lower")


@pytest.mark.parametrize("cut", [2, 5, 9])
def test_saved_and_loaded_it_goes_on_as_if_never_stopped(cut):
    phases = [HEALTHY] * 4 + [HEALTHY | HACKED] * 9
    straight, first, second = (monitor(action="lower") for _ in range(3))
    expected = [straight.observe(step, metrics) for step, metrics in enumerate(phases)]
    found = [first.observe(step, metrics) for step, metrics in enumerate(phases[:cut])]
    second.load(json.loads(json.dumps(first.state())))
    found += [second.observe(step, metrics) for step, metrics in enumerate(phases[cut:], start=cut)]
    assert found == expected
    assert second.state() == straight.state()


def test_the_report_s_message():
    assert summary(monitor().state())["message"] == "no verdict: too few steps"
    watch = monitor(held_out=())
    run(watch, (3, {}), (5, {}))
    assert summary(watch.state())["message"] == "healthy whenever it looked, 3 times"
    run(watch, (9, HACKED), start=8)
    hacked = summary(watch.state())
    assert hacked["level"] == "hacking"
    assert hacked["message"].startswith(
        "hacking: share of dark pixels rose from 0.1 to 0.5, edge density fell 75% below its start, while"
    )
    assert hacked["message"].endswith(f"(since step {watch.history[-1].step})")
    run(watch, (9, {}), start=17)
    assert summary(watch.state())["message"].startswith("healthy at the end; after step")


def test_switched_off_it_says_nothing():
    assert monitor(enabled=False).observe(1, HEALTHY) == ({}, [])
