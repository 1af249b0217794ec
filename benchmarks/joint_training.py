"""Compare joint training, distillation alone and preference updates alone on the demo world, on held-out prompts and noise.

    python benchmarks/joint_training.py [--seeds 0 1 2] [--samples 2000] [--workers 2] [--set key=value ...]

joint: the shipped demo. control: distillation only, equal steps. rl_only: preference updates without distillation, which must show
reward hacking, or the judge is blind. Runs are resumable: what is finished is not computed again. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARMS = {
    "joint": [],
    "control": ["preference.updates=0"],
    "rl_only": ["preference.distill=false"],
}


def main() -> None:
    options = parse()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool:
        measured = list(pool.map(lambda job: train_and_measure(*job, options), jobs))
    rows = [row for rows in measured for row in rows]
    (options.out / "joint_training.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "teacher"], choices=[*ARMS, "teacher"])
    parser.add_argument("--samples", type=int, default=2000, help="held-out prompts per figure")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes to the demo, for all arms")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "joint_training")
    return parser.parse_args()


def overrides(arm: str, seed: int, options: argparse.Namespace) -> list[str]:
    return [
        "runtime=local",
        f"seed={seed}",
        f"run.dir={options.out}",
        f"run.name={arm}-{seed}",
        "tracking.enabled=false",
        "evaluation.samples=20",
        "evaluation.teacher_steps=5",
        *options.set,
        *ARMS.get(arm, []),
    ]


def train_and_measure(arm: str, seed: int, options: argparse.Namespace) -> list[dict[str, object]]:
    if arm in ARMS:
        train(arm, seed, options)
    return measure(arm, seed, options)


def train(arm: str, seed: int, options: argparse.Namespace) -> None:
    """One run of the main job in a process of its own, on one thread."""
    command = [sys.executable, str(ROOT / "jobs" / "joint_train.py"), "--set", *overrides(arm, seed, options)]
    with (options.out / f"{arm}-{seed}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    print(f"trained {arm} {seed}", flush=True)


def measure(arm: str, seed: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one arm and seed, from a process of its own; kept in a file beside the run."""
    path = options.out / f"measured-{arm}-{seed}-{options.samples}.json"
    if not path.exists():
        command = [sys.executable, __file__, "measure", arm, str(seed), str(options.samples), str(path)]
        command += [str(options.out), *overrides(arm, seed, options)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return json.loads(path.read_text())


def measure_here(arm: str, seed: str, samples: str, path: str, out: str, *settings: str) -> None:
    from flashdmd_ray.checkpoint import latest_checkpoint
    from flashdmd_ray.config import load_config
    from flashdmd_ray.results.comparison import build_eval_metrics
    from flashdmd_ray.results.evaluation import as_record, evaluate
    from flashdmd_ray.results.evaluation_data import build_reference
    from flashdmd_ray.results.student import student_weights
    from flashdmd_ray.roles.image_sampling import student_sampler, teacher_sampler
    from flashdmd_ray.roles.networks import load_family, load_student

    config = load_config(None, [*settings, f"evaluation.samples={samples}", "evaluation.teacher_steps=25"])
    family = load_family(config.model)
    if arm == "teacher":
        chosen = [
            teacher_sampler(family, 25, config.teacher_guidance),
            teacher_sampler(family, 2, config.teacher_guidance),
        ]
        chosen += [student_sampler("before", family, family.teacher, few) for few in config.student_timesteps.values()]
    else:
        checkpoint = latest_checkpoint(Path(out) / f"{arm}-{seed}" / "checkpoints")
        assert checkpoint is not None, f"{arm}-{seed} has no checkpoint"
        network = load_student(family, student_weights(config, family, checkpoint))
        chosen = [student_sampler("student", family, network, few) for few in config.student_timesteps.values()]
    reference, eval_metrics = build_reference(config, family.image_size, int(seed)), build_eval_metrics(config, family)
    assert eval_metrics is not None
    measured = evaluate(family, chosen, reference, eval_metrics, int(seed), 100)
    records = [
        {"arm": arm, "seed": int(seed), "reward": row.rewards["pickscore"], **as_record(row)} for row in measured.rows
    ]
    Path(path).write_text(json.dumps(records, indent=1) + "\n")


def table(rows: list[dict[str, object]]) -> str:
    """Mean over seeds (and the range of the Frechet distance) for every sampler of every arm."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((str(row["arm"]), str(row["name"])), []).append(row)  # type: ignore[arg-type]
    lines = [
        "| arm | sampler | seeds | Frechet distance | prompt accuracy | reward | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    for (arm, name), found in groups.items():
        mean = {
            key: sum(row[key] for row in found) / len(found) for key in ("frechet", "accuracy", "reward", "diversity")
        }
        spread = f"{min(row['frechet'] for row in found):.2f}..{max(row['frechet'] for row in found):.2f}"
        figures = [
            f"{mean['frechet']:.2f} ({spread})",
            f"{mean['accuracy']:.3f}",
            f"{mean['reward']:.3f}",
            f"{mean['diversity']:.2f}",
        ]
        lines.append(f"| {arm} | {name} | {len(found)} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure_here(*sys.argv[2:])
    else:
        main()
