"""The tutorial docs/own_model.md: its commands, as the page has them, from a checkpoint and photographs to a served student."""

import contextlib
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import ray
import requests
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from PIL import Image
from ray import serve
from safetensors.torch import load_file

from flashdmd_ray.__main__ import main
from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors
from flashdmd_ray.config import load_config
from flashdmd_ray.results.export_facts import SINGLE_FILE
from flashdmd_ray.run.metrics_log import read_metrics
from tests.models.rewards.small_rewards import write_clip
from tests.pages import ROOT, blocks, flashdmd
from tests.serving.exports import export_demo
from tests.serving.test_command import outside_ray
from tests.serving.test_service import free_port
from tests.tiny import save_sam, save_sd3, save_sdxl

PAGE = ROOT / "docs" / "own_model.md"
COMMANDS = [command for block in blocks(PAGE) for command in block.commands]
SMALL = [
    "steps=2",
    "preference={start_step: 0, updates: 1, threshold: 0.0}",
    "rewards=[{kind: pickscore, path: models/pickscore, skip_noise_check: random weights}]",  # in place of the hub's
    "placement.threads=1",
    "evaluation.samples=4",
    "evaluation.teacher_steps=2",
    "tracking.enabled=false",
]


def page_commands(name):
    """Arguments of the page's calls of one command."""
    return [words for command in COMMANDS if (words := flashdmd(command)) and words[0] == name]


def write_home(home):
    """A user's folder: a small reward, photographs with captions, and prompts."""
    write_clip(home / "models" / "pickscore")
    (home / "photos").mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 50).convert("RGB").save(home / "photos" / f"{number}.jpg")
        (home / "photos" / f"{number}.txt").write_text(f"photograph {number}")
    (home / "prompts.txt").write_text("a cat\na dog\na lighthouse at dusk\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder with a small random teacher and SAM."""
    home = tmp_path_factory.mktemp("home")
    save_sdxl(home / "models" / "my_sdxl")
    save_sam(home / "models" / "sam_vit_b_01ec64.pth")
    write_home(home)
    return home


@pytest.fixture(scope="module")
def run(home):
    """The page's steps 1 to 4; returns the folder of the finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (new,) = page_commands("config")
        assert main([*new, "--gpus", "0"]) == 0
        checks = page_commands("data")
        assert [main(check) for check in checks] == [0, 0]
        dry, *trainings = page_commands("train")
        assert "--dry-run" in dry
        assert main(dry) == 0
        assert len(trainings) == 2
        for training in trainings:
            settings = [] if "--set" in training else ["--set"]
            given = [word for word in training if word.startswith(("steps=", "evaluation."))]
            assert main([*training, *settings, *SMALL, *given]) == 0
    assert load_config(home / "my_sdxl.yaml").model.teacher == "models/my_sdxl"
    return home / "runs" / "my_sdxl"


def test_without_segment_anything_the_discriminator_reads_latents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_home(tmp_path)
    save_sd3(tmp_path / "teacher")
    photos = str(tmp_path / "photos")  # a process keeps the data set that it has opened under a name
    assert main(["config", "new", "sd3", "--images", photos, "--teacher", "teacher", "--gpus", "0"]) == 0
    assert main(["train", "my_sd3.yaml", "--set", *SMALL, "ttur=2", "evaluation.samples=0"]) == 0
    run = tmp_path / "runs" / "my_sd3"
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert (last["step"], last["count/score_updates"]) == (2, 4)
    assert 0 < last["discriminator/loss"] < 5
    adapter = load_tensors(latest_checkpoint(run / "checkpoints") / "generator.safetensors")
    assert any("lora_B" in name and weight.any() for name, weight in adapter.items()), "both start at nothing"
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline.from_pretrained(run / "export", use_safetensors=True, **no_t5)


def test_the_pages_exports_are_written(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    assert (run.parent / "trial" / "export").is_dir()
    exports = [command for command in page_commands("export") if "--push-to-hub" not in command]
    assert [main(export) for export in exports] == [0, 0, 0]
    assert (run / "kohya" / "flashdmd_lora.safetensors").is_file()
    assert load_file(run / "single_file_fp16" / SINGLE_FILE)["model.diffusion_model.out.2.bias"].dtype == torch.float16
    pipeline = StableDiffusionXLPipeline.from_pretrained("models/my_sdxl", use_safetensors=True)
    pipeline.load_lora_weights("runs/my_sdxl/lora")


@contextlib.contextmanager
def serving(run, *options):
    """The page's service as a process in a group of its own, with options of the test; its URL."""
    (command,) = page_commands("serve")
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "flashdmd_ray", *command, *options, "--port", str(port)],
        cwd=run.parents[1],
        env=outside_ray() | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        yield process, f"http://127.0.0.1:{port}"
        if process.poll() is None:
            process.kill()


def ask_as_the_page_does(url):
    """The page's request over HTTP, sent to another port."""
    (curl,) = [words for words in COMMANDS if words[0] == "curl"]
    header, _, value = curl[curl.index("-H") + 1].partition(": ")
    address = curl[1].replace("http://127.0.0.1:8000", url)
    return requests.post(address, data=curl[curl.index("-d") + 1], headers={header: value}, timeout=120)


def ask_the_teacher(url):
    """A request that takes long, once it is inside; its answer comes into the list."""
    answers = []
    body = {"prompt": "a red 4", "model": "demo:teacher"}
    asking = threading.Thread(
        target=lambda: answers.append(requests.post(f"{url}/v1/images/generations", json=body, timeout=120))
    )
    asking.start()
    while "flashdmd_requests_inside 1.0" not in requests.get(f"{url}/metrics", timeout=30).text:
        assert asking.is_alive(), "the request was over before the signal"
    return asking, answers


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Neighbour:
    def __call__(self) -> str:
        return "here"


@pytest.mark.usefixtures("ray_cluster")
def test_the_page_serves_the_student_and_a_terminated_service_finishes_what_it_has_and_leaves_its_neighbours_alone(
    run, tmp_path
):
    """A slow model is served beside the student: it is being drawn when the service is told to end."""
    slow = export_demo(tmp_path / "demo" / "export")
    serve.start(proxy_location="Disabled")
    try:
        neighbour = serve.run(Neighbour.bind(), name="neighbour", route_prefix=None)
        settings = ["--set", "teacher_steps=100", f"cache={tmp_path / 'cache'}", "watch_s=null"]
        with serving(run, f"demo={slow}", *settings) as (process, url):
            said = next(line for line in process.stdout if line.startswith(("ready", "error")))
            assert said == f"ready: {url}/\n"
            threading.Thread(target=process.stdout.read, daemon=True).start()
            drawn = ask_as_the_page_does(url)
            assert drawn.status_code == 200, drawn.text
            assert drawn.json()["model"] == "my_sdxl"
            assert set(serve.status().applications) == {"neighbour", "flashdmd_ray"}
            tree = psutil.Process(process.pid).children(recursive=True)
            asking, answers = ask_the_teacher(url)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            asking.join(timeout=10)
            assert [answer.status_code for answer in answers] == [200]
            assert psutil.wait_procs(tree, timeout=30)[1] == []
        assert set(serve.status().applications) == {"neighbour"}
        assert neighbour.remote().result(timeout_s=60) == "here"
    finally:
        serve.shutdown()
