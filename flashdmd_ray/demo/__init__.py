"""The embedded world "digit scenes": images, captions, masks, an exact judge and tiny trained weights.

Real handwriting (scikit-learn's 1,797 digits), coloured and composed on a 24x24 canvas. `docs/demo_world.md` describes
it. Importing this package imports no torch: looking up a path must stay cheap.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS_ROOT = Path(__file__).parent / "weights"

# One file per part whose presence means that the part is complete.
_MARKERS = {
    "teacher": ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
    "teacher_sd3": (
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ),
    "reward": ("config.json", "model.safetensors", "processor_config.json"),
    "latent_reward": ("config.json", "model.safetensors"),
    "latent_clip": ("config.json", "model.safetensors"),
    "sam": ("config.json", "model.safetensors"),
    "checker": ("config.json", "model.safetensors"),
}


def weights_path(part: str = "") -> Path:
    """Directory of one part of the shipped weights, or of all of them for the empty name.

    `part`: "teacher" (a StableDiffusionXLPipeline directory), "teacher_sd3" (a StableDiffusion3Pipeline directory
    without a T5), "reward" (a CLIPModel directory), "latent_reward", "latent_clip", "sam", "checker" or "". Raises ValueError when the
    part is unknown or when its files are missing.
    """
    if part and part not in _MARKERS:
        raise ValueError(f"unknown part {part!r} of the demo weights; known: {', '.join(_MARKERS)}")
    for name in [part] if part else list(_MARKERS):
        for marker in _MARKERS[name]:
            if not (WEIGHTS_ROOT / name / marker).is_file():
                raise ValueError(
                    f"demo weights are incomplete: {WEIGHTS_ROOT / name / marker} is missing; reinstall the package"
                    f" or make them with `python jobs/prepare_demo.py --part {name}`"
                )
    return WEIGHTS_ROOT / part if part else WEIGHTS_ROOT
