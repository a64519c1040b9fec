"""Command-line options generated from the fields of `Request` and `TrainingSettings`.

So the fields are defined once, with their help, for Python, HTTP and the command line.
"""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from controlprefix.cli.groups import option, with_options
from controlprefix.errors import RequestError

# Fields of a request that are one option per entry: the option, its short form, its help.
_REPEATABLE = {
    "attributes": (
        "--attribute",
        "-a",
        "Label of an attribute, such as formality=formal; tone=warm:0.6 in a mixture. A label that "
        "ends in a colon and a number needs its weight too: time=12:30:1.",
    ),
    "strengths": (
        "--strength",
        "-w",
        "Strength of a part, such as task=0.5, user=1.5 or tone=2. 0 is absent, 1 as trained, "
        "below 0 steers away from it.",
    ),
    "schedules": (
        "--schedule",
        None,
        "Strength schedule of a part: tone=0:1,40:0 fades the tone out over 40 tokens.",
    ),
    "images": ("--image", None, "Path of an image that the prompt is about."),
    "stop": ("--stop", None, "Text that ends the completion; it is cut off."),
}


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of `Request`, except the prompt.

    The command gets them as the argument `request_fields`, as `Request` takes them.
    """
    from controlprefix.request import Request

    fields = {
        name: field
        for name, field in Request.model_fields.items()
        if name not in {"prompt", "prompt_ids", "messages", "continue_final_message"}
    }
    return _with_fields(command, "request_fields", fields, _parse_request_fields)


def training_options(
    *names: str, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of `TrainingSettings`.

    The command gets those that were given as the argument `training_fields`.

    Args:
        *names: Fields; left out, all but `validation`.
        **defaults: Defaults that differ from those of `TrainingSettings`, for the help.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        from controlprefix.training.settings import TrainingSettings

        all_fields: Mapping[str, FieldInfo] = vars(TrainingSettings)["__pydantic_fields__"]
        # `validation` may be a file in some commands, which have an option of their own then.
        options = names or [name for name in all_fields if name != "validation"]
        fields = {name: all_fields[name] for name in options}

        def parse(values: dict[str, Any]) -> dict[str, Any]:
            options = _without_none(values)
            TrainingSettings.from_options(options)  # fail before a model is loaded
            return options

        return _with_fields(command, "training_fields", fields, parse, defaults)

    return decorate


def objective_options(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of an objective's settings, as the argument `objective_fields`.

    Args:
        name: `PolicySettings` or `PreferenceSettings`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        from controlprefix.training import settings

        settings_class = getattr(settings, name)

        def parse(values: dict[str, Any]) -> dict[str, Any]:
            options = _without_none(values)
            settings_class.split_off(options)  # fail before a model is loaded
            return options

        fields: Mapping[str, FieldInfo] = vars(settings_class)["__pydantic_fields__"]
        return _with_fields(command, "objective_fields", fields, parse)

    return decorate


def is_on_command_line(context: typer.Context, name: str) -> bool:
    """Whether an option is given there, not by default, in a file or in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _with_fields(
    command: Callable[..., None],
    argument: str,
    fields: Mapping[str, FieldInfo],
    parse: Callable[[dict[str, Any]], dict[str, Any]],
    defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """A command with an option per field, which passes them on as one argument."""
    options = [_option(name, field, (defaults or {}).get(name)) for name, field in fields.items()]
    return with_options(command, argument, options, parse)


def _option(name: str, field: FieldInfo, default: Any) -> inspect.Parameter:
    """The option of a field; its help names a default that the command sets later."""
    text = " ".join((field.description or "").replace("`", "").split())
    if name in _REPEATABLE:
        long, short, help_text = _REPEATABLE[name]
        flags = [long, *([short] if short else [])]
        annotation: Any = list[str] | None
        text = f"{help_text} Repeatable."
        value: Any = None
    else:
        flags = [f"--{name.replace('_', '-')}"]
        annotation = _option_type(field.annotation)
        value = field.default
        if get_origin(field.annotation) is dict:
            value, text = None, f"{text} A JSON object."
    if "Left out, " in text and value is not None:  # which is not the same as the default
        text, value, annotation = f"{text} Default: {value}.", None, annotation | None
    if default is not None:
        text = f"{text.partition(' Left out, ')[0].rstrip('.')}. Default: {default}."
        value, annotation = None, annotation | None
    return option(name, Annotated[annotation, typer.Option(*flags, help=text)], value)


def _option_type(annotation: Any) -> Any:
    """A field's type as typer knows it: without constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _option_type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in get_args(annotation) if a is not type(None))
        return _option_type(inner) | None
    if origin is Literal or annotation in (str, int, float, bool):
        return annotation
    if origin is dict:  # a JSON object
        return str | None
    raise TypeError(f"no command-line option for a field of type {annotation}")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _parse_request_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The options' values as `Request` takes them, without those that are left out."""
    fields = {
        **values,
        "attributes": parse_attributes(values["attributes"] or ()),
        "strengths": {
            name: parse_number("--strength", number)
            for name, number in (parse_pair("--strength", t) for t in values["strengths"] or ())
        },
        "schedules": dict(_parse_schedule(text) for text in values["schedules"] or ()),
        "stop": values["stop"] or (),
        "images": values["images"] or (),
        **{
            name: parse_json_object(f"--{name.replace('_', '-')}", values[name])
            for name in ("chat_template_kwargs", "logit_bias")
        },
        "json_schema": values["json_schema"]
        and parse_json_object("--json-schema", values["json_schema"]),
    }
    return _without_none(fields)


def parse_attributes(texts: Iterable[str]) -> dict[str, str | dict[str, float]]:
    """`["formality=formal", "tone=warm:0.6", "tone=brief:0.4"]` as a request has it."""
    attributes: dict[str, str | dict[str, float]] = {}
    for text in texts:
        attribute, label = parse_pair("--attribute", text)
        name, _, weight = label.rpartition(":")
        has_weight = bool(name) and _is_number(weight)  # a label may contain a colon
        earlier = attributes.get(attribute)
        if earlier is None and not has_weight:
            attributes[attribute] = label  # also a number between opposite labels
            continue
        weights = {earlier: 1.0} if isinstance(earlier, str) else earlier or {}
        weights[name if has_weight else label] = float(weight) if has_weight else 1.0
        attributes[attribute] = weights
    return attributes


def parse_pair(option: str, text: str) -> tuple[str, str]:
    """`name=value` in two.

    Raises:
        RequestError: If the text has another form.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise RequestError(f"{option} {text!r} is not of the form name=value")
    return name, value


def parse_number(option: str, text: str) -> float:
    """A number.

    Raises:
        RequestError: If it is not one.
    """
    if not _is_number(text):
        raise RequestError(f"{option} needs a number, got {text!r}")
    return float(text)


def parse_json_object(option: str, text: str | None) -> dict[str, Any]:
    """A JSON object; empty if it is left out.

    Raises:
        RequestError: If it is not one.
    """
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(f'{option} needs a JSON object such as {{"key": 1}}, got {text!r}')
    return value


def parse_validation(text: str) -> float | str:
    """`--validation`: a fraction, or the path of a file of held-out rows.

    Raises:
        RequestError: If it is neither.
    """
    if not _is_number(text):
        if not Path(text).is_file():
            raise RequestError(f"--validation {text!r} is neither a fraction nor a file")
        return text
    if not 0 <= float(text) < 1:
        raise RequestError(f"--validation needs a fraction from 0 to below 1, got {text!r}")
    return float(text)


def parse_list(text: str) -> list[str]:
    """`a, b` as a list."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _parse_schedule(text: str) -> tuple[str, tuple[tuple[int, float], ...]]:
    """`tone=0:1,40:0` as a request has it."""
    part, points = parse_pair("--schedule", text)
    schedule = []
    for point in parse_list(points):
        token, _, multiplier = point.partition(":")
        at = parse_number("--schedule", token)
        if not at.is_integer():
            raise RequestError(f"--schedule needs the number of a token, got {token!r}")
        schedule.append((int(at), parse_number("--schedule", multiplier)))
    return part, tuple(schedule)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
