"""The tools that check deploy/ come from wheels of others than their makers: the binaries are the official releases."""

import hashlib
import platform
import sys
from pathlib import Path

import pytest

OFFICIAL = {  # Linux on x86-64: docker compose 5.6.0, hadolint 2.15.1, kubectl 1.37.1
    "docker-compose": "40343e21ca777173e69cff5dbafeb37c6f81f3b0d57d9e597f036e95eb63e76a",
    "hadolint": "c7187db94eeeeca956519a6af171adc31453941a1e777961f6e680f697c8c507",
    "kubectl": "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8",
}


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="checksums of Linux on x86-64")
@pytest.mark.parametrize("tool", OFFICIAL)
def test_a_tool_is_the_official_release(tool: str) -> None:
    with Path(sys.executable).with_name(tool).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == OFFICIAL[tool]
