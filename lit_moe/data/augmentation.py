"""Random changes of training images, by torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_moe.errors import LitMoEError


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images, each on its own.

    Attributes:
        flip: mirror half of them left to right; not for digits or text.
        crop: pixels of reflected margin, of which a random window of the old size is cut.
        rotate: degrees, uniform in +- rotate; what comes from outside is 0.
        noise: standard deviation of normal noise on the pixels, which lie in [0, 1].
    """

    flip: bool = False
    crop: int = 0
    rotate: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative amounts."""
        for name in ("crop", "rotate", "noise"):
            if getattr(self, name) < 0:
                raise LitMoEError(f"augmentation.{name} is {getattr(self, name)}; at least 0")

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Return changed images of the same shape; draws from torch's global generator."""
        if self.flip:
            mirrored = torch.rand(len(pixels_BCHW), 1, 1, 1, device=pixels_BCHW.device) < 0.5
            pixels_BCHW = torch.where(mirrored, pixels_BCHW.flip(-1), pixels_BCHW)
        if self.crop:
            pixels_BCHW = _cropped(pixels_BCHW, self.crop)
        if self.rotate:
            pixels_BCHW = _rotated(pixels_BCHW, self.rotate)
        if self.noise:
            pixels_BCHW = pixels_BCHW + torch.randn_like(pixels_BCHW) * self.noise
        return pixels_BCHW


def _cropped(pixels_BCHW: Tensor, margin: int) -> Tensor:
    height, width = pixels_BCHW.shape[-2:]
    padded = F.pad(pixels_BCHW, (margin,) * 4, mode="reflect")
    tops, lefts = torch.randint(0, 2 * margin + 1, (2, len(padded))).tolist()
    windows = [
        image[:, top : top + height, left : left + width]
        for image, top, left in zip(padded, tops, lefts, strict=True)
    ]
    return torch.stack(windows)


def _rotated(pixels_BCHW: Tensor, degrees: float) -> Tensor:
    spread = math.radians(degrees)
    angle = (torch.rand(len(pixels_BCHW), device=pixels_BCHW.device) * 2 - 1) * spread
    sine, cosine, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    matrix = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels_BCHW.shape), align_corners=False)
    return F.grid_sample(pixels_BCHW, grid, align_corners=False)
