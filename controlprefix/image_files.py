"""Image files: what is opened, within which limits, and as which colours."""

import io
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from controlprefix._io import requires_extra
from controlprefix.errors import MissingDependencyError, RequestError, short_reason

if TYPE_CHECKING:
    from PIL.Image import Image

# In all images of a request; reading 100 million takes some 20 s of a core.
MAX_PIXELS = 100_000_000
# Others are rare, or run programs: Pillow reads EPS with Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "PPM")


def open_images(contents: Sequence[bytes]) -> Iterator["Image"]:
    """The images in files, in RGB, one after another.

    Args:
        contents: The bytes of each file.

    Raises:
        RequestError: If one is no image or damaged, or all together have too many pixels.
        MissingDependencyError: If Pillow is not installed.
    """
    with requires_extra("images", "a request with images"):
        from PIL import Image

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    images = []
    num_pixels = 0
    for number, content in enumerate(contents, 1):  # only their heads are read here
        try:
            with warnings.catch_warnings():  # of a size that is checked here
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(content), formats=formats)
        except Exception as error:
            raise _unreadable(number, error) from None
        num_pixels += image.width * image.height
        if num_pixels > MAX_PIXELS:
            raise RequestError(
                f"the images of a request may have {MAX_PIXELS:,} pixels in all; with image "
                f"{number} they have {num_pixels:,}"
            )
        images.append(image)
    for number, image in enumerate(images, 1):
        try:
            colours = as_rgb(image)
        except Exception as error:  # decoders fail in many ways
            raise _unreadable(number, error) from None
        yield colours


def as_rgb(image: "Image") -> "Image":
    """An image as a viewer shows it: upright, without transparency, in 8 bits per colour."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _in_8_bits(image).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")


def png_of(image: "Image") -> bytes:
    """An image as the bytes of a PNG file.

    Raises:
        ValueError: If it cannot be converted.
    """
    buffer = io.BytesIO()
    try:
        as_rgb(image).save(buffer, format="PNG")
    except Exception as error:
        raise ValueError(f"the image cannot be converted: {short_reason(error)}") from error
    return buffer.getvalue()


def _in_8_bits(image: "Image") -> "Image":
    """A grey image with more than 8 bits, or with fractions."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16"):
        largest = 65535.0
    else:  # nothing says which range it has
        most = values.max(initial=0.0)
        largest = next(limit for limit in (1.0, 255.0, 65535.0, most) if most <= limit)
        largest = 255.0 if image.mode == "I" and largest == 1.0 else largest
    return Image.fromarray((values / largest * 255).clip(0, 255).round().astype(np.uint8))


def _unreadable(number: int, error: Exception) -> Exception:
    if isinstance(error, MissingDependencyError):
        return error
    reason = short_reason(error)
    if type(error).__name__ == "UnidentifiedImageError":
        reason = f"it is in none of the formats {', '.join(_FORMATS)}"
    return RequestError(f"image {number} cannot be read: {reason}")
