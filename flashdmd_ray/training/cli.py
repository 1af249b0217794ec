"""The command line of joint training. What a user can get wrong is said in one line before torch is imported.

Exit codes: 0 done, 1 the run failed, 2 the configuration or a file it names is wrong, 3 the hack monitor stopped it, 130 and 143 after
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from flashdmd_ray.config import Config, dump_changes, load_config
from flashdmd_ray.plan import GPUS, check, fit_micro_batches, gpu_of, preview, sections, use_gpus
from flashdmd_ray.run.command_line import prepare_process, refuse, run_training, training_parser
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.progress import still
from flashdmd_ray.run.storage import checkpoint_root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    prepare_process()
    parser = training_parser(
        "flashdmd train",
        "Distil a diffusion or flow model into a few-step generator and refine it with preference RL beside it.",
        "`flashdmd config KEY` explains a key, docs/configuration.md all of them.",
        "print roles, parameters, schedule, memory, placement and time",
        "demo",
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), help="predict times on these; default: what gpu_memory_gib speaks of"
    )
    options = parser.parse_args(arguments)
    try:
        config, gpus = use_gpus(load_config(options.config, options.set))
        with still(_say, lambda: "still planning"):
            config = fit_micro_batches(config)
        if gpus:
            print(gpus, flush=True)
        if options.dry_run:
            return _plan(config, options.gpu)
        with still(_say, lambda: "still looking at models and data"):
            run, _ = check(config)
    except ValueError as error:
        return refuse(error)
    _print_settings(config)
    return run_training(lambda: _train(config, run), run, checkpoint_root(config, run.path))


def _plan(config: Config, gpu: str | None) -> int:
    """Print the plan; what keeps it from being run is refused behind it."""
    with still(_say, lambda: "still planning"):
        run, parts, missing = preview(config)
        for section in sections(config, run, parts, gpu_of(config, gpu)):
            print(f"{section}\n", flush=True)
    _print_settings(config)
    if missing:
        raise ValueError("\n".join(missing))
    return 0


def _print_settings(config: Config) -> None:
    print(f"settings that differ from the defaults\n{indent(dump_changes(config), '  ')}", flush=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _train(config: Config, run: RunDirectory) -> int:
    print(f"{run.path}: {'opening' if run.exists else 'new run'}, loading libraries and models", flush=True)
    with still(_say, lambda: "still loading libraries"):
        from flashdmd_ray.training.job import run_job

    return run_job(config)
