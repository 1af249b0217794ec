"""Exact judge of digit scenes: compares background, layout, colours and digits with the prompt.

Background, layout and colours are measured on the pixels. Only the digits' identity needs a network, a small classifier
of single-digit crops. A second small network gives the features in which Frechet distances are computed. The judge is
held out: it is never a reward and no recipe trains against it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from flashdmd_ray.demo import weights_path
from flashdmd_ray.demo.scenes import BACKGROUNDS, CANVAS, COLOURS, RELATIONS, SceneAttributes, parse_caption

SINGLE, HORIZONTAL, VERTICAL, UNCLEAR = range(4)
CROP = 14
FEATURE_WIDTH = 64

# In RGB units of [0, 1]; the weakest palette contrast (green on gray) is 0.48.
_INK_CONTRAST = 0.25
_BACKGROUND_TOLERANCE = 0.15
_COLOUR_TOLERANCE = 0.35
_COLOUR_AGREEMENT = 0.75
_DIGIT_CONFIDENCE = 0.5
# One digit's ink is at most 12 wide and high; two digits' centres are about 12 apart.
_PAIR_WIDTH = 12.5
_PAIR_HEIGHT = 15.0
_GAP = slice(9, 15)
_GAP_INK = 1


def _palette(colours: dict[str, tuple[float, float, float]]) -> torch.Tensor:
    return torch.tensor(list(colours.values()))


class DigitClassifier(nn.Module):
    """Ink coverage (N, 1, 14, 14) in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 49, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, ink: torch.Tensor) -> torch.Tensor:
        return self.body(ink)


class SceneEncoder(nn.Module):
    """Images (B, 3, 24, 24) in [-1, 1] to features (B, 64); `head` reads attributes from them during training."""

    def __init__(self, attribute_count: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 36, FEATURE_WIDTH),
        )
        self.head = nn.Linear(FEATURE_WIDTH, attribute_count)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Measured facts of B images; digit parts are ordered left to right or top to bottom.

    background (B,) int64 index into BACKGROUNDS or -1; layout (B,) int64; colours (B, 2) int64 index into COLOURS or
    -1; crops (B, 2, 14, 14) float32 ink coverage around each part's middle, zero for an absent part.
    """

    background: torch.Tensor
    layout: torch.Tensor
    colours: torch.Tensor
    crops: torch.Tensor


def measure(images: torch.Tensor) -> Measurement:
    """Measure images (B, 3, H, W) float32 in [-1, 1]; other sizes than 24x24 are resized by area."""
    if images.shape[-2:] != (CANVAS, CANVAS):
        images = F.interpolate(images, size=(CANVAS, CANVAS), mode="area")
    rgb = (images.float().clamp(-1, 1) + 1) / 2
    paper = rgb.flatten(2).median(dim=2).values  # ink covers less than half of every scene
    distance = torch.cdist(paper, _palette(BACKGROUNDS))
    background = torch.where(distance.amin(1) < _BACKGROUND_TOLERANCE, distance.argmin(1), -1)
    contrast = (rgb - paper[:, :, None, None]).norm(dim=1)
    ink = contrast > _INK_CONTRAST
    layout, split = _layout(ink)
    parts = _parts(ink, layout, split)
    measured = [_measure_part(rgb, paper, contrast, part) for part in parts.unbind(1)]
    colours = torch.stack([colour for colour, _ in measured], dim=1)
    crops = torch.stack([crop for _, crop in measured], dim=1)
    return Measurement(background, layout, colours, crops)


def _layout(ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Layout (B,) and first row or column (B,) of the second part, from ink (B, H, W) bool."""
    columns, rows = ink.sum(1), ink.sum(2)
    width, height = _extent(columns > 0), _extent(rows > 0)
    column_gap, row_gap = columns[:, _GAP].min(1), rows[:, _GAP].min(1)
    wide, tall = width > _PAIR_WIDTH, height > _PAIR_HEIGHT
    layout = torch.full((len(ink),), UNCLEAR)
    layout[~wide & ~tall & (width > 0)] = SINGLE
    layout[wide & ~tall & (column_gap.values <= _GAP_INK)] = HORIZONTAL
    layout[tall & ~wide & (row_gap.values <= _GAP_INK)] = VERTICAL
    gap = torch.where(layout == HORIZONTAL, column_gap.indices, row_gap.indices)
    return layout, gap + _GAP.start


def _extent(occupied: torch.Tensor) -> torch.Tensor:
    """Distance (B,) from the first to the last True of (B, N) bool, both included; 0 when there is none."""
    position = torch.arange(1, occupied.shape[1] + 1)
    last = (occupied * position).amax(1)
    first = torch.where(occupied, position, occupied.shape[1] + 1).amin(1)
    return (last - first + 1).clamp(min=0)


def _parts(ink: torch.Tensor, layout: torch.Tensor, split: torch.Tensor) -> torch.Tensor:
    """(B, 2, H, W) bool: the ink of each part."""
    position = torch.arange(ink.shape[1])
    before = position[None] < split[:, None]  # (B, N), along columns or rows
    first = torch.where((layout == HORIZONTAL)[:, None, None], before[:, None, :], before[:, :, None])
    first = first | ~((layout == HORIZONTAL) | (layout == VERTICAL))[:, None, None]
    return torch.stack([ink & first, ink & ~first], dim=1)


def _measure_part(
    rgb: torch.Tensor, paper: torch.Tensor, contrast: torch.Tensor, part: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour index (B,) and crop of ink coverage (B, 14, 14) of one part (B, H, W) bool."""
    strength = contrast * part
    core = part & (strength > 0.7 * strength.amax(dim=(1, 2), keepdim=True))
    weight = core.float()
    count = weight.sum(dim=(1, 2)).clamp(min=1)
    paint = (rgb * weight[:, None]).sum(dim=(2, 3)) / count[:, None]
    palette = _palette(COLOURS)
    distance = torch.cdist(paint, palette)
    nearest = distance.argmin(1)
    votes = torch.cdist(rgb.flatten(2).transpose(1, 2), palette[None]).argmin(2).view(part.shape)
    agreement = ((votes == nearest[:, None, None]) & core).sum(dim=(1, 2)) / count
    clear = (distance.amin(1) < _COLOUR_TOLERANCE) & (agreement >= _COLOUR_AGREEMENT) & core.any(2).any(1)
    axis = paint - paper
    coverage = torch.einsum("bchw,bc->bhw", rgb - paper[:, :, None, None], axis) / axis.square().sum(1).clamp(
        min=1e-3
    ).view(-1, 1, 1)
    return torch.where(clear, nearest, -1), _crop(coverage.clamp(0, 1), part)


def _crop(coverage: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """(B, 14, 14) window around the middle of the part's bounding box; zero outside the canvas and the part's slot."""
    size = part.shape[-1]
    # One more pixel around the ink keeps the soft edge of strokes and leaves the neighbour out.
    near = F.max_pool2d(part.float()[:, None], 3, stride=1, padding=1)[:, 0]
    middle = []
    for axis in (1, 2):  # profile along columns (x), then along rows (y)
        occupied = part.any(axis)
        position = torch.arange(size).expand_as(occupied)
        first = torch.where(occupied, position, size).amin(1)
        last = torch.where(occupied, position, -1).amax(1)
        middle.append((first + last + 1) / 2)
    offset = (torch.arange(CROP) + 0.5 - CROP / 2) / (size / 2)
    x = (middle[0] / (size / 2) - 1)[:, None] + offset
    y = (middle[1] / (size / 2) - 1)[:, None] + offset
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample((coverage * near)[:, None], grid, align_corners=False)[:, 0]


def expected_parts(attributes: SceneAttributes) -> tuple[int, list[tuple[int, int]]]:
    """Layout and (digit, colour index) of each part in left-to-right or top-to-bottom order."""
    colours = list(COLOURS)
    parts = [(item.digit, colours.index(item.colour)) for item in attributes.digits]
    if attributes.relation is None:
        return SINGLE, parts
    x, y = RELATIONS[attributes.relation]
    return (HORIZONTAL if x else VERTICAL), (parts if x + y < 0 else parts[::-1])


class PromptChecker:
    """The held-out judge of prompts and the feature space of Frechet distances; runs on the CPU, in float32."""

    def __init__(self, digits: DigitClassifier, encoder: SceneEncoder) -> None:
        self.digits = digits.eval().requires_grad_(False)
        self.encoder = encoder.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | None = None) -> PromptChecker:
        """Load `config.json` and `model.safetensors` of `path` (default: the shipped judge)."""
        path = weights_path("checker") if path is None else path
        for file in ("config.json", "model.safetensors"):
            if not (path / file).is_file():
                raise ValueError(f"{path / file} is missing: not a checker directory")
        config = json.loads((path / "config.json").read_text())
        digits, encoder = DigitClassifier(), SceneEncoder(config["attribute_count"])
        state = load_file(path / "model.safetensors")
        holder = nn.ModuleDict({"digits": digits, "encoder": encoder})
        holder.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(digits, encoder)

    @torch.no_grad()
    def correct(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(B,) bool: does image b, (B, 3, H, W) in [-1, 1], show everything prompt b says and nothing else?

        Raises ValueError when the counts differ or a prompt is not a digit-scene caption.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        measured = measure(images.detach().cpu())
        probability = self.digits(measured.crops.view(-1, 1, CROP, CROP)).softmax(1).view(-1, 2, 10)
        confidence, digit = probability.max(2)
        digit = torch.where(confidence >= _DIGIT_CONFIDENCE, digit, -1)
        backgrounds = list(BACKGROUNDS)
        verdict = []
        for row, prompt in enumerate(prompts):
            attributes = parse_caption(prompt)
            layout, parts = expected_parts(attributes)
            digits = list(zip(digit[row].tolist(), measured.colours[row].tolist(), strict=True))[: len(parts)]
            verdict.append(
                measured.background[row].item() == backgrounds.index(attributes.background)
                and measured.layout[row].item() == layout
                and digits == parts
            )
        return torch.tensor(verdict, dtype=torch.bool)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 64) float32 features of images (B, 3, H, W) in [-1, 1]."""
        images = images.detach().cpu().float().clamp(-1, 1)
        if images.shape[-2:] != (CANVAS, CANVAS):
            images = F.interpolate(images, size=(CANVAS, CANVAS), mode="area")
        return torch.cat([self.encoder(part) for part in images.split(512)])
