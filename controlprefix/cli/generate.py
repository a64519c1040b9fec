"""Commands that generate and score: generate, score, demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from controlprefix.cli.common import app, err, out, print_text, silence_transformers
from controlprefix.cli.groups import ColumnArguments, EngineArguments, grouped
from controlprefix.cli.options import request_options


@app.command()
@request_options
@grouped
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to answer.")],
    request_fields: dict[str, Any],
    *,
    engine: EngineArguments,
) -> None:
    """Generate text, printed as it is generated."""
    from controlprefix.request import Request
    from controlprefix.request_fields import with_sampling_defaults

    # Fail before a model is loaded.
    Request(prompt=prompt, **with_sampling_defaults(request_fields, {}))
    cp = engine.open()
    defaults = cp.frozen_model.sampling_defaults
    request = Request(prompt=prompt, **with_sampling_defaults(request_fields, defaults))
    resolved = cp.resolve(request)
    for part in resolved.parts:
        if part.used.relevance is not None and part.used.strength == 0:
            name = f"{part.used.kind} {part.used.name}"
            err.print(
                f"{name} left out: the prompt is not one that it is for (similarity "
                f"{part.used.relevance:.2f})"
            )
    for stand_in in resolved.stand_ins:
        used = ", ".join(f"{name} ({share:.2f})" for name, share in stand_in.used.items())
        nearest = f"nearest {stand_in.similarity:.2f}"
        err.print(f"for {stand_in.label}, {stand_in.how}: {used or nearest}")
    if request.num_beams > 1:
        print_text(cp.generate(request).text)
        return
    for text in cp.stream(request):
        print_text(text, end="")
    print_text("")


@app.command()
@grouped
def score(
    data: Annotated[Path, typer.Argument(help="Rows with completions.")],
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Print the likelihood of a file's completions under the steered model."""
    from controlprefix.data import as_examples

    examples = as_examples(data, columns=columns.columns(), defaults=columns.defaults())
    cp = engine.open()
    scores = cp.score(examples)
    num_tokens = sum(score.num_tokens for score in scores)
    nats = -sum(score.log_likelihood for score in scores)
    out.print(
        f"{len(scores)} examples, {num_tokens} tokens: {nats / num_tokens:.4f} nats per token"
    )


@app.command()
def demo(
    store: Annotated[
        str, typer.Option(envvar="CONTROLPREFIX_STORE", help="Path or SQLAlchemy URL of the store.")
    ] = "prefixes.db",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Train, store, reopen and mix prefixes on a real model, and show what they do."""
    from controlprefix.cli.demo import run

    silence_transformers()
    run(store, out, json_file)
