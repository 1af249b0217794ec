"""A real Prometheus with the configuration of deploy/metrics, and what the dashboards and rules there ask it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from compose_file import ROOT

FOLDER = ROOT / "deploy/metrics"


def expressions() -> list[str]:
    """All of the dashboards, for all runs, and of the rules, without the bounds that raise the alarm."""
    boards = [json.loads(path.read_text().replace("$run", ".*")) for path in (FOLDER / "dashboards").glob("*.json")]
    asked = [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]
    (group,) = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return asked + [re.sub(r"\s*[<>=]+ [\d.]+$", "", rule["expr"]) for rule in group["rules"]]


class Prometheus:
    """Started with the configuration of docker-compose.yml, but for addresses and the interval."""

    def __init__(self, directory: Path, port: int, ray: int, serve: int, key: Path) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "1s"
        nodes, service = config["scrape_configs"]
        assert [target["port"] for target in nodes.pop("dns_sd_configs")] == [8080]
        nodes["static_configs"] = [{"targets": [f"127.0.0.1:{ray}"]}]
        service["static_configs"] = [{"targets": [f"127.0.0.1:{serve}"]}]
        service["authorization"] = {"credentials_file": str(key)}
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "rules.yml", directory)
        subprocess.run(["promtool", "check", "config", file], check=True, capture_output=True)
        self._url = f"http://127.0.0.1:{port}/api/v1/query_range"
        self._began = time.time()
        words = [
            f"--config.file={file}",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._process = subprocess.Popen(["prometheus", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def unanswered(self, asked: list[str], limit: float) -> list[str]:
        """Those of the expressions that had no value at any second since the start. Raises HTTPError for a wrong one."""
        give_up = time.monotonic() + limit
        while (left := [one for one in asked if not self._has_values(one)]) and time.monotonic() < give_up:
            time.sleep(1)
        return left

    def _has_values(self, expression: str) -> bool:
        query = {"query": expression, "start": self._began, "end": time.time(), "step": 1}
        with urllib.request.urlopen(f"{self._url}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return bool(json.load(answer)["data"]["result"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
