"""The API over a generator in this process: what is accepted, what is refused, and in which words."""

import base64
import io
import json
import time

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from starlette.testclient import TestClient

from flashdmd_ray.serving.api import build_api
from flashdmd_ray.serving.hooks import load_hook
from flashdmd_ray.serving.replica import GeneratorReplica
from flashdmd_ray.serving.settings import parse_settings
from tests.serving.exports import export_demo

PROMPT = "a red 4 on a gray background"
KEY = "a-key-that-is-long-enough"
GENERATE = "/v1/images/generations"
LOCAL = "http://localhost:8000"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("served") / "demo")


@pytest.fixture(scope="module")
def settings(export):
    cache = str(export.parent / "cache")
    return parse_settings(
        {"models": {"demo": str(export)}, "aliases": {"gpt-image-1": "demo"}, "teacher_steps": 3, "cache": cache}
    )


@pytest.fixture(scope="module")
def generator(settings):
    return GeneratorReplica(settings)


@pytest.fixture(scope="module")
def client(settings, generator):
    return TestClient(build_api(settings, generator, ()), client=("127.0.0.1", 5000), base_url=LOCAL)


def post(client, **body):
    return client.post(GENERATE, json={"prompt": PROMPT, **body})


def pictures(response):
    assert response.status_code == 200, response.text
    return [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]


def error(response):
    assert response.headers["content-type"] == "application/json"
    (key,) = response.json()
    assert key == "error"
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_images_are_those_of_plain_diffusers(client, export):
    """The export's own snippet and the service draw the same picture from one seed."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(export, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((export / "flashdmd.json").read_text())["call"]
    theirs = pipeline(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **call).images[0]
    (ours,) = pictures(post(client, seed=7))
    difference = torch.tensor(list(Image.open(io.BytesIO(ours)).tobytes())).view(24, 24, 3) - 255 * theirs.permute(
        1, 2, 0
    )
    assert difference.abs().max() < 0.51


def test_image_i_has_seed_plus_i(client):
    response = post(client, seed=11, n=3)
    assert [item["seed"] for item in response.json()["data"]] == [11, 12, 13]
    assert len(set(pictures(response))) == 3


def test_without_a_seed_the_response_says_which(client):
    first = post(client)
    (drawn,) = pictures(first)
    assert pictures(post(client, seed=first.json()["data"][0]["seed"])) == [drawn]
    for random in (None, -1):
        response = post(client, seed=random)
        assert response.json()["data"][0]["seed"] >= 0
        assert pictures(response) != [drawn]


@pytest.mark.parametrize(("output_format", "magic"), [("png", b"\x89PNG"), ("webp", b"RIFF"), ("jpeg", b"\xff\xd8")])
def test_formats(client, output_format, magic):
    (image,) = pictures(post(client, output_format=output_format, seed=1))
    assert image.startswith(magic)
    assert Image.open(io.BytesIO(image)).size == (24, 24)


def test_sizes_and_steps(client):
    response = post(client, size="28x20", num_inference_steps=1, seed=1)
    (image,) = pictures(response)
    assert Image.open(io.BytesIO(image)).size == (28, 20)
    assert (response.json()["size"], response.json()["num_inference_steps"]) == ("28x20", 1)


def test_the_teacher_draws_on_demand(client):
    response = post(client, model="demo:teacher", seed=1, guidance_scale=2.0)
    pictures(response)
    assert response.json()["model"] == "demo:teacher"
    assert response.json()["num_inference_steps"] == 3


def test_an_alias_is_the_model(client):
    assert pictures(post(client, model="gpt-image-1", seed=5)) == pictures(post(client, model="demo", seed=5))


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"negative_prompt": "ugly"}, "negative_prompt", "no guidance"),
        ({"guidance_scale": 7.5}, "guidance_scale", "use 0 or 1"),
        ({"model": "demo:teacher", "guidance_scale": 1}, "guidance_scale", "has 2"),
        ({"num_inference_steps": 3}, "num_inference_steps", "takes 1, 2 or 4"),
        ({"size": "1x100000"}, "size", "draws 24x24"),
        ({"size": "24x٢٤"}, "size", "draws 24x24"),
        ({"n": 10**9}, "n", "at most 10"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "integer"),
        ({"n": "2"}, "n", "write the number without quotes"),
        ({"guidance_scale": "1"}, "guidance_scale", "write the number without quotes"),
        ({"seed": -2}, "seed", "greater than or equal to -1"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 1001}, "prompt", "at most 1000"),
        ({"prompt": 4}, "prompt", "string"),
        ({"output_compression": 50}, "output_compression", "webp or jpeg"),
        ({"output_format": "gif"}, "output_format", "'png', 'webp' or 'jpeg'"),
        ({"stream": True}, "stream", "all at once"),
        ({"stream": 0}, "stream", "all at once"),
        ({"num_inference_step": 4}, "num_inference_step", "did you mean 'num_inference_steps'?"),
        ({"steps": 4}, "steps", "which is 'num_inference_steps' here"),
        ({"num_steps": 4}, "num_steps", "which is 'num_inference_steps' here"),
        ({"cfg_scale": 1}, "cfg_scale", "which is 'guidance_scale' here"),
        ({"width": 24, "height": 24}, "width", "which is 'size': \"WIDTHxHEIGHT\" here"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt", "which is 'n' here"),
        ({"sampler_name": "Euler a"}, "sampler_name", "one sampler belongs to each model"),
        ({"extra_body": {"seed": 1}}, "extra_body", "its fields belong in the body itself"),
    ],
)
def test_refusals_name_the_parameter(client, body, param, said):
    response = post(client, **body)
    assert response.status_code == 400
    assert error(response)["param"] == param
    assert said in error(response)["message"]


def test_neutral_values_of_unused_fields_are_accepted(client):
    unused = {"negative_prompt": "", "guidance_scale": 0, "quality": "auto", "stream": False, "user": "u", "n": 1.0}
    assert len(pictures(post(client, **unused, output_compression=100, style=None))) == 1


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "x"', 400),
        (b"\xff\xfe", 400),
        (b"[" * 50_000, 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "x", "seed": 1, "prompt": "y"}', 400),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413),
    ],
)
def test_bodies_that_are_no_request(client, content, status):
    response = client.post(GENERATE, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert error(response)["type"] == "invalid_request_error"


def test_a_byte_order_mark_is_no_fault(client):
    """Windows' editors and shells write one."""
    body = b"\xef\xbb\xbf" + json.dumps({"prompt": PROMPT, "seed": 1, "num_inference_steps": 1}).encode()
    assert len(pictures(client.post(GENERATE, content=body, headers={"content-type": "application/json"}))) == 1


@pytest.mark.parametrize("prompt", ["\U0001f600" * 20, "\x00\x07\x1b[31m", "‮", " ", "x" * 1000])
def test_odd_prompts_are_drawn(client, prompt):
    assert len(pictures(post(client, prompt=prompt, num_inference_steps=1))) == 1


def test_pages_that_are_not_there(client):
    for method, path, status in [("GET", "/nope", 404), ("GET", "/v1/models/x", 404), ("DELETE", "/healthz", 405)]:
        response = client.request(method, path)
        assert (response.status_code, error(response)["type"]) == (status, "invalid_request_error")
    assert "GET" in client.delete("/healthz").headers["allow"]
    for base in ("", "/v1/v1", "/openai/v1"):  # what clients make of another base_url
        path = client.post(f"{base}/images/generations", json={"prompt": PROMPT})
        assert error(path)["message"].endswith(f"did you mean '{GENERATE}'?")
    assert error(post(client, model="Demo"))["message"].endswith("did you mean 'demo'?")
    assert post(client, model="nope").status_code == 404
    assert client.post(GENERATE, content=b"prompt=x").status_code == 415


def test_models(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["demo", "demo:teacher"]
    assert client.get("/v1/models/gpt-image-1").json() == listed["data"][0]
    assert listed["data"][0]["num_inference_steps"] == [1, 2, 4]
    assert listed["data"][0]["sizes"] == ["24x24", "28x20", "20x28"]


def test_keys_and_request_ids(settings, generator):
    client = TestClient(build_api(settings, generator, ("another-key-long-enough", KEY)))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer é"},
    ):
        response = client.get("/v1/models", headers={name: value.encode() for name, value in headers.items()})
        assert (response.status_code, error(response)["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    allowed = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
    assert client.get("/v1/models", headers=allowed).headers["x-request-id"] == "mine-1"
    assert len(client.get("/v1/models", headers=allowed | {"x-request-id": "a b\n"}).headers["x-request-id"]) == 32
    assert client.get("/healthz").status_code == 200


def test_without_keys_only_this_machine_is_served(settings, generator):
    client = TestClient(build_api(settings, generator, ()), client=("192.0.2.1", 5000), base_url=LOCAL)
    response = client.get("/v1/models")
    assert (response.status_code, error(response)["code"]) == (403, "no_keys_configured")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "192.0.2.1", "localhost.evil.example", ""])
def test_without_keys_other_names_of_this_machine_are_not_answered(settings, generator, host):
    """A page whose name was made to lead to this machine (DNS rebinding) says that name."""
    client = TestClient(build_api(settings, generator, ()), client=("127.0.0.1", 5000), base_url=LOCAL)
    for path in ("/v1/models", "/metrics"):
        response = client.get(path, headers={"host": host})
        assert (response.status_code, error(response)["code"]) == (403, "host_not_allowed")
    assert client.get("/healthz", headers={"host": host}).status_code == 200
    with_keys = TestClient(build_api(settings, generator, (KEY,)))
    headers = {"host": host, "authorization": f"Bearer {KEY}"}
    assert with_keys.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", "127.0.0.2:1"])
def test_without_keys_this_machine_is_answered(settings, generator, host):
    client = TestClient(build_api(settings, generator, ()), client=("127.0.0.1", 5000), base_url=LOCAL)
    for origin in ({}, {"origin": f"http://{host}"}):
        assert client.get("/v1/models", headers={"host": host} | origin).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:9999"):
        response = client.get("/v1/models", headers={"host": host, "origin": origin})
        assert (response.status_code, error(response)["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_pages_of_named_origins_may_call_the_api(settings, generator, keys):
    ours, theirs = "https://studio.example", "https://evil.example"
    client = another(settings, generator, keys, cors_origins=[ours])
    headers = {"authorization": f"Bearer {KEY}"} if keys else {}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin, allowed in ((ours, ours), (theirs, None)):
        preflight = client.options(GENERATE, headers={"origin": origin} | asks)
        assert (preflight.status_code == 200) == (allowed is not None)
        response = client.get("/v1/models", headers=headers | {"origin": origin})
        assert preflight.headers.get("access-control-allow-origin") == allowed
        assert response.headers.get("access-control-allow-origin") == allowed
        assert response.status_code == (200 if allowed or keys else 403)
    refused = client.post(GENERATE, json={}, headers=headers | {"origin": ours})
    assert refused.headers["access-control-allow-origin"] == ours, "a page could not read its error"
    assert "access-control-allow-origin" not in another(settings, generator, keys).get("/healthz").headers


def another(settings, generator, keys=(), prompt_filter=None, **changes):
    """A client of the same generator under other settings."""
    changed = parse_settings(settings.model_dump(mode="json") | changes)
    return TestClient(build_api(changed, generator, keys, prompt_filter), client=("127.0.0.1", 5000), base_url=LOCAL)


def test_what_cannot_be_done_in_time_is_refused_at_once(settings, generator):
    """By the measured pace of the teacher, whose image is many times the work of a student's."""
    response = post(another(settings, generator, deadline_s=0.001), model="demo:teacher", n=10)
    assert (response.status_code, error(response)["code"]) == (429, "queue_full")
    assert 0 < int(response.headers["retry-after"]) <= 60
    assert "ask for fewer images" in error(response)["message"]
    assert generator.load == 0


def test_a_deadline_is_answered_and_ends_the_drawing(settings, generator, monkeypatch):
    version, _ = generator._models.find("demo:teacher")
    monkeypatch.setattr(version.samplers["demo:teacher"], "step_s", {})  # as fast as one may hope
    response = post(another(settings, generator, deadline_s=0.02), model="demo:teacher", n=10)
    assert (response.status_code, error(response)["code"]) == (504, "deadline_exceeded")
    assert error(response)["type"] == "server_error"
    wait_until(lambda: generator.load == 0)


def wait_until(condition):
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_images_per_minute_are_limited_by_key(settings, generator):
    keys = (KEY, KEY + "2")
    client = another(settings, generator, keys, limits={"images_per_minute": 1, "burst": 2})
    asked = [(KEY, 2), (KEY, 1), (KEY + "2", 1)]
    answers = [
        client.post(GENERATE, json={"prompt": PROMPT, "n": n}, headers={"authorization": f"Bearer {key}"})
        for key, n in asked
    ]
    assert [answer.status_code for answer in answers] == [200, 429, 200]
    assert error(answers[1])["code"] == "rate_limit_exceeded"
    assert 0 < int(answers[1].headers["retry-after"]) <= 60
    teacher = {"prompt": PROMPT, "model": "demo:teacher"}  # 3 steps of two forwards: 1.5 times a student's four
    limited = another(settings, generator, limits={"images_per_minute": 1, "burst": 2})
    answers = [limited.post(GENERATE, json=body) for body in (teacher, {"prompt": PROMPT})]
    assert [answer.status_code for answer in answers] == [200, 429]
    local = another(settings, generator, limits={"images_per_minute": 1, "burst": 2})
    forwarded = [{"x-forwarded-for": address} for address in ("127.0.0.9", "127.0.0.10", "localhost", "::1")]
    statuses = [local.post(GENERATE, json={"prompt": PROMPT}, headers=headers).status_code for headers in forwarded]
    assert statuses == [200, 200, 429, 429], "a header makes nobody another client"


def test_limits_of_pixels_and_characters(settings, generator):
    client = another(settings, generator, limits={"pixels": 2 * 24 * 24, "prompt_characters": 30})
    assert post(client, n=2).status_code == 200
    assert error(post(client, n=3))["param"] == "n"
    assert error(post(client, prompt="x" * 31))["param"] == "prompt"


def test_filters_of_the_operator_refuse_prompts_and_images(settings, generator, monkeypatch):
    client = another(settings, generator, prompt_filter=lambda prompt: "no fours" if "4" in prompt else None)
    for body, checker, said in (({}, None, "no fours"), ({"prompt": "a 7"}, lambda image: f"{image.size}", "(24, 24)")):
        monkeypatch.setattr(generator, "_check", checker)
        response = post(client, **body)
        assert (response.status_code, error(response)["code"]) == (400, "content_policy_violation")
        assert said in error(response)["message"]
    monkeypatch.setattr(generator, "_check", lambda image: None)
    assert post(client, prompt="a 7").status_code == 200


HOOKS = """
import sys

def blackens(image):
    image.paste((0, 0, 0), (0, 0, *image.size))

def allowed(value):
    return True

def leaves(value):
    sys.exit(3)

async def later(value): ...

number = 3
"""


def test_functions_of_the_operator_get_copies_and_their_answers_are_checked(settings, generator, tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    (tmp_path / "my_script.py").write_text("import sys; sys.exit(2)")
    monkeypatch.syspath_prepend(tmp_path)
    plain = pictures(post(another(settings, generator), seed=3))
    monkeypatch.setattr(generator, "_check", load_hook("my_hooks:blackens"))
    assert pictures(post(another(settings, generator), seed=3)) == plain
    for name in ("allowed", "leaves"):
        assert post(another(settings, generator, prompt_filter=load_hook(f"my_hooks:{name}"))).status_code == 500
    for path in ("my_hooks:later", "my_hooks:number", "my_hooks:gone", "my_script:check", "no_such:check"):
        with pytest.raises(ValueError, match=path) as caught:
            load_hook(path)
        assert "\n" not in str(caught.value)


def test_prompts_and_keys_are_logged_only_on_request(settings, generator, caplog):
    caplog.set_level("INFO")
    headers = {"authorization": f"Bearer {KEY}"}
    for wanted in (False, True):
        client = another(settings, generator, (KEY,), log_prompts=wanted)
        client.post(GENERATE, json={"prompt": "a secret 9"}, headers=headers)
        assert "/v1/images/generations" in caplog.text
        assert ("a secret 9" in caplog.text) == wanted
        assert KEY not in caplog.text


def test_a_defect_is_a_500_with_its_request_id(settings, generator, monkeypatch):
    monkeypatch.setattr(generator, "_prepare", lambda job: 1 / 0)
    response = post(another(settings, generator))
    assert response.status_code == 500
    assert response.headers["x-request-id"] in error(response)["message"]
    assert "division" not in response.text
