"""The service on Ray Serve, over HTTP: one application for all of these tests, through both of its doors: `front`, as jobs/serve.py has
it, and Serve's own proxy with an ingress replica, as `serve deploy` has it."""

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import openai
import pytest
import ray
import requests
from ray import serve

from flashdmd_ray.run.http_server import listen_on, running_server
from flashdmd_ray.serving import generator_client
from flashdmd_ray.serving.app import api_over, build_app
from flashdmd_ray.serving.errors import ApiError
from flashdmd_ray.serving.messages import ImageJob
from flashdmd_ray.serving.settings import parse_settings
from tests.serving.exports import export_demo, export_demo_lora

PROMPT = "a red 4 on a gray background"
QUEUE = 12


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Service:
    """The running application. live: the export that the model `demo` is served from; a, b: versions to put there."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.live, self.a, self.b, self.broken = root / "live", root / "a", root / "b", root / "broken"

    def post(self, timeout: float = 60, **body) -> requests.Response:
        body = {"prompt": PROMPT, **body}
        return requests.post(f"{self.url}/v1/images/generations", json=body, timeout=timeout)

    def generate(self, **body) -> tuple[str, list[bytes]]:
        """(version, images)."""
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()["version"], [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]

    def model(self, name: str = "demo") -> dict:
        return requests.get(f"{self.url}/v1/models/{name}", timeout=30).json()

    def swap(self, export: Path) -> None:
        """As jobs/export.py replaces an export: the new directory takes the place of the old."""
        new = self.live.with_name("new")
        shutil.copytree(export, new)
        old = self.live.with_name("old")
        self.live.rename(old)
        new.rename(self.live)
        shutil.rmtree(old)

    def wait_for(self, condition, timeout: float = 60.0) -> None:
        give_up = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < give_up, f"not within {timeout:g} s"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def running(ray_cluster, tmp_path_factory):
    """Doors to the same replicas, by name. "by tasks" is a front that calls them as Ray's tasks, which is Serve's own default."""
    root = tmp_path_factory.mktemp("service")
    port = free_port()
    proxied = Service(f"http://127.0.0.1:{port}", root)
    export_demo(proxied.a)
    export_demo(proxied.b, change=1.001)
    shutil.copytree(proxied.a, proxied.live)
    shutil.copytree(proxied.b, proxied.broken)
    weights = proxied.broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    lora = export_demo_lora(root / "lora", 0.05)
    args = {
        "models": {"demo": str(proxied.live), "style": str(lora)},
        "aliases": {"gpt-image-1": "demo"},
        "replica": {"count": 2, "batch": 8, "cpus": 0.1},
        "watch_s": 0.3,
        "cache": str(root / "cache"),
        "queue": QUEUE,
        "teacher_steps": 100,
        "deadline_s": 120.0,
    }
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(args), name="tested", route_prefix="/")
    grpc = serve.get_deployment_handle("Generator", app_name="tested")
    with fronted(grpc, args) as front, fronted(grpc.options(_by_reference=True), args) as by_tasks:
        yield {"front": Service(front, root), "by tasks": Service(by_tasks, root), "proxy": proxied}
    serve.shutdown()


@pytest.fixture(params=["front", "proxy"])
def service(running, request):
    return running[request.param]


@contextlib.contextmanager
def fronted(handle, args):
    """The URL of a front over the replicas behind a handle."""
    api = api_over(handle, parse_settings(args))
    with listen_on("127.0.0.1", 0) as listener, running_server(api, listener, threading.Event(), drain_s=5):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_openai_client_works_unchanged(service):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0)
    response = client.images.generate(model="gpt-image-1", prompt=PROMPT, n=2, size="auto", extra_body={"seed": 3})
    assert [item.b64_json is not None for item in response.data] == [True, True]
    assert abs(response.created - time.time()) < 60
    assert [model.id for model in client.models.list()] == ["demo", "demo:teacher", "style", "style:teacher"]
    assert client.models.retrieve("gpt-image-1").id == "demo"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, response_format="url")
    assert refused.value.param == "response_format"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="nope")


def test_same_seed_same_bytes_whatever_is_drawn_beside(service):
    """One prompt and seed alone, then many times among others of other steps, formats and models."""
    alone = service.generate(seed=5)
    others = [{"seed": 5}, {"seed": 1, "n": 3}, {"seed": 5}, {"seed": 2, "num_inference_steps": 2}, {"model": "style"}]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda body: (body, service.post(**body)), others * 4))
    assert {answer.status_code for _, answer in answers} <= {200, 429}
    same = [answer for body, answer in answers if body == {"seed": 5} and answer.status_code == 200]
    assert len(same) > 2
    assert max(answer.json()["timing"]["batch"] for answer in same) > 1, "nothing was drawn beside"
    assert {base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in same} == {alone[1][0]}


def test_a_lora_shares_the_base_and_draws_otherwise(service):
    _, plain = service.generate(seed=4)
    _, styled = service.generate(seed=4, model="style")
    _, teacher = service.generate(seed=4, model="style:teacher", timeout=120)
    assert len({plain[0], styled[0], teacher[0]}) == 3


def test_versions_swap_under_load_without_a_failed_request(running):
    """Each answer names the version that made it, and equals what that version draws alone."""
    service = running["front"]
    stop, seen = [], []

    def ask() -> None:
        while not stop:
            seen.append(service.generate(seed=8, num_inference_steps=1))

    before = service.model()["version"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask) for _ in range(3)]
        try:
            for export in (service.b, service.a):
                old = service.model()["version"]
                service.swap(export)
                service.wait_for(lambda old=old: seen and seen[-1][0] != old)
                time.sleep(2)  # both replicas
        finally:
            stop.append(True)
        for client in clients:
            client.result()
    assert len({version for version, _ in seen}) == 2
    assert len({(version, images[0]) for version, images in seen}) == 2
    assert service.model()["version"] == before


def test_a_broken_version_is_refused_and_the_old_one_stays(service):
    before = service.model()
    service.swap(service.broken)
    service.wait_for(lambda: service.model()["refused"] is not None)
    assert "unet" in service.model()["refused"]
    assert service.generate(seed=1)[0] == before["version"]
    service.swap(service.a)
    service.wait_for(lambda: service.model()["refused"] is None)


def test_a_client_of_a_local_proxy_is_not_local(service):
    """There are no keys; proxies name their clients in X-Forwarded-For."""
    headers = {"X-Forwarded-For": "203.0.113.5"}
    response = requests.get(f"{service.url}/v1/models", headers=headers, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "no_keys_configured")


def test_a_full_queue_is_answered_in_openais_shape(service):
    with concurrent.futures.ThreadPoolExecutor(8 * QUEUE) as pool:
        answers = list(pool.map(lambda seed: service.post(seed=seed, n=10), range(8 * QUEUE)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= QUEUE
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_a_client_that_leaves_ends_its_drawing(service):
    """Hundreds of forwards that nobody waits for any more would keep both replicas busy for long."""
    leaving = {"model": "demo:teacher", "n": 10}
    left = 0
    for _ in range(4):
        try:
            assert (
                service.post(timeout=0.5, **leaving).status_code == 429
            )  # on a busy machine those before are not gone yet
        except requests.exceptions.ReadTimeout:
            left += 1
    assert left
    began = time.monotonic()
    service.generate(num_inference_steps=1)
    service.generate(num_inference_steps=1)
    assert time.monotonic() - began < 10
    inside = requests.get(f"{service.url}/metrics", timeout=30).text
    assert "flashdmd_requests_inside 0.0" in inside


def test_a_killed_replica_loses_no_request(running):
    """Calls by gRPC and as Ray's tasks fail in different ways."""

    def kill_one() -> None:
        actors = ray.util.list_named_actors(all_namespaces=True)
        name = next(a["name"] for a in actors if "#Generator#" in a["name"])
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        doors = (running["front"], running["by tasks"])
        answers = [pool.submit(doors[seed % 2].generate, seed=seed, n=4) for seed in range(12)]
        time.sleep(0.5)
        kill_one()
        assert all(answer.result() for answer in answers)


def test_a_service_that_was_idle_is_ready(service, monkeypatch):
    """Its list of models is older than what would mean that no replica answers."""
    monkeypatch.setattr(generator_client, "STALE_S", 0.2)

    async def ask_twice() -> list[str]:
        asked = generator_client.GeneratorClient(serve.get_deployment_handle("Generator", app_name="tested"))
        await asked.models()
        await asyncio.sleep(1.5)
        return [model.name for model in await asked.models()]

    assert asyncio.run(ask_twice()) == ["demo", "demo:teacher", "style", "style:teacher"]


def test_a_service_that_serve_has_given_up_is_not_ready(running):
    """After too many failed starts, which a lost controller counts anew, Serve refuses calls by an error that is not Ray's."""

    @serve.deployment(max_constructor_retry_count=1, ray_actor_options={"num_cpus": 0})
    class Broken:
        def __init__(self) -> None:
            raise KeyError("broken")

    with pytest.raises(RuntimeError):
        serve.run(Broken.bind(), name="broken", route_prefix=None)
    asked = generator_client.GeneratorClient(serve.get_deployment_handle("Broken", app_name="broken"))
    job = ImageJob("", "demo", PROMPT, (0,), 4, (24, 24), "png", 90, timeout_s=5.0)
    for call in (asked.models, lambda: asked.generate(job)):
        with pytest.raises(ApiError) as refused:
            asyncio.run(call())
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})
    serve.delete("broken")


def test_metrics_count_what_was_asked(service):
    text = requests.get(f"{service.url}/metrics", timeout=30).text
    assert 'flashdmd_requests_total{route="/v1/images/generations",status="200"}' in text
    version = service.model()["version"]
    assert f'flashdmd_model_loaded{{model="demo",version="{version}"}} 1.0' in text


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_a_page_of_another_site_is_not_answered(service, headers):
    response = requests.get(f"{service.url}/v1/models", headers=headers, timeout=30)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == f"{next(iter(headers)).lower()}_not_allowed"


def test_what_clients_send(service):
    """A byte order mark, a random seed by -1, and a name from another API."""
    url, headers = f"{service.url}/v1/images/generations", {"Content-Type": "application/json"}
    for body, status in (({"seed": -1, "num_inference_steps": 1}, 200), ({"steps": 1}, 400)):
        text = json.dumps({"prompt": PROMPT, **body}).encode("utf-8-sig")
        response = requests.post(url, data=text, headers=headers, timeout=60)
        assert response.status_code == status, response.text


def test_bodies_over_the_wire(service):
    url, headers = f"{service.url}/v1/images/generations", {"Content-Type": "application/json"}
    large = json.dumps({"prompt": "x" * 10_000_000})
    for body, status in (
        (large, 413),
        ("[" * 10_000, 400),
        ('{"prompt": NaN}', 400),
        ('{"prompt": "\U0001f600"}', 200),
    ):
        response = requests.post(url, data=body.encode(), headers=headers, timeout=60)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
