"""The command line: `controlprefix --help`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from controlprefix.errors import ControlPrefixError, RequestError

if TYPE_CHECKING:
    from controlprefix.engine import ControlPrefix
    from controlprefix.store import Kind, PrefixStore

app = typer.Typer(
    name="controlprefix",
    help="One frozen language model; every task, tone and user a small learned prefix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
users = typer.Typer(help="See, roll back and forget users.", no_args_is_help=True)
prefixes = typer.Typer(help="See and roll back stored prefixes.", no_args_is_help=True)
stores = typer.Typer(help="Look after the database.", no_args_is_help=True)
spaces = typer.Typer(help="The file that says which attributes there are.", no_args_is_help=True)
app.add_typer(users, name="users")
app.add_typer(spaces, name="attributes")
app.add_typer(prefixes, name="prefixes")
app.add_typer(stores, name="store")
# Into a file or a log, tables may be wider than the 80 columns rich assumes.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)

ModelOption = Annotated[
    str, typer.Option("--model", help="A folder, a hub id, or 'smollm2', the one pip installs.")
]
StoreOption = Annotated[
    str, typer.Option("--store", envvar="CONTROLPREFIX_STORE", help="Where prefixes are kept.")
]
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose prefixes these are.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="The task's prefix.")]
UserOption = Annotated[str | None, typer.Option("--user", help="The user's prefix.")]
SpaceOption = Annotated[
    Path | None,
    typer.Option(
        "--attributes",
        envvar="CONTROLPREFIX_ATTRIBUTES",
        help="A file that says which attributes there are.",
    ),
]
MODEL, STORE, TENANT = "smollm2", "sqlite:///prefixes.db", "default"


DataArgument = Annotated[Path, typer.Argument(help="JSON Lines, an example a line.")]
LearnOption = Annotated[
    str, typer.Option(help="What to learn: any of task, attributes, user, with commas.")
]
DefaultTaskOption = Annotated[str | None, typer.Option(help="For examples that name no task.")]
InitOption = Annotated[str, typer.Option(help="Start from: text, tokens, random, or stored.")]
EpochsOption = Annotated[float, typer.Option(help="Passes over the examples.")]
StepsOption = Annotated[int | None, typer.Option(help="Steps in all, in place of epochs.")]
BatchOption = Annotated[int, typer.Option(help="Examples a step.")]
RateOption = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate, at its highest; left out, the tested one."),
]
ValidationOption = Annotated[float, typer.Option(help="Fraction held out to choose the best step.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the split and the order of examples.")]


@app.command()
def train(
    data: DataArgument,
    learn: LearnOption = "task,attributes",
    task: DefaultTaskOption = None,
    slots: Annotated[int, typer.Option(help="Slots of each learned prefix.")] = 16,
    init: InitOption = "text",
    parameterization: Annotated[
        str | None,
        typer.Option(
            help="How slots are produced: shared, direct, mlp, or shared-kv; left out, shared, "
            "and for users alone direct."
        ),
    ] = None,
    epochs: EpochsOption = 3.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 8,
    micro_batch: Annotated[
        int | None, typer.Option(help="Examples at a time, where memory is short.")
    ] = None,
    learning_rate: RateOption = None,
    contrast: Annotated[
        float, typer.Option(help="Weight of making other labels' text unlikely: 0 to below 1.")
    ] = 0.0,
    validation: ValidationOption = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a better one.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where to write learning curves and the run's state."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the state in --folder, if there is one; without it, in DATA's "
            "name and '.run'.",
        ),
    ] = False,
    tracker: Annotated[
        str | None, typer.Option(help="Log to one of accelerate's trackers, such as tensorboard.")
    ] = None,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    attributes: SpaceOption = None,
) -> None:
    """Learn prefixes from examples and store them as new versions.

    Each line of the file is such as {"task": "email", "attributes": {"formality":
    "formal"}, "prompt": "Tell Sam I will be late.", "completion": "Dear Sam, …"}.
    `accelerate launch -m controlprefix.cli train …` shares the work between processes.
    """
    from controlprefix.data import read_examples

    if resume and folder is None:
        folder = Path(f"{data.stem}.run")
    examples = read_examples(data, **({"task": task} if task else {}))
    cp = _open(model, store, tenant, attributes)
    usual: dict[str, Any] = {"parameterization": parameterization} if parameterization else {}
    report = cp.train(
        examples,
        learn=cast(Any, _listed(learn)),
        num_slots=slots,
        init=_one_of("--init", init, ("text", "tokens", "random", "stored")),
        folder=folder,
        resume=resume,
        accelerator=_accelerator(tracker, folder) if tracker else None,
        **usual,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        contrast=contrast,
        validation=validation,
        patience=patience,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    if not _is_main_process():
        return
    for name, version in report.saved.items():
        out.print(f"stored {name} version {version}")
    out.print(
        f"{len(report.losses)} steps, {report.num_tokens} tokens, {report.seconds:.0f} s; "
        f"best loss {report.best_loss:.3f} nats a token at step {report.best_step}"
    )


@app.command()
def sweep(
    data: DataArgument,
    slots: Annotated[
        str, typer.Option(help="Numbers of slots to try, with commas.")
    ] = "1,2,4,8,16,32",
    parameterization: Annotated[
        str, typer.Option(help="Any of shared, direct, mlp, shared-kv, with commas.")
    ] = "shared",
    learn: LearnOption = "task,attributes",
    task: DefaultTaskOption = None,
    init: InitOption = "text",
    epochs: EpochsOption = 3.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 8,
    learning_rate: RateOption = None,
    validation: ValidationOption = 0.1,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write sweep.json and sweep.png.")
    ] = None,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Learn with different numbers of slots, and compare the held-out losses; stores nothing."""
    from controlprefix.data import read_examples

    examples = read_examples(data, **({"task": task} if task else {}))
    report = _open(model, store, tenant).sweep(
        examples,
        slots=[int(_number("--slots", one)) for one in _listed(slots)],
        parameterizations=cast(Any, _listed(parameterization)),
        learn=cast(Any, _listed(learn)),
        init=_one_of("--init", init, ("text", "tokens", "random", "stored")),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation=validation,
        seed=seed,
    )
    table = Table("parameterization", "slots", "held-out nats a token", "seconds")
    for point in report.points:
        table.add_row(
            point.parameterization,
            str(point.num_slots),
            f"{point.loss:.4f}",
            f"{point.seconds:.0f}",
        )
    out.print(table)
    best = report.best
    out.print(f"fewest slots within 0.01 of the lowest: {best.num_slots}, {best.parameterization}")
    if folder is not None:
        report.save(folder)
        out.print(f"written to {folder}")


@app.command()
def shorten(
    kind: Annotated[str, typer.Argument(help="task, attribute or user.")],
    name: Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")],
    data: Annotated[Path, typer.Argument(help="JSON Lines: examples of it, not trained on.")],
    keep: Annotated[float, typer.Option(help="Share of the prefix's gain that must stay.")] = 0.95,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Drop the slots that attention uses least, and store the shorter prefix."""
    from controlprefix.data import read_examples

    examples = read_examples(data)
    report = _open(model, store, tenant).shorten(_kind(kind), name, examples, keep=keep)
    table = Table("slots", "nats a token")
    for count, loss in report.curve:
        table.add_row(str(count), f"{loss:.4f}")
    out.print(table)
    out.print(f"stored {kind} {name!r} version {report.version}: {report.num_slots} slots")


@app.command()
def distill(
    instruction: Annotated[str, typer.Argument(help="What the prefix should do.")],
    prompts: Annotated[list[Path], typer.Argument(help="Text files, a prompt a line.")],
    task: Annotated[str | None, typer.Option("--task", help="Learn this task.")] = None,
    attribute: Annotated[
        str | None, typer.Option("--attribute", "-a", help="Learn this label: formality=formal.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="Learn this user.")] = None,
    slots: Annotated[int, typer.Option(help="Slots of the prefix.")] = 16,
    epochs: EpochsOption = 3.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 8,
    learning_rate: RateOption = None,
    validation: ValidationOption = 0.1,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Learn a prefix that does what an instruction does; needs prompts, no labelled data."""
    from controlprefix.data import read_texts

    named, label = _pair("--attribute", attribute) if attribute else (None, None)
    report = _open(model, store, tenant).distill(
        instruction,
        read_texts(prompts),
        task=task,
        attribute=named,
        label=label,
        user=user,
        num_slots=slots,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation=validation,
        seed=seed,
    )
    for name, version in report.saved.items():
        out.print(f"stored {name} version {version}")
    out.print(
        f"{len(report.losses)} steps, {report.seconds:.0f} s; divergence from the instructed "
        f"model {report.best_loss:.3f} nats a token at step {report.best_step}"
    )


@app.command()
def enroll(
    user: Annotated[str, typer.Argument(help="Who.")],
    texts: Annotated[list[Path], typer.Argument(help="Text files, a text a line.")],
    slots: Annotated[int, typer.Option(help="Slots at most; one token of text fills one.")] = 64,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make a usable prefix for a user at once, from texts they wrote, without training."""
    from controlprefix.data import read_texts

    written = read_texts(texts)
    version = _open(model, store, tenant).enroll(user, written, num_slots=slots)
    out.print(f"stored user {user!r} version {version}, from {len(written)} texts")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to write or answer.")],
    task: TaskOption = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="formality=formal, or tone=warm:0.6; repeatable."),
    ] = None,
    user: UserOption = None,
    strength: Annotated[
        list[str] | None,
        typer.Option("--strength", "-w", help="task=0.5, user=1.5 or tone=2; repeatable."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt, no template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Sample; left out, greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    attributes: SpaceOption = None,
) -> None:
    """Generate text, printed as it comes."""
    from controlprefix.request import Request

    request = Request(
        prompt=prompt,
        raw=raw,
        task=task,
        attributes=_attributes(attribute or []),
        user=user,
        strengths={
            name: _number("--strength", value)
            for name, value in (_pair("--strength", one) for one in strength or [])
        },
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    for piece in _open(model, store, tenant, attributes).stream(request):
        out.print(piece, end="", markup=False, soft_wrap=True)
    out.print()


@app.command()
def score(
    data: Annotated[Path, typer.Argument(help="JSON Lines, an example a line.")],
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    attributes: SpaceOption = None,
) -> None:
    """How likely the steered model finds the completions of a file."""
    from controlprefix.data import read_examples

    examples = read_examples(data)
    scores = _open(model, store, tenant, attributes).score(examples)
    tokens = sum(one.num_tokens for one in scores)
    nats = -sum(one.log_likelihood for one in scores)
    out.print(f"{len(scores)} examples, {tokens} tokens: {nats / tokens:.4f} nats a token")


@app.command()
def demo(
    data: Annotated[Path, typer.Option(help="Folder of the example data.")] = Path("examples/data"),
    store: StoreOption = STORE,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Train, store, reopen and mix prefixes on a real model, and show what they do."""
    from controlprefix.demo import run

    _quiet()
    run(data, store, out, json_file)


@users.command("list")
def list_users(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Users that have a prefix."""
    with _store(store, tenant) as opened:
        _print_prefixes(opened, "user")


@users.command("show")
def show_user(name: str, store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """The versions of a user's prefix."""
    with _store(store, tenant) as opened:
        _print_versions(opened, "user", name)


@users.command("forget")
def forget_user(name: str, store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Remove every version of a user's prefix, for every model."""
    from controlprefix.store import PrefixKey

    with _store(store, tenant) as opened:
        removed = opened.forget(PrefixKey("user", name))
    out.print(f"forgot user {name!r}: {removed} versions removed")


@users.command("rollback")
def rollback_user(
    name: str,
    to: Annotated[int, typer.Option(help="The version to make current.")],
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make another version of a user's prefix current."""
    _open(model, store, tenant).rollback("user", name, to=to)
    out.print(f"user {name!r} is at version {to}")


@prefixes.command("list")
def list_prefixes(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Everything that has a prefix: tasks, labels of attributes, users."""
    with _store(store, tenant) as opened:
        _print_prefixes(opened, None)


@prefixes.command("show")
def show_prefix(
    kind: Annotated[str, typer.Argument(help="task, attribute or user.")],
    name: Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """The versions of one prefix."""
    with _store(store, tenant) as opened:
        _print_versions(opened, _kind(kind), name)


@prefixes.command("rollback")
def rollback_prefix(
    kind: Annotated[str, typer.Argument(help="task, attribute or user.")],
    name: Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")],
    to: Annotated[int, typer.Option(help="The version to make current.")],
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make another version current."""
    _open(model, store, tenant).rollback(_kind(kind), name, to=to)
    out.print(f"{kind} {name!r} is at version {to}")


@stores.command("stats")
def store_stats(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """How much a tenant has stored."""
    with _store(store, tenant) as opened:
        stats = opened.stats()
    for kind, count in sorted(stats.num_prefixes.items()):
        out.print(f"{count} {kind} prefixes")
    out.print(f"{stats.num_versions} versions, {stats.size_bytes:,} bytes")


@stores.command("verify")
def verify_store(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Read every version of a tenant, and name those that are damaged."""
    damaged = checked = 0
    with _store(store, tenant) as opened:
        for key, version, whole in opened.verify():
            checked += 1
            if not whole:
                damaged += 1
                out.print(f"{key} version {version} is damaged")
    out.print(f"{checked} versions read, {damaged} damaged")
    if damaged:
        raise typer.Exit(1)


@stores.command("prune")
def prune_store(
    keep: Annotated[int, typer.Option(min=1, help="Newest versions to keep of each name.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Remove old versions; the current and the aliased ones stay."""
    with _store(store, tenant) as opened:
        out.print(f"{opened.prune(keep=keep)} versions removed")


@stores.command("export")
def export_store(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Write all that a tenant has to one file."""
    with _store(store, tenant) as opened:
        out.print(f"{opened.export_to(file)} versions written to {file}")


@stores.command("import")
def import_store(
    file: Annotated[Path, typer.Argument(help="An exported file.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Add all that an exported file holds to a tenant, or nothing."""
    with _store(store, tenant) as opened:
        out.print(f"{opened.import_from(file)} versions added")


@stores.command("upgrade")
def upgrade_store(store: StoreOption = STORE) -> None:
    """Bring the database to the schema of this version; back it up before."""
    from controlprefix.store import upgrade

    before, after = upgrade(store)
    if before == after:
        out.print(f"the store is at schema {after} already")
    else:
        out.print(f"upgraded the store from schema {before or 'none'} to {after}")


SpaceFile = Annotated[Path, typer.Argument(help="The file.")]
SPACE = Path("attributes.yaml")


@spaces.command("init")
def init_attributes(
    file: SpaceFile = SPACE, store: StoreOption = STORE, tenant: TenantOption = TENANT
) -> None:
    """Write a file to begin with: the labels that are stored, or an example."""
    from controlprefix.attributes.scaffold import scaffold

    if file.exists():
        raise RequestError(f"{file} exists already; give another name, or remove it")
    with _store(store, tenant) as opened:
        labels = {found.key.name for found in opened.prefixes("attribute")}
    try:
        file.write_text(scaffold(labels), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error}") from error
    out.print(f"written: {file}; check it with: controlprefix attributes check {file}")


@spaces.command("show")
def show_attributes(
    file: SpaceFile = SPACE, store: StoreOption = STORE, tenant: TenantOption = TENANT
) -> None:
    """All labels, what they mean, and which have a prefix."""
    from controlprefix.attributes import AttributeSpace

    space = AttributeSpace.read(file)
    with _store(store, tenant) as opened:
        stored = {found.key.name for found in opened.prefixes("attribute")}
    table = Table("attribute", "label", "default", "opposite", "prefix", "description")
    for name, attribute in space.attributes.items():
        for label, about in attribute.labels.items():
            table.add_row(
                name,
                label,
                "yes" if attribute.default == label else "",
                about.opposite or "",
                "yes" if f"{name}={label}" in stored else "none yet",
                about.description,
            )
    out.print(table)


@spaces.command("check")
def check_attributes(file: SpaceFile = SPACE) -> None:
    """Say whether the file makes sense, and which lines do not."""
    from controlprefix.attributes import AttributeSpace

    space = AttributeSpace.read(file)
    labels = sum(len(one.labels) for one in space.attributes.values())
    out.print(f"{file}: {len(space.attributes)} attributes with {labels} labels")


def main() -> None:
    """Run the command line; an error of ours is one line on standard error and exit code 2."""
    try:
        app()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ControlPrefixError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


def _open(model: str, store: str, tenant: str, attributes: Path | None = None) -> "ControlPrefix":
    from accelerate import PartialState

    from controlprefix.engine import ControlPrefix

    _quiet()
    # A GPU if there is one, and each process that accelerate started has its own.
    device = PartialState().device
    return ControlPrefix.from_pretrained(
        model, store=store, tenant=tenant, device=device, attributes=attributes
    )


def _accelerator(tracker: str, folder: Path | None) -> Any:
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=tracker, project_dir=folder or ".")
        accelerator.init_trackers("controlprefix")
    except (ValueError, ImportError) as error:
        raise RequestError(f"--tracker {tracker!r}: {error}") from error
    return accelerator


def _is_main_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _quiet() -> None:
    """Leave transformers' progress bars and notes out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _store(url: str, tenant: str) -> "PrefixStore":
    from controlprefix.store import PrefixStore

    return PrefixStore(url, tenant=tenant)


def _print_prefixes(store: "PrefixStore", kind: "Kind | None") -> None:
    table = Table("kind", "name", "model", "version", "slots", "bytes", "made")
    for found in store.prefixes(kind):
        version = found.current
        table.add_row(
            found.key.kind,
            found.key.name,
            found.model_name,
            str(version.version),
            str(version.num_slots),
            f"{version.size_bytes:,}",
            f"{version.created_at:%Y-%m-%d %H:%M}",
        )
    out.print(table if table.row_count else "nothing is stored yet")


def _print_versions(store: "PrefixStore", kind: "Kind", name: str) -> None:
    from controlprefix.store import PrefixKey

    key = PrefixKey(kind, name)
    models = [found for found in store.prefixes(kind) if found.key == key]
    if not models:
        raise store.unknown(key, None)
    table = Table("model", "version", "current", "slots", "dtype", "bytes", "made", "content")
    for model in models:
        for one in store.versions(key, model.fingerprint):
            table.add_row(
                model.model_name,
                str(one.version),
                "yes" if one.current else "",
                str(one.num_slots),
                one.dtype,
                f"{one.size_bytes:,}",
                f"{one.created_at:%Y-%m-%d %H:%M}",
                one.content_hash[:19],
            )
    out.print(table)


def _attributes(written: list[str]) -> dict[str, str | dict[str, float]]:
    """`["formality=formal", "tone=warm:0.6", "tone=brief:0.4"]` as a request has it."""
    found: dict[str, dict[str, float]] = {}
    for one in written:
        attribute, label = _pair("--attribute", one)
        name, _, weight = label.rpartition(":")
        if name and _is_number(weight):
            found.setdefault(attribute, {})[name] = float(weight)
        else:  # a label may hold a colon
            found.setdefault(attribute, {})[label] = 1.0
    return {**found}


def _pair(option: str, written: str) -> tuple[str, str]:
    name, _, value = written.partition("=")
    if not name or not value:
        raise RequestError(f"{option} {written!r} is not of the form name=value")
    return name, value


def _is_number(written: str) -> bool:
    try:
        float(written)
    except ValueError:
        return False
    return True


def _number(option: str, written: str) -> float:
    if not _is_number(written):
        raise RequestError(f"{option} has {written!r} where a number belongs")
    return float(written)


def _kind(written: str) -> "Kind":
    return cast("Kind", _one_of("kind", written, ("task", "attribute", "user")))


def _one_of(option: str, written: str, choices: tuple[str, ...]) -> Any:
    if written not in choices:
        raise RequestError(f"{option} is {written!r}; it must be one of: {', '.join(choices)}")
    return written


if __name__ == "__main__":
    main()
