"""MkDocs hooks: pages of the repository outside docs/ join the site, and links between files become links between pages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")
"""Pages outside docs/. They live below project/ in the site."""
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^():\s#]+)(#[\w-]+)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/."""
    for name in OTHERS:
        files.append(File.generated(config, f"project/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page that lead to files of the repository."""
    path = page.file.src_uri
    source = Path(path.removeprefix("project/") if path.startswith("project/") else f"docs/{path}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        file = os.path.normpath(source.parent / target)
        place = file.removeprefix("docs/") if file.startswith("docs/") else f"project/{file}"
        if files.get_file_from_path(place) is not None:
            return f"[{text}]({os.path.relpath(place, os.path.dirname(path))}{anchor or ''})"
        if config.repo_url and (ROOT / file).exists():
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{file})"
        return text if (ROOT / file).exists() else link.group()

    return LINK.sub(rewritten, markdown)
