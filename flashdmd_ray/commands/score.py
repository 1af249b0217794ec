"""The command that judges folders of images: `flashdmd score FOLDER ... [--reward KIND=PATH ...] [--real FOLDER] [--inception FILE]`.

Exit codes: 0 judged, 1 failed, 2 a folder or an option is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashdmd_ray.commands.workplace import add_workplace, announce, device_of, workplace
from flashdmd_ray.config import RewardConfig, load_config
from flashdmd_ray.config.loading import validated
from flashdmd_ray.run.command_line import path_argument, run_command
from flashdmd_ray.run.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from flashdmd_ray.results.judging import Images, Judge

Columns = Mapping[str, Mapping[str, "Tensor"]]
"""Judge -> column -> values of the images of a folder."""


def score_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd score FOLDER ... [--reward KIND[=PATH] ...] [--real FOLDER] [--inception FILE] ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd score",
        description="Judge folders of images: rewards with bootstrap intervals, distances to real images, and differences from the first.",
        epilog="Started again, it goes on: what is judged is kept under --cache. See docs/evaluation.md.",
    )
    parser.add_argument(
        "folders", nargs="+", type=path_argument, metavar="FOLDER", help="images, each with its prompt in a .txt"
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        default=[],
        metavar="[NAME:]KIND[=PATH]",
        help="pickscore, hpsv2.1, imagereward, clipscore, aesthetic or mps",
    )
    parser.add_argument("--real", type=path_argument, metavar="FOLDER", help="real images, for distances")
    parser.add_argument(
        "--inception", metavar="FILE", help="weights of FID's Inception network, as torch-fidelity publishes them"
    )
    parser.add_argument("--lpips", metavar="FILE", help="torchvision's AlexNet: LPIPS between images of one prompt")
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="before Inception and LPIPS: DMD2 takes 512 for SDXL, 256 for SD1.5",
    )
    parser.add_argument("--patches", action="store_true", help="patch FID too, of the centre in full resolution")
    parser.add_argument(
        "--batch", type=int, default=50, help="images for each file of the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=path_argument, default=Path("scores"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="the figures as JSON")
    add_workplace(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _score(options))


def _score(options: argparse.Namespace) -> int:
    from flashdmd_ray.results.judging import Images, LpipsJudge, judged

    device = device_of(options)
    judges = _judges(options, device)
    folders = [Images.read(folder) for folder in options.folders]
    _check(options, folders)
    real = None if options.real is None else replace(Images.read(options.real), prompts=())  # distances alone
    with workplace(options.runtime, gpus=0 if device == "cpu" else 1) as executor:

        def columns(images: Images, by: Sequence[Judge]) -> Columns:
            arguments = (images, options.cache, executor, options.batch, options.workers, announce)
            return {judge.name: judged(judge, *arguments) for judge in by}

        found = [columns(images, judges) for images in folders]
        reals = (
            None if real is None else columns(real, [judge for judge in judges if not isinstance(judge, LpipsJudge)])
        )
    figures = _figures(folders, found, reals)
    print("\n".join(_table(figures)))
    if options.out is not None:
        write_atomically(options.out, json.dumps(figures, indent=1) + "\n")
    return 0


def _judges(options: argparse.Namespace, device: str) -> list[Judge]:
    from flashdmd_ray.models.trial_loading import try_loading
    from flashdmd_ray.results.judging import InceptionJudge, LpipsJudge, RewardJudge

    rewards = [_reward(text) for text in options.reward]
    if double := [
        reward.label for number, reward in enumerate(rewards) if reward.label in [r.label for r in rewards[:number]]
    ]:
        raise ValueError(f"--reward: '{double[0]}' is there twice; give one a name: NAME:KIND=PATH")
    try_loading(load_config("demo").model_copy(update={"rewards": tuple(rewards)}), rewards)
    judges: list[Judge] = [RewardJudge(reward, device) for reward in rewards]
    for option, package in (("inception", "torch_fidelity"), ("lpips", "lpips")):
        if file := getattr(options, option):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"--{option}: needs {package}; pip install 'flashdmd-ray[{option}]'")
            if not Path(file).is_file():
                raise ValueError(f"--{option}: there is no file {file}")
    if options.lpips is not None:
        judges.append(LpipsJudge(options.lpips, options.resize, device))
    if options.inception is not None:
        if options.real is None:
            raise ValueError(
                "--inception: its features are compared with those of real images; name their folder with --real"
            )
        judges.append(InceptionJudge(options.inception, options.resize, options.patches, device))
    if not judges:
        raise ValueError("nothing judges: name a --reward, --lpips, or --inception with --real")
    return judges


def _reward(text: str) -> RewardConfig:
    """A reward from [NAME:]KIND[=PATH]. Raises ValueError for one that reads latents."""
    named, _, path = text.partition("=")
    name, _, kind = named.rpartition(":")
    reward = validated(RewardConfig, {"kind": kind, "name": name} | ({"path": path} if path else {}))
    if not reward.reads_images:
        raise ValueError(f"--reward {text}: it reads latents, not images")
    return reward


def _check(options: argparse.Namespace, folders: Sequence[Images]) -> None:
    """Folders can be compared: each has a prompt for every image, and they have the same ones. Raises ValueError."""
    first = folders[0]
    for images in folders:
        if (options.reward or options.lpips) and not images.prompts:
            raise ValueError(
                f"{images.folder}: rewards and LPIPS need the prompt of each image in a .txt of the same name; one is missing"
            )
        if len(images.files) != len(first.files):
            raise ValueError(
                f"{images.folder} has {len(images.files)} images and {first.folder} has {len(first.files)}: draw what is missing"
            )
        if images.prompts != first.prompts:
            raise ValueError(
                f"{images.folder} and {first.folder} have different prompts: draw the same ones, or judge each alone"
            )


def _figures(folders: Sequence[Images], found: Sequence[Columns], reals: Columns | None) -> list[dict[str, Any]]:
    """A record for each folder."""
    from flashdmd_ray.results import folder_scores as scores

    records = []
    for images, columns in zip(folders, found, strict=True):
        record: dict[str, Any] = {"folder": str(images.folder), "images": len(images.files)}
        record["scores"] = {judge: asdict(mean) for judge, mean in scores.means(columns).items()}
        record["distances"] = {} if reals is None else scores.distances(columns, reals)
        record["diversity"] = {
            judge: scores.diversity(mine, images.prompts)
            for judge, mine in columns.items()
            if "features" in mine or "diversity" in mine
        }
        if columns is not found[0]:
            record["against the first"] = {
                judge: asdict(scores.paired(mine["score"], found[0][judge]["score"]))
                for judge, mine in columns.items()
                if "score" in mine
            }
        records.append(record)
    return records


def _table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records as Markdown. A distance of too few samples is "-"."""
    varied = [judge for judge in records[0]["diversity"] if any(record["diversity"][judge] for record in records)]
    head = [*records[0]["scores"], *records[0]["distances"], *(f"diversity ({judge})" for judge in varied)]
    lines = [_row(["folder", "images", *head]), _row(["---"] * (2 + len(head)))]
    for record in records:
        cells = [f"{v['mean']:.4g} [{v['low']:.4g}, {v['high']:.4g}]" for v in record["scores"].values()]
        values = [*record["distances"].values(), *(record["diversity"][judge] for judge in varied)]
        cells += ["-" if value is None else f"{value:.4g}" for value in values]
        lines.append(_row([record["folder"], str(record["images"]), *cells]))
    for record in records[1:]:
        for judge, found in record["against the first"].items():
            gap = found["difference"]
            lines.append(
                f"{record['folder']} against {records[0]['folder']}, {judge}: {gap['mean']:+.4g} [{gap['low']:+.4g}, {gap['high']:+.4g}], "
                f"better for {found['wins']:.0%} of the prompts, p = {found['p']:.2g}"
            )
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
