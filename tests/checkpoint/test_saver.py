"""Saving beside the training: what is taken, who waits for whom, and how errors come to light."""

import time
import uuid

import pytest
import torch

from flashdmd_ray.checkpoint import Saved, latest_checkpoint, load_tensors, manifests, open_store, read_state, save_part
from flashdmd_ray.run.storage import RemotePath
from flashdmd_ray.runtime import WorkerLost
from flashdmd_ray.training.checkpoint_saver import CheckpointError, CheckpointSaver
from tests.checkpoint.troubled_store import TroubledFileSystem
from tests.checkpoint.writing import place


class Counting(Saved):
    """A role whose only tensor counts the steps."""

    def __init__(self, name: str = "counting") -> None:
        self.file = f"{name}.safetensors"
        self.weights = torch.zeros(100)

    def step(self) -> None:
        self.weights += 1

    def save(self, directory) -> None:
        save_part(directory / self.file, {"w": self.weights.clone()})


@pytest.fixture
def root():
    TroubledFileSystem.reset()
    TroubledFileSystem.gate.set()
    return RemotePath(f"troubled://{uuid.uuid4().hex}")


def saver_of(root, *roles, asynchronous=True, deadline_s=30.0, keep=2):
    return CheckpointSaver(open_store(root, "run", keep), roles, asynchronous, deadline_s)


def save(saver, step):
    saver.save(step, {"step": step}, {})


def save_and_end(saver, step, error):
    """A run that saves a step and then ends with an error."""
    with saver:
        save(saver, step)
        raise error


def steps(root):
    return [manifest.step for manifest in manifests(root)]


def test_training_goes_on_with_the_values_of_the_save_kept(root):
    role = Counting()
    saver = saver_of(root, role)
    role.step()
    TroubledFileSystem.gate.clear()
    save(saver, 1)
    role.step()  # while the part waits at the gate
    saver.check()
    assert steps(root) == []
    TroubledFileSystem.gate.set()
    saver.wait()
    assert torch.equal(load_tensors(latest_checkpoint(root) / role.file)["w"], torch.ones(100))


@pytest.mark.parametrize("kind", ["local", "memory", "remote"])
def test_asynchronous_and_synchronous_files_are_equal(tmp_path, kind):
    files = []
    for asynchronous in (True, False):
        root = place(kind, tmp_path / str(asynchronous))
        with saver_of(root, Counting("a"), Counting("b"), asynchronous=asynchronous) as saver:
            for step in (1, 2):
                save(saver, step)
                assert asynchronous or steps(root)[0] == step, "complete when save returns"
        found = latest_checkpoint(root)
        files.append(
            {n: (found / n).read_bytes() for n in ("a.safetensors", "b.safetensors", "state.json", "manifest.json")}
        )
    assert files[0] == files[1]


def test_the_next_save_waits_for_the_one_before(root):
    role = Counting()
    saver = saver_of(root, role)
    for step in range(1, 6):
        role.step()
        save(saver, step)
        assert steps(root)[:1] in ([step - 1] if step > 1 else [], [step])
    saver.wait()
    assert steps(root) == [5, 4]


def test_a_save_that_hangs_ends_at_the_deadline(root):
    role = Counting()
    saver = saver_of(root, role, deadline_s=0.3)
    TroubledFileSystem.gate.clear()
    save(saver, 1)
    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"step 1 .*counting.safetensors not written within 0\.3 s: see deadlines\.checkpoint_s"
    ):
        save(saver, 2)
    assert time.monotonic() - started < 10
    TroubledFileSystem.gate.set()
    saver.deadline_s = 30.0
    save(saver, 2)  # the late part does no harm to the next checkpoint
    saver.wait()
    assert steps(root) == [2]


def test_an_error_surfaces_at_the_next_look_in_one_line(root):
    role = Counting()
    saver = saver_of(root, role)
    save(saver, 1)
    saver.wait()
    TroubledFileSystem.gate.clear()
    save(saver, 2)
    saver.check()  # still under way: nothing to say
    TroubledFileSystem.reset(fail_at=1)
    TroubledFileSystem.gate.set()
    while not saver._under_way[1].done():
        time.sleep(0.01)
    with pytest.raises(CheckpointError) as caught:
        saver.check()
    assert str(caught.value) == (
        "the checkpoint of step 2 could not be written (OSError: the network is down); the ones before it are as they were. "
        "Make room, or set checkpoint.dir to another place"
    )
    assert steps(root) == [1]
    save(saver, 3)  # the trouble has passed
    saver.wait()
    assert steps(root) == [3, 1]


def error_of_save(saver, step):
    try:
        save(saver, step)
        saver.wait()
    except CheckpointError as error:
        return error
    return None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_fault_of_any_operation_leaves_the_previous_or_the_new_one(root, asynchronous):
    """The n-th operation on the store fails, for every n: never silently, and the newest checkpoint is complete."""
    role, failed, fault = Counting(), 0, 0
    while True:
        fault += 1
        here = root / str(fault)
        saver = saver_of(here, role, asynchronous=asynchronous, keep=1)
        role.weights.fill_(1)
        save(saver, 1)
        saver.wait()
        role.weights.fill_(2)
        TroubledFileSystem.reset(fail_at=fault)
        error = error_of_save(saver, 2)
        failed += error is not None
        assert error is None or "the network is down" in str(error)
        reached = TroubledFileSystem.operations >= fault
        TroubledFileSystem.reset()
        newest = latest_checkpoint(here)
        step = read_state(newest)["step"]
        assert step == (1 if error else 2)
        assert torch.equal(load_tensors(newest / role.file)["w"], torch.full((100,), float(step)))
        if not reached:
            break
    assert failed >= 5, "begin, parts, state and manifest can each fail"


def test_retention_that_fails_is_said_and_does_not_stop_the_run(root, caplog):
    saver = saver_of(root, Counting(), keep=1)
    save(saver, 1)
    saver.wait()
    remove = TroubledFileSystem.rm_file
    try:
        TroubledFileSystem.rm_file = lambda *_: (_ for _ in ()).throw(PermissionError("no right to delete"))
        save(saver, 2)
        saver.wait()
    finally:
        TroubledFileSystem.rm_file = remove
    assert steps(root) == [2, 1]
    assert [r.message for r in caplog.records] == [
        "checkpoint of step 2: an older one could not be removed: no right to delete"
    ]
    save(saver, 3)
    saver.wait()
    assert steps(root) == [3]


def test_the_end_waits_also_after_an_error(root):
    role = Counting()
    with saver_of(root, role) as saver:
        save(saver, 1)
    assert steps(root) == [1]
    with pytest.raises(FloatingPointError):
        save_and_end(saver_of(root, role), 2, FloatingPointError)
    assert steps(root) == [2, 1]


def test_a_second_signal_does_not_wait(root):
    TroubledFileSystem.gate.clear()
    started = time.monotonic()
    saver = saver_of(root, Counting())
    with pytest.raises(KeyboardInterrupt):
        save_and_end(saver, 1, KeyboardInterrupt)
    assert time.monotonic() - started < 5
    TroubledFileSystem.gate.set()
    saver.wait()


def test_the_error_that_ended_the_run_is_not_replaced(root, caplog):
    TroubledFileSystem.reset(fail_at=4)
    with pytest.raises(FloatingPointError):
        save_and_end(saver_of(root, Counting()), 1, FloatingPointError)
    assert "the checkpoint of step 1 could not be written" in caplog.text


def test_a_lost_worker_stays_a_lost_worker(root):
    """The supervisor may build everything anew after it, which it does not after a full disk."""

    class Lost(Counting):
        def saved(self, directory):
            raise WorkerLost("learner-0 is gone")

    saver = saver_of(root, Lost())
    save(saver, 1)
    with pytest.raises(WorkerLost):
        saver.wait()
