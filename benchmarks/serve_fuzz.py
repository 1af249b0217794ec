"""Requests made from the OpenAPI document, and bodies that no document would ask for, against a running service.

    python benchmarks/serve_fuzz.py [--examples 800]

schemathesis with all of its checks: no 5xx, no undocumented status, no answer of another shape, no valid request refused, no invalid one
accepted. Bar: at least 2,000 cases without a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import requests
from serve_load import export_demo, running_service

KEY = "a-key-for-the-fuzzing-of-this-service"
NASTY: Mapping[str, tuple[bytes, int]] = {
    "10 MB": (json.dumps({"prompt": "x" * 10_000_000}).encode(), 413),
    "deep JSON": (b'{"prompt":' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
    "NaN": (b'{"prompt": "x", "n": NaN}', 400),
    "control characters": (json.dumps({"prompt": "".join(map(chr, range(32)))}).encode(), 200),
    "raw control characters": (b'{"prompt": "\x00\x01"}', 400),
    "4-byte emoji": (json.dumps({"prompt": "\U0001f600" * 100}, ensure_ascii=False).encode(), 200),
    "half a surrogate pair": (b'{"prompt": "\\ud83d"}', 400),
    "n = 10^9": (json.dumps({"prompt": "x", "n": 10**9}).encode(), 400),
    "n of 5,000 digits": (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", 400),
    "size 1x100000": (json.dumps({"prompt": "x", "size": "1x100000"}).encode(), 400),
    "no UTF-8": (b'{"prompt": "\xff"}', 400),
    "empty": (b"", 400),
}


def nasty_bodies(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for name, (body, expected) in NASTY.items():
        response = requests.post(f"{url}/v1/images/generations", data=body, headers=headers, timeout=120)
        shaped = "error" in response.json() or "data" in response.json()
        verdict = "ok" if response.status_code == expected and shaped else f"FAILED, expected {expected}"
        print(f"  {name}: {response.status_code} {verdict}")


def fuzz(url: str, examples: int, folder: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--phases", "coverage,fuzzing", "--workers", "4"]
    command += [
        "--max-examples",
        str(examples),
        "--no-color",
        "--suppress-health-check",
        "all",
        "--continue-on-failure",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    cases = sum(int(number) for number in re.findall(r"(\d+) generated", done.stdout))
    summary = done.stdout[done.stdout.find("= SUMMARY") :] if done.returncode == 0 else done.stdout
    print(summary[-8000:])
    print(f"{cases} cases (bar: at least 2000), exit code {done.returncode} (bar: 0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=800, help="per operation (default: %(default)s)")
    options = parser.parse_args()
    os.environ["FLASHDMD_API_KEYS"] = KEY
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        args = {
            "models": {"demo": str(export_demo(root / "demo"))},
            "aliases": {"gpt-image-1": "demo"},
            "teacher_steps": 2,
            "cache": str(root / "cache"),
            "limits": {"images": 2},
            "replica": {"count": 2, "batch": 16, "threads": 1},
        }
        with running_service(args) as service:
            print("bodies:")
            nasty_bodies(service.url)
            fuzz(service.url, options.examples, root)


if __name__ == "__main__":
    main()
