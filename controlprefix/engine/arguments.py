"""Checks of plain arguments: numbers, texts and choices of the wrong type are clear errors."""

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from controlprefix.errors import RequestError
from controlprefix.prefixes import Kind

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])
_NAMES = {int: "an int", float: "a number", str: "a text (str)", bool: "a bool", Path: "a path"}
_LISTS = {int: "a list of ints", float: "a list of numbers", str: "a list of texts"}
_ITEMS = {Sequence[int]: int, Sequence[float]: float, Sequence[str]: str}  # of sequences


def checks_method_arguments(cls: Class) -> Class:
    """Let the public methods of a class check their plain arguments.

    Plain are those whose annotation has nothing but `int`, `float`, `str`, `bool`, `Path`, None,
    literals, and sequences of numbers or of texts; others are left to the methods.
    """
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, checks_arguments(method))
    return cls


def checks_arguments(method: Function) -> Function:
    """Let a function check its plain arguments, as `checks_method_arguments` does methods."""
    signature = inspect.signature(method)
    choices = _plain_choices(signature)

    @functools.wraps(method)
    def checking(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:  # the call says so itself
            return method(*args, **options)
        for name, allowed in choices.items():
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            value = _plain(_listed(value) if any(c in _ITEMS for c in allowed) else value)
            if not any(_is_a(value, choice) for choice in allowed):
                expected = " or ".join(map(_described, allowed))
                raise RequestError(
                    f"{name} is {_text_of(value)}; {method.__name__} takes {expected}"
                )
            bound.arguments[name] = value
        return method(*bound.args, **bound.kwargs)

    return cast(Function, checking)


def _plain_choices(signature: inspect.Signature) -> Mapping[str, list[Any]]:
    """The types and values that each plain parameter may have."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    result = {}
    for name, parameter in signature.parameters.items():
        # Quoted annotations name classes that are not imported: nothing plain.
        if parameter.kind not in variadic and (allowed := _choices(parameter.annotation)):
            result[name] = allowed
    return result


def _choices(annotation: Any) -> list[Any] | None:
    """The types and values of an annotation; None if it has any that is not plain."""
    if annotation == Kind:  # an unknown kind has its own error
        return None
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = [_choices(member) for member in typing.get_args(annotation)]
        return None if None in members else [item for own in members for item in own or ()]
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [annotation] if annotation in (*_NAMES, *_ITEMS, type(None)) else None


def _listed(value: Any) -> Any:
    """An array of numpy, torch or pandas, or a set, as a list; anything else as it is."""
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return list(value) if isinstance(value, Set) else value  # such as the keys of a dict


def _plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    if isinstance(value, (int, float, str)) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # several numbers
        return value


def _is_a(value: Any, choice: Any) -> bool:
    if choice in _ITEMS:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        return all(_is_a(_plain(item), _ITEMS[choice]) for item in value)
    if choice is Path:
        return isinstance(value, os.PathLike)
    if choice in (int, float):
        types_of_choice = int if choice is int else (int, float)
        return isinstance(value, types_of_choice) and not isinstance(value, bool)
    if isinstance(choice, type):
        return isinstance(value, choice)
    return isinstance(value, type(choice)) and bool(value == choice)


def _described(choice: Any) -> str:
    if choice is type(None):
        return "None"
    if choice in _ITEMS:
        return _LISTS[_ITEMS[choice]]
    return _NAMES[choice] if isinstance(choice, type) else repr(choice)


def _text_of(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"of type {type(value).__name__}"
