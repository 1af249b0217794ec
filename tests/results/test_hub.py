"""Pushes to a hub: the library's own calls, against a server that speaks the little of its API that they use."""

import base64
import hashlib
import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from flashdmd_ray.__main__ import main
from flashdmd_ray.results import hub


class Hub(BaseHTTPRequestHandler):
    """Accounts with the token hf_good, repositories of someone; large files go to a place of their own, as on the hub."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if "whoami" not in self.path:
            self.answer(404, {"error": "Repository not found"})
        elif not self.allowed():
            self.answer(401, {"error": "Invalid credentials"})
        else:
            self.answer(200, {"name": "someone"})

    def do_PUT(self):
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def do_POST(self):
        body, address = self.body(), f"http://127.0.0.1:{self.server.server_port}"
        if not self.allowed():
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path.endswith("/repos/create"):
            self.server.created = json.loads(body)
            owner = self.server.created.get("organization")
            if owner != "someone":
                self.answer(403, {"error": f"You don't have the rights to create a model under the namespace {owner}"})
                return
            self.answer(200, {"url": f"{address}/someone/{self.server.created['name']}"})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{address}/large"}}} for each in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        elif "/commit/" in self.path:
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/someone/x/commit/0"})
        else:
            self.answer(200, {})

    def allowed(self):
        return self.headers.get("authorization") == "Bearer hf_good"

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def answer(self, status, content, kind="application/json"):
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(encoded)))
        if status >= 400:
            self.send_header("x-error-message", content["error"])
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server(monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.large = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, value in {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_TOKEN": "hf_good",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    export = tmp_path / "export"
    (export / "unet").mkdir(parents=True)
    (export / "README.md").write_text("---\nlicense: other\n---\n# card\n")
    (export / "unet" / "model.fp16.safetensors").write_bytes(b"weights" * 1000)
    return export


def test_every_file_of_the_export_arrives(server, folder):
    hub.check_account("someone/student")
    hub.push_folder(folder, "someone/student", private=True)
    assert server.created["name"] == "student"
    assert "private" in str(server.created)
    files = {line["value"]["path"]: line for line in server.commit if line["key"] != "header"}
    assert sorted(files) == ["README.md", "unet/model.fp16.safetensors"]
    assert base64.b64decode(files["README.md"]["value"]["content"]) == (folder / "README.md").read_bytes()
    assert server.large[files["unet/model.fp16.safetensors"]["value"]["oid"]] == b"weights" * 1000


def test_a_refused_push_says_how_to_try_again(server, folder):
    with pytest.raises(RuntimeError, match=r"export is whole, but was not pushed \(.*rights.*\); `hf upload other/x "):
        hub.push_folder(folder, "other/x", private=False)


def test_what_cannot_be_pushed_is_refused_before_anything_is_loaded(server, monkeypatch, tmp_path, capsys):
    def refused(repository="someone/student"):
        run = str(tmp_path / "no_run")
        assert main(["export", run, "--dtype", "fp16", "--push-to-hub", repository, "--private"]) == 2
        return capsys.readouterr().err

    assert "no_run" in refused(), "the account is fine, the run is missing"
    assert "--push-to-hub a b/c: " in refused("a b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "Invalid user token" in refused()
    with socketserver.TCPServer(("127.0.0.1", 0), None) as silent, monkeypatch.context() as patch:
        monkeypatch.setenv(
            "HF_ENDPOINT", f"http://127.0.0.1:{silent.server_address[1]}"
        )  # takes connections, never answers
        patch.setattr(hub, "ANSWER_S", 1.0)
        assert "the hub did not finish within 1 s" in refused()
    assert "ConnectError" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert "no account; log in with `hf auth login`, or set HF_TOKEN" in refused()
