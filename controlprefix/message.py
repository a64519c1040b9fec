"""Message, and the images that requests and messages may have."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from controlprefix.errors import RequestError, validation_message
from controlprefix.image_files import png_of

MAX_IMAGES = 64  # of a request
_MAX_IMAGE_BYTES = 32 << 20


def read_image(value: Any) -> bytes:
    """The bytes of an image file.

    Args:
        value: Bytes, a path, a data URI, a Pillow image, or a dict with `bytes` or `path`, as
            `datasets` has it.

    Raises:
        ValueError: If it is none of these, cannot be read, or is too large.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        value = image_from_data_uri(value)
    elif isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"images are not downloaded: {value[:80]}; download it, and give its path")
    elif isinstance(value, (str, Path)):
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read the image {str(value)[:200]}: {error.strerror}"
            ) from None
    elif hasattr(value, "save") and hasattr(value, "convert"):  # Pillow's
        value = png_of(value)
    if not isinstance(value, bytes):
        raise ValueError(f"an image is a path, bytes or a Pillow image, not {type(value).__name__}")
    if len(value) > _MAX_IMAGE_BYTES:
        raise ValueError(f"an image has {len(value):,} bytes; at most {_MAX_IMAGE_BYTES:,}")
    return value


def image_from_data_uri(uri: str) -> bytes:
    """The bytes of an image in a data URI.

    Raises:
        ValueError: If it is not one, or its content is not base64.
    """
    head, comma, content = uri.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise ValueError(f"expected data:image/…;base64,…, got {uri[:40]!r}")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the image is not base64: {error}") from None


def _data_uri(image: bytes) -> str:
    return f"data:image/*;base64,{base64.b64encode(image).decode()}"


# As JSON it is a data URI, which `read_image` reads.
Image = Annotated[bytes, BeforeValidator(read_image), PlainSerializer(_data_uri, when_used="json")]
Images = Annotated[tuple[Image, ...], Field(max_length=MAX_IMAGES)]


class Message(BaseModel):
    """One message of a conversation.

    Raises:
        RequestError: If its role is unknown, a field is missing, or an image cannot be read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    role: Literal["system", "user", "assistant"]
    """Who says it."""

    content: str
    """Its text."""

    images: Images = ()
    """Images that its text is about, which come before the text."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            message = validation_message(error, type(self).model_fields, "a message")
            raise RequestError(message) from None
