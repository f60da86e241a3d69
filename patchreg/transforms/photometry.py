"""Colour, blur and solarisation of views: drawn once, applied by Pillow or, for a batch, on the device.

Letters: B images, V views.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.utils.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

FIELDS = (
    *("jitter", "order0", "order1", "order2", "order3"),
    *("brightness", "contrast", "saturation", "hue", "gray", "radius", "solarize"),
)
"""Columns of the drawn settings: flags are 0 or 1, `order` holds the four jitter steps (0 brightness, 1
contrast, 2 saturation, 3 hue), `radius` is -1 for no blur."""


@dataclass
class Photometry:
    """How strongly and how often the colours of a view change.

    Args:
        jitter: Probability of the colour jitter.
        brightness: Factors are drawn from U(1 - b, 1 + b).
        contrast: The same for contrast.
        saturation: The same for saturation.
        hue: Shift of the hue circle, drawn from U(-h, h), h in [0, 0.5].
        gray: Probability of three equal channels.
        blur: Probability of a Gaussian blur.
        radius: Its standard deviation in px is drawn from U(radius).
        solarize: Probability of inverting what is 128 or brighter.

    Raises:
        ConfigError: A value is out of its range.
    """

    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.0
    radius: tuple[float, float] = field(default=(0.1, 2.0))
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a probability in [0, 1]")
        for name, most in (
            ("brightness", 1.0),
            ("contrast", 1.0),
            ("saturation", 1.0),
            ("hue", 0.5),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 to {most}")
        if not 0 < self.radius[0] <= self.radius[1]:
            raise ConfigError(f"radius={self.radius}: expected 0 < least <= most, in px")

    def draw(self) -> list[float]:
        """Draw the settings of one view from the global generators of torch and of `random`.

        Kind and order of the draws are those of torchvision's transforms and of the official DINO.

        Returns:
            One value per entry of `FIELDS`.
        """
        settings = [0.0, 0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 0.0]
        if not self.jitter < torch.rand(1).item():
            order = [float(step) for step in torch.randperm(4)]
            factors = [
                _uniform(1 - amount, 1 + amount)
                for amount in (self.brightness, self.contrast, self.saturation)
            ]
            settings = [1.0, *order, *factors, _uniform(-self.hue, self.hue)]
        settings.append(float(torch.rand(1).item() < self.gray))
        blurred = random.random() <= self.blur
        settings.append(random.uniform(*self.radius) if blurred else -1.0)
        settings.append(float(self.solarize > 0 and random.random() < self.solarize))
        return settings


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))


def apply_to_image(image: Image.Image, settings: list[float]) -> Image.Image:
    """Change one image with Pillow, bit for bit as torchvision and the official DINO do.

    Args:
        image: 8-bit RGB image.
        settings: One value per entry of `FIELDS`.
    """
    from PIL import Image, ImageEnhance, ImageFilter, ImageOps

    values = dict(zip(FIELDS, settings, strict=True))
    if values["jitter"]:
        for place in range(4):
            step = int(values[f"order{place}"])
            if step == 0:
                image = ImageEnhance.Brightness(image).enhance(values["brightness"])
            elif step == 1:
                image = ImageEnhance.Contrast(image).enhance(values["contrast"])
            elif step == 2:
                image = ImageEnhance.Color(image).enhance(values["saturation"])
            else:
                hue, saturation, value = image.convert("HSV").split()
                # The shift wraps around, as the hue does.
                shifted = np.asarray(hue).astype(np.int32) + int(255 * values["hue"])
                hue = Image.fromarray(shifted.astype(np.uint8))
                image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if values["gray"]:
        image = Image.merge("RGB", (image.convert("L"),) * 3)
    if values["radius"] >= 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=values["radius"]))
    if values["solarize"]:
        image = ImageOps.solarize(image)
    return image


def apply_to_batch(images: Tensor, settings: Tensor) -> Tensor:
    """Change a batch on its device, image by image with its own settings.

    Steps that no image of the batch takes cost nothing. Against Pillow, hues do not have 256 levels and
    the blur is a true Gaussian; the mean difference stays below 1.5 levels.

    Args:
        images: Images in [0, 255], of any type.
        settings: One value per entry of `FIELDS` for each image, on the host.

    Shape:
        images [B, 3, H, W]; settings [B, 12]; returns float32 [B, 3, H, W] in [0, 255].
    """
    images = images.to(torch.float32, copy=True)
    column = {name: settings[:, number] for number, name in enumerate(FIELDS)}
    steps: list[Any] = [_brightness, _contrast, _saturation, _hue]
    names = ("brightness", "contrast", "saturation", "hue")
    for place in range(4):
        for step, (name, function) in enumerate(zip(names, steps, strict=True)):
            chosen = (column["jitter"] > 0) & (column[f"order{place}"] == step)
            _change(images, chosen, column[name], function)
    _change(images, column["gray"] > 0, column["gray"], lambda part, _: _luma(part).expand_as(part))
    reach = max(math.ceil(3 * float(column["radius"].max())), 1)
    _change(images, column["radius"] >= 0, column["radius"], partial(_blur, reach=reach))
    _change(
        images,
        column["solarize"] > 0,
        column["solarize"],
        lambda part, _: torch.where(part >= 128, 255 - part, part),
    )
    return images


def _change(images: Tensor, chosen: Tensor, values: Tensor, function: Any) -> None:
    rows = chosen.nonzero().flatten()
    if not len(rows):
        return
    amounts = values[rows].float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    if len(rows) == len(images):
        images.copy_(function(images, amounts))
        return
    rows = rows.to(images.device, non_blocking=True)
    images[rows] = function(images[rows], amounts)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round_().unsqueeze(1)


def _blend(base: Tensor | float, images: Tensor, factor: Tensor) -> Tensor:
    # Pillow cuts the fraction off; kept, it would add up over the steps.
    return (base + factor * (images - base)).clamp_(0, 255).floor_()


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(0.0, images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(images).mean((2, 3), keepdim=True).round_(), images, factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(images), images, factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    most, least = images.amax(1), images.amin(1)
    spread = most - least
    safe = spread.clamp(min=1e-6)
    hue = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue + 6 * (255 * shift.squeeze(1)).trunc() / 255) % 6
    # f(n) = most - spread * clamp(min(k, 4 - k), 0, 1), k = (n + hue) mod 6, n = 5, 3, 1
    channels = []
    for number in (5.0, 3.0, 1.0):
        k = (number + hue) % 6
        channels.append(most - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _blur(images: Tensor, radius: Tensor, reach: int) -> Tensor:
    count, channels, height, width = images.shape
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / radius.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(images, (reach,) * 4, mode="replicate").reshape(
        1, count * channels, height + 2 * reach, width + 2 * reach
    )
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    return flat.view(count, channels, height, width)
