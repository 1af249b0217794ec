"""Makes kuberay_schemas.json from KubeRay's CRDs: `python tests/deploy/kuberay_schemas.py KUBERAY_CHECKOUT`.

The JSON schemas of RayCluster, RayJob and RayService (ray.io/v1) without descriptions. A key that is not in a schema is forbidden, which
a cluster does not do: it drops the key. Subtrees that occur several times, such as pod templates, are kept once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_suffix(".json")
SHORTEST_SHARED = 120


def main(checkout: Path) -> None:
    schemas: dict[str, Any] = {}
    for plural in ("rayclusters", "rayjobs", "rayservices"):
        crd = yaml.safe_load((checkout / f"helm-chart/kuberay-operator/crds/ray.io_{plural}.yaml").read_text())
        (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[crd["spec"]["names"]["kind"]] = schema
    counts: Counter[str] = Counter()
    count(schemas, counts)
    names = {text: f"part{number}" for number, text in enumerate(sorted(t for t, n in counts.items() if n > 1))}
    parts = {name: shared(json.loads(text), names, whole=True) for text, name in names.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    source = f"From the CRDs of KubeRay {commit.stdout.strip()} (https://github.com/ray-project/kuberay), Apache-2.0; see {FILE.stem}.py"
    entries = {"$comment": source} | {kind: shared(schema, names, whole=True) for kind, schema in schemas.items()}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
    inner = ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items())
    FILE.write_text("{\n" + ",\n".join([*lines, f'"$defs": {{\n{inner}\n}}']) + "\n}\n")


def strict(node: Any) -> Any:
    """The schema without descriptions and with all keys known."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: strict(value) for key, value in node.items() if not (key == "description" and isinstance(value, str))}
    kept = {key: value for key, value in kept.items() if not key.startswith("x-kubernetes-")}
    if isinstance(kept.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in node:
        kept.setdefault("additionalProperties", False)
    return kept


def count(node: Any, counts: Counter[str]) -> None:
    if isinstance(node, dict):
        text = json.dumps(node)
        counts[text] += "type" in node and len(text) >= SHORTEST_SHARED
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        count(inner, counts)


def shared(node: Any, names: dict[str, str], whole: bool = False) -> Any:
    if isinstance(node, list):
        return [shared(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    if not whole and (name := names.get(json.dumps(node))):
        return {"$ref": f"#/$defs/{name}"}
    return {key: shared(value, names) for key, value in node.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
