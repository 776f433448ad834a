"""Pictures to arrays: the ADM centre crop (Dhariwal & Nichol 2021)."""

import numpy as np
from PIL import Image


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return picture.convert("RGB")


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Halve by BOX while the short side is at least 2·size, BICUBIC to short side = size, crop the centre."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_array(picture: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    return np.asarray(center_crop(to_rgb(picture), size))
