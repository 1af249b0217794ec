"""Commands and messages that the documentation names are those of the code: each shell block is run, or says what it needs."""

import re

import pytest

from flashdmd_ray.__main__ import main
from tests.pages import ROOT, blocks, flashdmd

PAGES = sorted((ROOT / "docs").glob("**/*.md"))
SHELL = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
NEEDS = re.compile(r"needs (a GPU|a download|a cluster|Docker|hours)")
DRY = [block for block in SHELL if block.mark == "--dry-run"]


def name(block):
    return f"{block.page.name}:{block.line}"


def test_every_block_has_a_language():
    assert [name(block) for page in PAGES for block in blocks(page) if not block.language] == []


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_a_shell_block_is_run_or_says_what_it_needs(block):
    """`<!-- commands: ... -->` above it names tests that use its options, or read it from the page; or --dry-run; or a need."""
    assert block.mark is not None, (
        "say above it how its commands are tested: <!-- commands: tests/... | --dry-run | needs ... -->"
    )
    if NEEDS.fullmatch(block.mark) or block in DRY:
        return
    files = [ROOT / file for file in block.mark.split()]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text += "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name in text)
    words = {word.strip("[]") for command in block.commands for word in command}
    options = {word for word in words if word.startswith("--")} - {"--set"}  # the values of which test_docs.py knows
    assert {option for option in options if option not in text} == set()


@pytest.mark.parametrize("block", DRY, ids=name)
def test_a_block_is_run_dry(block, capsys):
    for command in block.commands:
        arguments = flashdmd(command)
        assert arguments is not None
        if not any(word.startswith("[") for word in arguments):  # a line of usage
            code = main([*(word for word in arguments if word != "--dry-run"), "--dry-run"])
            printed = capsys.readouterr()
            assert code in (0, 2), printed.err  # 2: teacher, rewards or data are not here
            assert "settings that differ from the defaults" in printed.out  # behind the plan


def test_messages_that_the_troubleshooting_page_quotes_are_in_the_code():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "flashdmd_ray").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code).lower()  # texts of several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text for line in page.splitlines() for text in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    parts = [part.strip().lower() for text in quoted if line_of_output(text) for part in text.split("...")]
    assert len(parts) > 15
    assert [part for part in parts if part not in code] == []


def line_of_output(text):
    """True for what is no path and no metric."""
    return " " in text
