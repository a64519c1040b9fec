"""What a prefix is distilled into, and what its teacher reads."""

from typing import Any

from controlprefix.errors import TrainingDataError
from controlprefix.labels import label_text
from controlprefix.prefixes import PrefixKey


def distillation_target(
    *, task: str | None, attribute: str | None, label: str | float | None, user: str | None
) -> tuple[PrefixKey, dict[str, Any]]:
    """The one prefix to distill into, and the request fields that name it.

    Raises:
        TrainingDataError: If not exactly one is named.
    """
    if (attribute is None) != (label is None):
        raise TrainingDataError("give an attribute and its label, or neither")
    targets: list[tuple[PrefixKey, dict[str, Any]]] = []
    if task is not None:
        targets.append((PrefixKey("task", task), {"task": task}))
    if attribute is not None and label is not None:
        name = label_text(label)
        targets.append((PrefixKey.for_label(attribute, name), {"attributes": {attribute: name}}))
    if user is not None:
        targets.append((PrefixKey("user", user), {"user": user}))
    if len(targets) != 1:
        raise TrainingDataError("name one to learn: a task, an attribute and its label, or a user")
    return targets[0]


def with_instruction(instruction: str, prompt: str) -> str:
    """A prompt as the teacher reads it."""
    return f"{instruction}\n\n{prompt}" if prompt else instruction
