"""Commands that ask: generate, score, demo."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    ModelOption,
    SpaceOption,
    StoreOption,
    TaskOption,
    TenantOption,
    UserOption,
    app,
    err,
    is_number,
    listed,
    number,
    open_engine,
    out,
    pair,
    quiet,
)
from controlprefix.errors import RequestError


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
    mixing: Annotated[
        Literal["attention", "logits"],
        typer.Option(help="Labels side by side, or each in a row of its own: firmer, slower."),
    ] = "attention",
    calibrated: Annotated[
        bool,
        typer.Option("--calibrated", help="Weights and strengths of labels are dial positions."),
    ] = False,
    unseen: Annotated[
        Literal["refuse", "nearest", "text"],
        typer.Option(help="What stands in for a label that nobody learned."),
    ] = "refuse",
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="tone=0:1,40:0 fades it out over the first 40 tokens; repeatable."),
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
            name: number("--strength", value)
            for name, value in (pair("--strength", one) for one in strength or [])
        },
        mixing=mixing,
        calibrated=calibrated,
        unseen=unseen,
        schedules=dict(_schedule(one) for one in schedule or []),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    cp = open_engine(model, store, tenant, attributes)
    for one in cp.prepare(request).stand_ins if unseen != "refuse" else ():
        used = ", ".join(f"{name} ({share:.2f})" for name, share in one.used.items())
        err.print(f"for {one.label}, {one.how}: {used or f'nearest {one.similarity:.2f}'}")
    for piece in cp.stream(request):
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
    from controlprefix.interop.data_files import read_examples

    examples = read_examples(data)
    scores = open_engine(model, store, tenant, attributes).score(examples)
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
    from controlprefix.cli.demo import run

    quiet()
    run(data, store, out, json_file)


def _schedule(written: str) -> tuple[str, tuple[tuple[int, float], ...]]:
    """`tone=0:1,40:0` as a request has it."""
    part, points = pair("--schedule", written)
    found = []
    for point in listed(points):
        token, _, multiplier = point.partition(":")
        at = number("--schedule", token)
        if not at.is_integer():
            raise RequestError(f"--schedule has {token!r} where the number of a token belongs")
        found.append((int(at), number("--schedule", multiplier)))
    return part, tuple(found)


def _attributes(written: list[str]) -> dict[str, str | dict[str, float]]:
    """`["formality=formal", "tone=warm:0.6", "tone=brief:0.4"]` as a request has it."""
    found: dict[str, dict[str, float]] = {}
    for one in written:
        attribute, label = pair("--attribute", one)
        name, _, weight = label.rpartition(":")
        if name and is_number(weight):
            found.setdefault(attribute, {})[name] = float(weight)
        else:  # a label may hold a colon
            found.setdefault(attribute, {})[label] = 1.0
    return {**found}
