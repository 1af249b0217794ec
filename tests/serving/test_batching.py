"""The drawing thread: who shares forwards, who goes first, and when it stops."""

import collections
import copy
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flashdmd_ray.demo import weights_path
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.serving.batch_invariance import filled_size, invariant_sizes, make_batch_invariant
from flashdmd_ray.serving.batching import SamplingJob, SamplingThread
from flashdmd_ray.serving.fair_turns import FairTurns
from flashdmd_ray.serving.messages import ModelInfo
from flashdmd_ray.serving.model_loading import ModelVersion
from flashdmd_ray.serving.step_sampler import StudentSampler, TeacherSampler
from flashdmd_ray.serving.warm_up import WarmUp
from tests.serving.exports import TIMESTEPS

SIZE = (24, 24)
WAIT_S = 30


class Watched(StudentSampler):
    """Remembers its forwards, and holds the next one back until it may go."""

    def __init__(self, family) -> None:
        super().__init__(family, family.teacher, TIMESTEPS)
        self.batch_sizes = {SIZE: (1, 2, 3), (20, 28): (1,)}
        self.forwards = []
        self.may_go = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def advance(self, samples):
        self.reached.release()
        assert self.may_go.acquire(timeout=WAIT_S)
        self.forwards.append([sample.timestep for sample in samples])
        super().advance(samples)

    def go(self) -> None:
        """One forward; returns when the next one is about to begin, or there is none."""
        assert self.reached.acquire(timeout=WAIT_S)
        self.may_go.release()


@pytest.fixture(scope="module")
def family():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a replica; many small forwards on two threads wait for each other on a busy machine
    yield SDXL.from_pretrained(str(weights_path("teacher")))
    torch.set_num_threads(threads)


@pytest.fixture
def sampler(family):
    return Watched(family)


@pytest.fixture
def thread():
    thread = SamplingThread(max_batch=3)
    yield thread
    thread.close(timeout_s=WAIT_S)
    assert not thread.alive


def job(sampler, steps=2, seeds=(0,), size=SIZE, client=""):
    return SamplingJob(sampler, "a red 4", seeds, steps, size, client)


def test_a_late_job_joins_at_the_next_step(thread, sampler):
    """Samples at different timesteps share a forward."""
    early, late = job(sampler), job(sampler)
    thread.add(early)
    assert sampler.reached.acquire(timeout=WAIT_S)
    thread.add(late)
    sampler.may_go.release()
    sampler.go()
    sampler.go()
    assert early.future.result(WAIT_S).shape == late.future.result(WAIT_S).shape == (1, 24, 24, 3)
    assert sampler.forwards == [[999], [499, 999], [499]]
    assert (early.batch, late.batch) == (2, 2)
    assert torch.equal(early.future.result(), late.future.result())


def test_those_who_came_first_go_first(thread, sampler):
    jobs = [job(sampler, steps=1, seeds=(0, 1)), job(sampler, steps=1, seeds=(2, 3)), job(sampler, steps=1)]
    sampler.may_go.release()
    thread.add(job(sampler, steps=1))
    assert sampler.reached.acquire(timeout=WAIT_S)
    for one in jobs:
        thread.add(one)
    for _ in range(2):
        sampler.go()
    results = [one.future.result(WAIT_S) for one in jobs]
    assert [len(result) for result in results] == [2, 2, 1]
    assert [len(forward) for forward in sampler.forwards] in ([1, 3, 2], [1, 2, 3])


def test_a_client_that_asks_for_much_does_not_keep_others_waiting(thread, sampler):
    """Its third job goes after the first one of another client, though it came before."""
    much = [job(sampler, steps=1, seeds=(0, 1, 2), client="a") for _ in range(3)]
    little = job(sampler, steps=1, client="b")
    thread.add(much[0])
    assert sampler.reached.acquire(timeout=WAIT_S)
    for one in [*much[1:], little]:
        thread.add(one)
    sampler.may_go.release()
    sampler.go()
    sampler.go()
    assert little.future.result(WAIT_S).shape == (1, 24, 24, 3)
    assert not much[2].future.done()
    sampler.may_go.release(3)
    assert all(len(one.future.result(WAIT_S)) == 3 for one in much)


def test_a_job_that_would_be_late_is_not_taken(thread, sampler):
    """Counted in steps of all that is waiting, shared with other clients."""
    sampler.step_s[SIZE] = 1.0
    assert thread.add(job(sampler, steps=4, seeds=(0, 1), client="a"), timeout_s=7.9) == 8.0
    first = job(sampler, steps=4, seeds=(0, 1), client="a")
    assert thread.add(first, timeout_s=8.0) is None
    assert thread.add(job(sampler, steps=2, client="a"), timeout_s=19.0) == 20.0, "half is left to others"
    assert thread.add(job(sampler, steps=2, client="b"), timeout_s=3.9) == 4.0, "of two clients each gets half"
    assert thread.load == 1
    first.future.cancel()
    sampler.may_go.release()


Turn = collections.namedtuple("Turn", "client model number")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), min_size=2, max_size=12))
def test_clients_and_their_models_share_the_seconds(waiting):
    """While all of them have jobs, nobody is a whole turn ahead: no client, and no model of a client."""
    turns, jobs = FairTurns(), [Turn(client, model, number) for number, (client, model) in enumerate(waiting)]
    had = collections.Counter()
    for _ in range(60):
        job = turns.first(jobs)
        assert job == next(one for one in jobs if one[:2] == job[:2]), "the oldest goes first"
        turns.charge(job, 1.0)
        had[job.client] += 1
        had[job.client, job.model] += 1
        assert turns.arrange(jobs, job)[0] == job
    for kind in ({one.client for one in jobs}, *({(c, m) for c, m, _ in jobs if c == client} for client in "abc")):
        seconds = [had[key] for key in kind]
        assert max(seconds, default=0) - min(seconds, default=0) <= 1


def test_who_comes_anew_neither_waits_for_its_past_nor_is_preferred_for_its_absence():
    turns, a, b = FairTurns(), Turn("a", "x", 0), Turn("b", "x", 1)
    for _ in range(10):
        turns.charge(turns.first([a]), 1.0)
    order = []
    for _ in range(4):
        order.append(turns.first([a, b]).client)
        turns.charge(Turn(order[-1], "x", 2), 1.0)
    assert order == ["a", "b", "a", "b"]


def test_an_abandoned_job_ends_before_the_next_step(thread, sampler):
    left, other = job(sampler, steps=4), job(sampler, steps=4)
    thread.add(left)
    assert sampler.reached.acquire(timeout=WAIT_S)
    thread.add(other)
    left.future.cancel()
    sampler.may_go.release()
    for _ in range(4):
        sampler.go()
    other.future.result(WAIT_S)
    assert [len(forward) for forward in sampler.forwards] == [1, 1, 1, 1, 1]
    assert thread.load == 0


def test_other_sizes_do_not_share_forwards(thread, sampler):
    sampler.may_go.release(4)
    jobs = [job(sampler, steps=1), job(sampler, steps=1, size=(20, 28))]
    for one in jobs:
        thread.add(one)
    assert [tuple(one.future.result(WAIT_S).shape[1:3]) for one in jobs] == [(24, 24), (20, 28)]
    assert [len(forward) for forward in sampler.forwards] == [1, 1]


def test_a_failure_is_of_its_own_jobs(thread, sampler, family):
    broken = StudentSampler(family, lambda *_: 1 / 0, TIMESTEPS)  # type: ignore[arg-type]
    failing, fine = job(broken), job(sampler, steps=1)
    sampler.may_go.release()
    thread.add(failing)
    thread.add(fine)
    with pytest.raises(ZeroDivisionError):
        failing.future.result(WAIT_S)
    assert fine.future.result(WAIT_S).shape == (1, 24, 24, 3)


def test_the_teacher_is_the_teachers_sampler(family):
    from flashdmd_ray.roles.image_sampling import teacher_sampler

    class Start:
        def __call__(self, hop):
            return torch.randn((1, *family.latent_shape), generator=torch.Generator().manual_seed(3))

    expected = teacher_sampler(family, 5, 2.0).sample(family.encode(["a red 4"]), Start())
    sampler = TeacherSampler(family, family.teacher, 2.0)
    sample = sampler.begin("a red 4", 3, 5, SIZE)
    while not sample.finished:
        sampler.advance([sample])
    torch.testing.assert_close(sample.noisy, expected[0], rtol=1e-5, atol=1e-5)


def test_a_sample_has_the_same_bits_in_every_batch(family):
    """Measured sizes, on the demo's own network: alone, among others, at other steps."""
    sampler = StudentSampler(family, family.teacher, TIMESTEPS)
    make_batch_invariant(family.teacher.network)
    make_batch_invariant(family.vae)
    version = ModelVersion("demo", "0", {"demo": sampler}, {"demo": info(SIZE)})
    WarmUp(max_batch=4)(version)
    assert sampler.max_batch(SIZE) > 1, "nothing shares a forward on this machine"
    assert sampler.encodes_groups

    def draw(*seeds):
        samples = [sampler.begin(f"a red {seed}", seed, 2, SIZE) for seed in seeds]
        early = sampler.begin("another one", 99, 2, SIZE)
        sampler.advance([early])
        for start in range(0, len(samples), sampler.max_batch(SIZE)):
            chunk = samples[start : start + sampler.max_batch(SIZE)]
            while not chunk[0].finished:
                sampler.advance(chunk if len(chunk) == sampler.max_batch(SIZE) or early.finished else [*chunk, early])
        return [(sample.noisy, sampler.decode([sample])) for sample in samples]

    family.text.forget()
    alone = {seed: draw(seed)[0] for seed in range(3)}
    family.text.forget()
    sampler.encode(["another one", "a red 2", "a red 0", "a red 1", "a red 2"])
    for seeds in ((0, 1), (2, 1, 0), (0, 1, 2) * 3):
        for seed, (latents, pixels) in zip(seeds, draw(*seeds), strict=True):
            assert torch.equal(latents, alone[seed][0])
            assert torch.equal(pixels, alone[seed][1])


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "dtype"), [(3, 1, torch.float32), (1, 2, torch.float32), (3, 1, torch.bfloat16)]
)
@torch.no_grad()
def test_one_image_is_convolved_like_two(by_onednn, kernel, stride, dtype, monkeypatch):
    there = torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there and by_onednn)
    layers = nn.Sequential(nn.Conv2d(48, 96, kernel, stride, kernel // 2)).to(
        dtype=dtype, memory_format=torch.channels_last
    )
    make_batch_invariant(layers)
    images = torch.randn(2, 48, 12, 12).to(dtype=dtype, memory_format=torch.channels_last)
    for _ in range(2):  # the second time the weights are others
        together, alone = layers(images), layers(images[:1])
        exact = F.conv2d(images.double(), *(p.double() for p in layers[0].parameters()), stride, kernel // 2)
        torch.testing.assert_close(together.double(), exact, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-4)
        assert torch.equal(alone, together[:1])
        layers[0].weight.mul_(2)


@torch.no_grad()
def test_a_copy_with_other_weights_convolves_with_its_own():
    layer = nn.Sequential(nn.Conv2d(8, 8, 3))
    make_batch_invariant(layer)
    image = torch.randn(1, 8, 6, 6)
    before = layer(image)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(image), before)
    copied[0].weight.add_(1)
    assert not torch.equal(copied(image), before)
    assert torch.equal(layer(image), before)


def info(*sizes):
    return ModelInfo("demo", "0", 0, "student", "", (4, 2, 1), sizes, None, 0.25)


def test_the_largest_agreeing_set_of_sizes_is_used():
    assert invariant_sizes(lambda size: b"alone" if size == 1 else b"others", max_size=8) == (2, 3, 4, 6, 8)
    assert invariant_sizes(lambda size: None if size > 1 else b"", max_size=8) == (1,)
    assert invariant_sizes(lambda size: bytes([size]), max_size=8) == (1,)
    assert invariant_sizes(lambda size: bytes([size % 2]), max_size=16) == (2, 4, 6, 8, 12, 16)
    assert [filled_size(count, (2, 4, 8)) for count in (1, 2, 3, 8)] == [2, 2, 4, 8]
