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
        smallest_area: share of the image that a random window has at least, which is stretched to
            the old size; 1 for the whole image, 0.05 for the Inception crop of ImageNet recipes.
        rotate: degrees, uniform in +- rotate; what comes from outside is 0.
        noise: standard deviation of normal noise on the pixels, which lie in [0, 1].
    """

    flip: bool = False
    crop: int = 0
    smallest_area: float = 1.0
    rotate: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative amounts."""
        for name in ("crop", "rotate", "noise"):
            if getattr(self, name) < 0:
                raise LitMoEError(f"augmentation.{name} is {getattr(self, name)}; at least 0")
        if not 0 < self.smallest_area <= 1:
            raise LitMoEError(
                f"augmentation.smallest_area is {self.smallest_area:g}; it is a share above 0 and "
                "at most 1"
            )

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Return changed images of the same shape; draws from torch's global generator."""
        if self.flip:
            mirrored = torch.rand(len(pixels_BCHW), 1, 1, 1, device=pixels_BCHW.device) < 0.5
            pixels_BCHW = torch.where(mirrored, pixels_BCHW.flip(-1), pixels_BCHW)
        if self.crop:
            pixels_BCHW = _cropped(pixels_BCHW, self.crop)
        if self.smallest_area < 1:
            pixels_BCHW = _window(pixels_BCHW, self.smallest_area)
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


def _window(pixels_BCHW: Tensor, smallest: float) -> Tensor:
    """Stretch a random window of each image, a third wider or higher than square at most."""
    count, device = len(pixels_BCHW), pixels_BCHW.device
    area = torch.rand(count, device=device) * (1 - smallest) + smallest
    spread = math.log(4 / 3)
    aspect = ((torch.rand(count, device=device) * 2 - 1) * spread).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = (
        (torch.rand(count, device=device) * 2 - 1) * (1 - side) for side in (width, height)
    )
    zero = torch.zeros_like(width)
    matrix = torch.stack([width, zero, left, zero, height, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels_BCHW.shape), align_corners=False)
    return F.grid_sample(pixels_BCHW, grid, padding_mode="border", align_corners=False)


def _rotated(pixels_BCHW: Tensor, degrees: float) -> Tensor:
    spread = math.radians(degrees)
    angle = (torch.rand(len(pixels_BCHW), device=pixels_BCHW.device) * 2 - 1) * spread
    sine, cosine, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    matrix = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels_BCHW.shape), align_corners=False)
    return F.grid_sample(pixels_BCHW, grid, align_corners=False)
