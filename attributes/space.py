"""The attribute space: which attributes and labels there are, and what they mean.

A YAML file says it once, for training and for requests:

    attributes:
      formality:
        description: How formal the wording is.
        exclusive: true          # a request names one label of it, not a mixture
        default: neutral         # for requests that name none
        slots: 8                 # of each label's prefix, when trained
        labels:
          formal: {description: Formal and courteous., opposite: casual}
          casual: {description: Casual and chatty., opposite: formal}
          neutral: {}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from controlprefix.attributes.labels import attribute_name, require_known, weighted_labels
from controlprefix.errors import AttributeSpaceError, RequestError, known_names

Chosen = Mapping[str, str | Mapping[str, float]]


def _wrong(message: str, *place: str | int) -> PydanticCustomError:
    """An error, and where it stands under what is checked."""
    return PydanticCustomError("attribute_space", "{said}", {"said": message, "place": place})


def _no_name(label: object) -> str:
    if isinstance(label, dict):
        return f"{label} is no name; in a list are names alone, or write labels as `name: {{…}}`"
    return f"{label!r} is no text, as a name must be; put it in quotes"


class Label(BaseModel):
    """One label.

    Attributes:
        description: What a text of this label is like.
        opposite: Another label of the same attribute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    opposite: str | None = None


class Attribute(BaseModel):
    """One attribute.

    Attributes:
        description: What it is about.
        labels: By name, at least one.
        default: The label of requests that name none.
        exclusive: A request names one label of it, not a mixture.
        slots: Of each label's prefix, when it is trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    labels: dict[str, Label] = Field(min_length=1)
    default: str | None = None
    exclusive: bool = False
    slots: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _plain_labels(cls, data: Any) -> Any:
        """`labels: [formal, casual]` and `formal:` with nothing behind it will do."""
        labels = data.get("labels") if isinstance(data, dict) else None
        if isinstance(labels, (list, dict)):
            for i, label in enumerate(labels):
                if not isinstance(label, str):
                    place = i if isinstance(labels, list) else str(label)
                    raise _wrong(_no_name(label), "labels", place)
        if isinstance(labels, list):
            for i, label in enumerate(labels):
                if label in labels[:i]:
                    raise _wrong(f"{label!r} stands there twice", "labels", i)
            labels = {label: {} for label in labels}
        if isinstance(labels, dict):
            labels = {name: {} if about is None else about for name, about in labels.items()}
            data = {**data, "labels": labels}
        return data

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for label in self.labels:
            if not label.strip():
                raise _wrong(f"{label!r} cannot be the name of a label", "labels", label)
        if self.default is not None and self.default not in self.labels:
            known = known_names(self.default, self.labels)
            raise _wrong(f"default is {self.default!r}; the labels are: {known}", "default")
        for name, about in self.labels.items():
            others = self.labels.keys() - {name}
            if about.opposite is not None and about.opposite not in others:
                raise _wrong(
                    f"the opposite of {name!r} is {about.opposite!r}; the other labels are: "
                    f"{known_names(about.opposite, others)}",
                    *("labels", name, "opposite"),
                )
        return self


class AttributeSpace(BaseModel):
    """All attributes that requests and examples may name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attributes: dict[str, Attribute]

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        for name in self.attributes:
            if "=" in name or name in {"", "task", "user"}:
                raise _wrong(f"{name!r} cannot be the name of an attribute", "attributes", name)
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file.

        Raises:
            AttributeSpaceError: Naming each line that is wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise AttributeSpaceError(f"cannot read {path}: {error}") from error
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "attributes") -> Self:
        """Read YAML.

        Args:
            text: As in a file.
            name: What to call it in errors.

        Raises:
            AttributeSpaceError: Naming each line that is wrong.
        """
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            lines = {} if root is None else dict(_lines(root, ()))
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = name if mark is None else f"{name} line {mark.line + 1}"
            problem = getattr(error, "problem", None) or error
            raise AttributeSpaceError(f"{where}: {problem}") from error
        try:
            return cls.model_validate({} if data is None else data)
        except ValidationError as error:
            found = []
            for one in error.errors(include_url=False):
                place = (*one["loc"], *one.get("ctx", {}).get("place", ()))
                message = one["msg"]
                if place[-1:] == ("[key]",):
                    place = tuple(map(str, place[:-1]))
                    message = "a name must be a text; put it in quotes"
                line = next(
                    (lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1
                )
                if one["type"] == "extra_forbidden":
                    known = {
                        2: cls.model_fields,
                        3: Attribute.model_fields,
                    }.get(len(place) + 1, Label.model_fields)
                    message = f"there is no {place[-1]!r} here; known: " + known_names(
                        str(place[-1]), known
                    )
                at = ".".join(map(str, place))
                found.append(f"{name} line {line}: {at + ': ' if at else ''}{message}")
            raise AttributeSpaceError("\n".join(found)) from None

    def names(self) -> set[str]:
        """Of all labels, such as `formality=formal`."""
        return {
            attribute_name(name, label)
            for name, one in self.attributes.items()
            for label in one.labels
        }

    def without_defaults(self) -> Self:
        """The same, in which what a request leaves open stays open."""
        bare = {n: one.model_copy(update={"default": None}) for n, one in self.attributes.items()}
        return self.model_copy(update={"attributes": bare})

    def complete(
        self, chosen: Chosen, *, strict: bool = True
    ) -> dict[str, str | Mapping[str, float]]:
        """What a request chose, with the defaults of what it left open.

        Args:
            chosen: Labels of attributes.
            strict: Only those in the space.

        Raises:
            UnknownNameError: If it names what is not in the space.
            RequestError: If it mixes labels of an exclusive attribute.
        """
        if strict:
            require_known(weighted_labels(chosen), self.names())
        for name, labels in chosen.items():
            if name not in self.attributes:
                continue
            mixed = [] if isinstance(labels, str) else [one for one, w in labels.items() if w]
            if self.attributes[name].exclusive and len(mixed) > 1:
                raise RequestError(
                    f"attribute {name!r} is exclusive, and {', '.join(sorted(mixed))} were asked "
                    "for together; choose one"
                )
        defaults = {
            name: one.default
            for name, one in self.attributes.items()
            if one.default is not None and name not in chosen
        }
        return {**chosen, **defaults}


def _lines(node: yaml.Node, path: tuple[str | int, ...]) -> Iterator[tuple[Any, int]]:
    """Where in the file each value stands, by its path; counted from 1.

    Raises:
        ValueError: If a name stands twice in one place, which YAML would pass over.
    """
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: a name must be a plain text")
            if key.value in seen:
                raise ValueError(
                    f"line {line}: {key.value!r} stands in line {seen[key.value]} already"
                )
            seen[key.value] = line
            yield from (
                (p, at) for p, at in _lines(value, (*path, key.value)) if p != (*path, key.value)
            )
            yield (*path, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*path, i))
