"""The command that shows finished runs on one page: `flashdmd report RUN [RUN ...] [--out FILE]`.

Exit codes: 0 done, 1 failed, 2 a folder is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashdmd_ray.run.command_line import path_argument, run_command


def report_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd report RUN [RUN ...] [--out FILE]`: one HTML page with tables, samples and curves, several runs side by side."""
    parser = argparse.ArgumentParser(
        prog="flashdmd report", description="Show finished runs on one self-contained HTML page, several side by side."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path_argument, help="run folders, for example runs/demo")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run's folder)")
    options = parser.parse_args(arguments)

    def work() -> int:
        from flashdmd_ray.results.run_page import PAGE, FinishedRun, write_run_page

        runs = [FinishedRun.read(run) for run in options.runs]
        print(f"written to {write_run_page(runs, options.out or runs[0].path / PAGE)}")
        return 0

    return run_command(work)
