"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers in a row, with nothing between them."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
_PLACES = (
    0,
    2,
    4,
    6,
    7,
)  # dropout, which does nothing in evaluation, took the other places of the published nn.Sequential


class LinearHead(nn.Module):
    """Rewards (B,) of features (B, width). Published under 'layers.0', 'layers.2', 'layers.4', 'layers.6' and 'layers.7'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inputs = (width, *WIDTHS[:-1])
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(i, o) for place, i, o in zip(_PLACES, inputs, WIDTHS, strict=True)}
        )

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)
