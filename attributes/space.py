"""The attribute space: which attributes and labels exist, and what they mean.

A YAML file defines it once, for training and for requests:

    attributes:
      formality:
        description: How formal the wording is.
        exclusive: true          # a request names one label, not a mixture
        default: neutral         # for requests that name none
        num_slots: 8             # of each label's prefix in training
        labels:
          formal: {description: Formal and courteous., opposite: casual}
          casual: {description: Casual and chatty., opposite: formal}
          neutral: {}
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from controlprefix.attributes.labels import require_known
from controlprefix.attributes.ordinal import as_number, is_ordinal
from controlprefix.errors import AttributeSpaceError, RequestError, known_names
from controlprefix.labels import (
    Attributes,
    check_attribute_name,
    weighted_labels,
    with_composed_names,
)
from controlprefix.prefixes import PrefixKey
from controlprefix.prefixes.key import composed


def _error_at(message: str, *path: str | int) -> PydanticCustomError:
    """A validation error at a path below the value that is validated."""
    return PydanticCustomError("attribute_space", "{text}", {"text": message, "path": path})


class Label(BaseModel):
    """One label.

    Attributes:
        description: What a text with this label is like.
        opposite: Another label of the same attribute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    opposite: str | None = None


class Attribute(BaseModel):
    """One attribute.

    Attributes:
        description: What the attribute is about.
        labels: Labels by name, at least one.
        default: Label of requests that name none.
        exclusive: A request may name only one label, not a mixture.
        num_slots: Slots of each label's prefix in training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    labels: dict[str, Label] = Field(min_length=1)
    default: str | None = None
    exclusive: bool = False
    num_slots: int | None = Field(default=None, ge=1)

    @property
    def poles(self) -> tuple[str, str] | None:
        """The labels at 1 and at -1: the first label that has an opposite, and that one."""
        for name, label in self.labels.items():
            if label.opposite is not None:
                return name, label.opposite
        return None

    @model_validator(mode="before")
    @classmethod
    def _expand_short_labels(cls, data: Any) -> Any:
        """Accept `labels: [formal, casual]`, and a label with nothing behind it."""
        data = _composed(data)
        labels = data.get("labels") if isinstance(data, dict) else None
        if not isinstance(labels, (list, dict)):
            return data
        for i, label in enumerate(labels):
            if not isinstance(label, str):
                step = i if isinstance(labels, list) else str(label)
                raise _error_at(_not_a_name(label), "labels", step)
        if isinstance(labels, list):
            for i, label in enumerate(labels):
                if label in labels[:i]:
                    raise _error_at(f"{label!r} is listed twice", "labels", i)
            labels = {label: {} for label in labels}
        labels = {name: {} if value is None else value for name, value in labels.items()}
        return {**data, "labels": labels}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.labels:
            if not name.strip():
                raise _error_at(f"{name!r} cannot be the name of a label", "labels", name)
        if self.default is not None and self.default not in self.labels:
            hint = known_names(self.default, self.labels)
            raise _error_at(f"default is {self.default!r}; the labels are: {hint}", "default")
        for name, label in self.labels.items():
            others = self.labels.keys() - {name}
            if label.opposite is not None and label.opposite not in others:
                raise _error_at(
                    f"the opposite of {name!r} is {label.opposite!r}; the other labels are: "
                    f"{known_names(label.opposite, others)}",
                    *("labels", name, "opposite"),
                )
        return self


class AttributeSpace(BaseModel):
    """All attributes that requests and examples may name.

    Attributes:
        attributes: Attributes by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attributes: Annotated[dict[str, Attribute], BeforeValidator(with_composed_names)]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.attributes:
            try:
                check_attribute_name(name)
            except ValueError as error:
                raise _error_at(str(error), "attributes", name) from None
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read an attribute file (YAML 1.2).

        Raises:
            AttributeSpaceError: With each line that is wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise AttributeSpaceError(f"cannot read {path}: {error}") from error
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "attributes") -> Self:
        """Parse the text of an attribute file.

        Args:
            text: YAML 1.2.
            name: What the file is called in errors.

        Raises:
            AttributeSpaceError: With each line that is wrong.
        """
        try:
            data = YAML().load(composed(text))  # errors look names up in it
        except (YAMLError, ValueError, TypeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = name if mark is None else f"{name} line {mark.line + 1}"
            problem = getattr(error, "problem", None) or error
            raise AttributeSpaceError(f"{where}: {str(problem).splitlines()[0]}") from error
        try:
            return cls.model_validate({} if data is None else data)
        except ValidationError as error:
            lines = [_explain(finding, data, name) for finding in error.errors(include_url=False)]
            raise AttributeSpaceError("\n".join(lines)) from None

    def keys(self) -> set[PrefixKey]:
        """Keys of all labels."""
        return {
            PrefixKey.for_label(name, label)
            for name, attribute in self.attributes.items()
            for label in attribute.labels
        }

    def without_defaults(self) -> Self:
        """The same attributes without default labels."""
        bare = {
            name: attribute.model_copy(update={"default": None})
            for name, attribute in self.attributes.items()
        }
        return self.model_copy(update={"attributes": bare})

    def with_default_labels(
        self, attributes: Attributes, *, strict: bool = True
    ) -> dict[str, str | Mapping[str, float]]:
        """A request's attributes, with the default labels of those it leaves out.

        A number for an attribute with opposite labels is a position between them, from -1 to 1.

        Args:
            attributes: Labels per attribute, as in a request.
            strict: Refuse labels that are not in the space.

        Raises:
            UnknownNameError: If a label is not in the space.
            RequestError: If labels of an exclusive attribute are mixed, or a position is beyond
                the opposites.
        """
        attributes = {name: self._at_position(name, value) for name, value in attributes.items()}
        if strict:
            require_known(weighted_labels(attributes), self.keys())
        for name, labels in attributes.items():
            if name not in self.attributes or isinstance(labels, str):
                continue
            mixed = [label for label, weight in labels.items() if weight]
            if self.attributes[name].exclusive and len(mixed) > 1:
                raise RequestError(
                    f"attribute {name!r} is exclusive, and {', '.join(sorted(mixed))} were asked "
                    "for together; choose one"
                )
        defaults = {
            name: attribute.default
            for name, attribute in self.attributes.items()
            if attribute.default is not None and name not in attributes
        }
        return {**attributes, **defaults}

    def _at_position(
        self, name: str, value: str | Mapping[str, float]
    ) -> str | Mapping[str, float]:
        """An attribute's labels, where a number between opposites is given instead."""
        attribute = self.attributes.get(name)
        position = as_number(value) if isinstance(value, str) else None
        if attribute is None or position is None or value in attribute.labels:
            return value
        poles = attribute.poles
        if poles is None or is_ordinal(attribute.labels):  # its labels are numbers themselves
            return value
        if not -1 <= position <= 1:
            raise RequestError(
                f"{name} is {value}; give a number from -1 ({poles[1]}) to 1 ({poles[0]})"
            )
        return {poles[0]: position} if position >= 0 else {poles[1]: -position}


def _composed(value: Any) -> Any:
    """A value with all texts in it in Unicode's composed form, as keys have them."""
    if isinstance(value, str):
        return composed(value)
    if isinstance(value, dict):
        return {_composed(name): _composed(own) for name, own in value.items()}
    return [_composed(own) for own in value] if isinstance(value, list) else value


def _not_a_name(label: object) -> str:
    if isinstance(label, dict):
        return f"{label} is not a name; a list holds only names, or write labels as `name: {{…}}`"
    return f"{label!r} is not a text, as a name must be; put it in quotes"


def _explain(finding: ErrorDetails, data: Any, name: str) -> str:
    """One validation error with the line it is on."""
    path = (*finding["loc"], *finding.get("ctx", {}).get("path", ()))
    message = finding["msg"]
    line = _line_of(data, path)
    if path[-1:] == ("[key]",):  # pydantic's mark for the name in front of it
        path = path[:-2]
        message = "a name must be a plain text; put it in quotes"
    if finding["type"] == "extra_forbidden":
        models: dict[int, type[BaseModel]] = {1: AttributeSpace, 3: Attribute}
        fields = models.get(len(path), Label).model_fields
        unknown = str(path[-1])
        message = f"there is no {unknown!r} here; known: {known_names(unknown, fields)}"
    where = ".".join(map(str, path))
    return f"{name} line {line}: {where + ': ' if where else ''}{message}"


def _line_of(data: Any, path: tuple[str | int, ...]) -> int:
    """The line, from 1, of the deepest value on a path that the file has."""
    line = 1
    for step in path:
        key: Any = step
        if isinstance(data, CommentedSeq) and isinstance(step, int):
            row, _ = data.lc.item(key)
            line = row + 1
        elif isinstance(data, CommentedMap):
            # pydantic reports a name that is no text as a text.
            key = next((key for key in data if str(key) == str(step)), None)
            if key is None:
                break
            with contextlib.suppress(KeyError, TypeError):  # a merged key has no line of its own
                line = data.lc.key(key)[0] + 1
        else:
            break
        data = data[key]
    return line
