"""Messages and images of rows, as files and other libraries have them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_IMAGE_FIELDS = ("images", "image_url", "url")


def resolve_image_paths(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row whose relative image paths name files of a folder, where there is such a file."""

    def placed(value: Any) -> Any:
        if isinstance(value, str) and not value.startswith(("data:", "http:", "https:")):
            beside = str(folder / value)
            # Unlike those of Path, these take a text that no path can be, such as bare base64.
            return beside if os.path.isfile(beside) and not os.path.isfile(value) else value
        if isinstance(value, list):
            return [placed(item) for item in value]
        if isinstance(value, dict):
            return {
                k: placed(v)
                if k in _IMAGE_FIELDS or (k == "content" and isinstance(v, list))
                else v
                for k, v in value.items()
            }
        return value

    changed = {
        name: placed(fields[name])
        for name in {"images", "messages", "prompt"} & fields.keys()
        if name == "images" or isinstance(fields[name], list)
    }
    return {**fields, **changed}


def is_conversation(value: Any) -> bool:
    """Whether a prompt is a list of messages, as TRL has them."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) and item.keys() >= {"role", "content"} for item in value)
    )


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """A conversation's messages as an `Example` takes them.

    Raises:
        ValueError: If it uses tools, or its last message is not to be learned.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError("messages must be a list of messages with role and content")
    plain = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES or message.get("tool_calls") or message.get("function_call"):
            raise ValueError(
                f"a message has the role {role!r}; roles that can be learned from are: "
                f"{', '.join(_ROLES)}, without tool calls"
            )
        plain.append({"role": _ROLES[role], **_content(message)})
    if messages and messages[-1].get("weight") == 0:
        raise ValueError("the last message has weight 0, so there is nothing to learn")
    return plain


def _content(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message's text and images, which may be given in parts as OpenAI's API has them."""
    content, images = message.get("content"), message.get("images")
    own: dict[str, Any] = {} if images is None else {"images": listed(images)}
    if not isinstance(content, (list, tuple)):
        return {"content": content, **own}
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            place = part.get("image_url")
            url = place.get("url") if isinstance(place, Mapping) else place
            own.setdefault("images", []).append(url)
        else:
            raise ValueError("a message has parts that are neither texts nor images")
    return {"content": "".join(texts), **own}


def listed(images: Any) -> list[Any]:
    """Images as a list; one may stand alone."""
    return list(images) if isinstance(images, (list, tuple)) else [images]
