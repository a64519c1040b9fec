"""ChatMessage: a message of a request, in OpenAI's form."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from controlprefix.errors import RequestError
from controlprefix.message import image_from_data_uri

MAX_ITEMS = 1000  # of any list in a body


class ChatMessage(BaseModel):
    """A message, whose content may be given as text parts."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)]

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (
            data.get("role") in ("tool", "function") or data.get("tool_calls")
        ):
            raise ValueError("tools are not supported by this server; leave their messages out")
        return data

    @field_validator("content", mode="wrap")
    @classmethod
    def _check_content(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("give a text, or a list of parts such as {'type': 'text'}") from None

    def to_plain(self) -> dict[str, Any]:
        """The message as fields of `Message`.

        Raises:
            RequestError: If a part is neither text nor an image.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        texts: list[str] = []
        images: list[bytes] = []
        for part in self.content:
            if part.get("type") in ("text", "input_text", "output_text"):
                if not isinstance(part.get("text"), str):
                    raise RequestError("a part of a message has no text; give {'text': '…'}")
                texts.append(part["text"])
            elif part.get("type") in ("image_url", "input_image"):
                images.append(_image_of_part(part.get("image_url")))
            else:
                raise RequestError(
                    "only texts and images are supported; leave other parts of a message out"
                )
        fields: dict[str, Any] = {"role": role, "content": "".join(texts)}
        return {**fields, "images": images} if images else fields


def image_url(value: Any) -> str:
    """The URL of an image, as a text or in a mapping: chat and the Responses API differ."""
    return str(value.get("url") if isinstance(value, Mapping) else value)


def _image_of_part(value: Any) -> bytes:
    """The image of a part of a message, which a server may have downloaded.

    Raises:
        RequestError: If it is not in the part itself.
    """
    if isinstance(value, bytes):
        return value
    try:
        return image_from_data_uri(image_url(value))
    except ValueError as error:
        raise RequestError(
            f"images must be part of the request, unless a server downloads from their origin: "
            f"{error}"
        ) from None
