"""`flashdmd doctor`: what a machine has and what a configuration lacks on it."""

import socket

import pytest

from flashdmd_ray.__main__ import main


@pytest.fixture
def doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flashdmd_ray.commands.doctor.driver_gpus", list)

    def run(*words):
        code = main(["doctor", *words])
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


def test_the_demo_can_run_here(doctor, tmp_path):
    code, said, faults = doctor()
    assert (code, faults) == (0, [])
    assert "configuration demo\n  can run here" in said
    assert "GPUs               none" in said
    assert list(tmp_path.iterdir()) == [], "nothing is created"


def test_what_a_preset_lacks_is_said_line_by_line(doctor):
    code, _, faults = doctor("sdxl_lora_24gb")
    assert code == 2
    assert [line.split(": ")[1] for line in faults] == ["placement", "model.sam", "data.source"]
    assert "wants 1 GPUs, here are 0" in faults[0]


def test_a_ray_that_is_gone_is_a_fault(doctor, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        code, said, faults = doctor()
    assert code == 2
    assert "Ray                does not answer" in said
    assert len(faults) == 1
