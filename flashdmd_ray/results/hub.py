"""Pushes of an export to the Hugging Face hub, with the account of `hf auth login` or HF_TOKEN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flashdmd_ray.run.messages import one_line

ANSWER_S = 30.0
"""Time for the hub's answers beside the upload itself."""
SLOWEST = 2**17
"""Bytes a second below which an upload is given up."""


def check_account(repository: str) -> None:
    """Check that a push can work. Raises ValueError for a bad name, no login, or a hub that cannot be reached or refuses the token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {repository}: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push-to-hub {repository}: HF_HUB_OFFLINE is set; unset it, or push the folder later")
    if get_token() is None:
        raise ValueError(f"--push-to-hub {repository}: no account; log in with `hf auth login`, or set HF_TOKEN")
    if problem := _call_hub(ANSWER_S, "check"):
        raise ValueError(f"--push-to-hub {repository}: {problem}; see `hf auth whoami`, HF_TOKEN and HF_ENDPOINT")


def push_folder(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder as a commit to `repository`, which is made when it is not there. Raises RuntimeError with the hub's reason."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    kind = "private" if private else "default"
    if problem := _call_hub(ANSWER_S + size / SLOWEST, "push", str(folder), repository, kind):
        raise RuntimeError(
            f"{folder} is whole, but was not pushed ({problem}); `hf upload {repository} {folder} .` tries again"
        )


def _call_hub(deadline: float, *arguments: str) -> str:
    """Call `main` in a process of its own, since the library waits without end for a silent hub; returns why it failed, or ""."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    command = [sys.executable, "-m", __name__, *arguments]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=deadline)
    except subprocess.TimeoutExpired:
        return f"the hub did not finish within {deadline:,.0f} s"
    return done.stdout.strip() or f"exit code {done.returncode}" if done.returncode else ""


def main(arguments: list[str]) -> int:
    """`check`, or `push FOLDER REPOSITORY private|default`; prints why it failed."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        if arguments[0] == "check":
            hub.whoami()
            return 0
        folder, repository, kind = arguments[1:]
        hub.create_repo(repository, private=kind == "private" or None, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of flashdmd_ray")
    except Exception as error:  # no network, a refused token, no right to write, a full account
        print(f"{type(error).__name__}: {one_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
