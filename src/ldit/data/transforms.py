"""The ADM centre crop (Dhariwal & Nichol 2021)."""

from math import inf

from PIL import Image

from ldit.data.limits import pixels_at_most


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Halve by BOX while the short side is at least 2·size, BICUBIC to short side = size, crop the centre."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    with pixels_at_most(inf):  # a crop of what is in memory is no bomb, whatever Pillow's global says
        return picture.crop((left, top, left + size, top + size))
