"""Commands that measure what prefixes do: eval, calibrate."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    ModelOption,
    SpaceOption,
    StoreOption,
    TaskOption,
    TenantOption,
    app,
    listed,
    number,
    open_engine,
    out,
    pair,
)

JudgeOption = Annotated[
    Path,
    typer.Option(
        "--judge",
        help='Texts that judges learn from, JSON Lines: {"text": "…", "attributes": {"tone": '
        '"warm"}}. Other texts than the prefixes learned from.',
    ),
]
NewTokensOption = Annotated[int, typer.Option(help="Tokens of each text, at most.")]
SeedOption = Annotated[int, typer.Option(help="Of the sampling, and of the judges.")]


@app.command("eval")
def evaluate(
    rows: Annotated[Path, typer.Argument(help="Test rows, JSON Lines, an example a line.")],
    judge: JudgeOption,
    folder: Annotated[
        Path, typer.Option("--out", help="Where the report goes; a broken-off run goes on there.")
    ] = Path("report"),
    strengths: Annotated[
        str, typer.Option(help="Of the curves, with commas; 0 and 1 among them.")
    ] = "0,0.1,0.25,0.5,1,2,4",
    curve_rows: Annotated[int, typer.Option(help="Rows at each strength of each label.")] = 32,
    max_new_tokens: NewTokensOption = 48,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    attributes: SpaceOption = None,
) -> None:
    """Measure control, strength, cross-talk, fluency and variety; write a report as HTML."""
    from controlprefix.evaluation import evaluate as measured
    from controlprefix.interop.data_files import read_examples

    examples, judges = read_examples(rows), learn_judges(judge, seed)
    report = measured(
        open_engine(model, store, tenant, attributes),
        examples,
        judges,
        strengths=[number("--strengths", one) for one in listed(strengths)],
        curve_rows=curve_rows,
        max_new_tokens=max_new_tokens,
        seed=seed,
        folder=folder,
    )
    table = Table("label", "found by the judge", "without it", "rises with strength")
    for name, found in report.control.items():
        without = report.control_without[name]
        table.add_row(
            name,
            f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})",
            f"{without.mean:.2f}",
            f"{report.monotonic[name]:.2f}",
        )
    out.print(table)
    if report.not_judged:
        out.print(f"not judged: {', '.join(report.not_judged)}")
    out.print(f"fluency {report.fluency.mean:.2f} nats a token under the plain model")
    out.print(f"the report is in {report.save(folder)}")


@app.command()
def calibrate(
    label: Annotated[str, typer.Argument(help="Of a stored prefix: formality=formal.")],
    judge: JudgeOption,
    prompt: Annotated[str | None, typer.Option(help="What to ask; left out, any text.")] = None,
    task: TaskOption = None,
    samples: Annotated[int, typer.Option(help="Texts at each strength.")] = 64,
    max_new_tokens: NewTokensOption = 32,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Give a label a dial: positions at which what the judge measures moves evenly."""
    from controlprefix.errors import RequestError
    from controlprefix.evaluation import calibrate as calibrated
    from controlprefix.request import Request

    attribute, name = pair("the label", label)
    judges = {one.attribute: one for one in learn_judges(judge, seed)}
    if attribute not in judges:
        raise RequestError(
            f"{judge} has no texts labelled with {attribute!r}; it has: {', '.join(judges)}"
        )
    cp = open_engine(model, store, tenant)
    request = Request(
        prompt=prompt or "", raw=prompt is None, task=task, max_new_tokens=max_new_tokens
    )
    found = calibrated(cp, request, attribute, name, judges[attribute], samples=samples, seed=seed)
    table = Table("strength", "chance of the label", "fluency")
    for one in found.responses:
        chance = f"{one.chance.mean:.2f} ({one.chance.low:.2f} to {one.chance.high:.2f})"
        table.add_row(f"{one.strength:g}", chance, f"{one.fluency:.2f}")
    out.print(table)
    shown = ", ".join(f"{position:g} → {strength:.3g}" for position, strength in found.dial)
    out.print(f"dial of {label} (version {found.version}): {shown}")


def learn_judges(path: Path, seed: int) -> list[Any]:
    """Judges of all attributes in a file of labelled texts."""
    from controlprefix.evaluation import Judge
    from controlprefix.interop.data_files import read_labelled

    judges = []
    for attribute, pairs in read_labelled(path).items():
        texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
        judges.append(Judge.learn(attribute, texts, labels, seed=seed))
        out.print(
            f"judge of {attribute}: {judges[-1].accuracy:.0%} of held-out texts right, "
            f"calibration error {judges[-1].calibration_error:.2f}"
        )
    return judges
