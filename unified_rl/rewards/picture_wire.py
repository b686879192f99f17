"""Pictures inside JSON: base64 of a PNG, JPEG or WEBP file, with or without a data-URI's head. Addresses are refused:
a server that fetched what a request names could be sent to any host or file."""

import base64
import binascii
import io
import re
import warnings

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,")


def encode_picture(picture: Image.Image) -> str:
    """Base64 of the picture as PNG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_picture(text: object, max_pixels: int) -> Image.Image:
    """The picture, as RGB. Its size is looked at before it is decoded: a few kB can hold gigabytes.

    Raises:
        ValueError: if it is no such text, is damaged, or has more than `max_pixels`.
    """
    if not isinstance(text, str):
        raise ValueError(f"a picture is base64 text, not {type(text).__name__}")
    head = _DATA_URI.match(text)
    if head is None and ":" in text[:64]:
        raise ValueError("addresses of pictures are not fetched; send their bytes as base64")
    try:
        encoded = base64.b64decode(text[head.end() :] if head else text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a picture is no base64: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"a picture of {picture.width} x {picture.height} has more than {max_pixels} pixels")
            return picture.convert("RGB")
    except ValueError:
        raise
    except Exception as error:  # decoders fail on damaged data with nearly every type there is
        raise ValueError(f"a picture cannot be read: {type(error).__name__}") from error
