"""Commands for a server: serve, keys."""

import signal
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    ModelOption,
    SpaceOption,
    StoreOption,
    TenantOption,
    api_keys,
    app,
    open_store,
    out,
    quiet,
)
from controlprefix.cli.evaluate import learn_judges
from controlprefix.errors import ControlPrefixError, RequestError

JudgeOption = Annotated[
    Path | None, typer.Option(help="Labelled texts for judges, as in `eval`: for /v1/judge.")
]


@app.command()
def serve(
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: Annotated[
        str | None,
        typer.Option(help="Serve this tenant without keys; left out, a request needs an API key."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="That clients call the model by.")] = None,
    host: Annotated[str, typer.Option(help="To listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="To listen on.")] = 8000,
    rows: Annotated[int, typer.Option(help="In the running batch.")] = 32,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; others get 503.")] = 256,
    rate: Annotated[int, typer.Option(help="Requests a minute of a key; 0: no limit.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of a request; then it gets 504.")] = 300.0,
    new_tokens: Annotated[int, typer.Option(help="Of a completion, at most.")] = 2048,
    attributes: SpaceOption = None,
    judge: JudgeOption = None,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What runs the model: this process, or a vLLM server."),
    ] = "transformers",
    vllm_url: Annotated[str, typer.Option(help="Of the vLLM server.")] = "http://127.0.0.1:8001",
    vllm_prefixes: Annotated[
        Path | None, typer.Option(help="The folder that vLLM's workers read prefixes from.")
    ] = None,
    vllm_key: Annotated[
        str | None,
        typer.Option(envvar="CONTROLPREFIX_VLLM_KEY", help="The vLLM server's own API key."),
    ] = None,
) -> None:
    """Serve the model behind OpenAI's API, with users, attributes and tasks per request."""
    try:
        import uvicorn

        from controlprefix.serving import Gateway, Limits, create_app
    except ModuleNotFoundError as error:
        raise ControlPrefixError(
            f"a server needs {error.name}: pip install 'controlprefix[serve]'"
        ) from error
    from accelerate import PartialState

    from controlprefix.attributes import AttributeSpace
    from controlprefix.model.loading import load

    if (engine == "vllm") != (vllm_prefixes is not None):
        raise RequestError(
            "--engine vllm and --vllm-prefixes, the folder its workers read, belong together"
        )
    quiet()
    loaded, tokenizer = load(model, device=PartialState().device)
    gateway = Gateway(
        loaded,
        tokenizer,
        store,
        name=name or Path(model).name,
        open_tenant=tenant,
        attributes=AttributeSpace.read(attributes) if attributes else None,
        judges=learn_judges(judge, 0) if judge else (),
        limits=Limits(
            rows=rows,
            waiting=waiting,
            requests_a_minute=rate,
            seconds=seconds,
            new_tokens=new_tokens,
        ),
        runner=(
            None
            if vllm_prefixes is None
            else lambda cp: cp.vllm_runner(
                vllm_url, vllm_prefixes, key=vllm_key, max_requests=rows + waiting
            )
        ),
    )
    at = f"http://{host}:{port}"
    whose = f"tenant {tenant!r}, without keys" if tenant else "tenants by their API keys"
    out.print(f"serving {gateway.name!r} on {at}/v1 to {whose}; playground: {at}/playground")
    # uvicorn finishes what it has, and then raises the signal that it was told to stop by.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(create_app(gateway), host=host, port=port, log_level="warning")


@app.command()
def playground(
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    port: Annotated[int, typer.Option(help="To listen on.")] = 8000,
    judge: JudgeOption = None,
    attributes: SpaceOption = None,
) -> None:
    """Serve one tenant to this machine, and open a page to play with the dials."""
    threading.Timer(2.0, webbrowser.open, [f"http://127.0.0.1:{port}/playground"]).start()
    serve(model, store, tenant=tenant, port=port, judge=judge, attributes=attributes)


@api_keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Of the key.")],
    tenant: TenantOption,
    store: StoreOption = STORE,
) -> None:
    """Make an API key of a tenant. It is shown once."""
    with open_store(store, tenant) as opened:
        out.print(opened.create_api_key(name), soft_wrap=True)


@api_keys.command("list")
def list_keys(tenant: TenantOption, store: StoreOption = STORE) -> None:
    """A tenant's API keys, by name."""
    table = Table("name", "made")
    with open_store(store, tenant) as opened:
        for one in opened.api_keys():
            table.add_row(one.name, f"{one.created_at:%Y-%m-%d %H:%M}")
    out.print(table if table.row_count else "there are no keys yet")


@api_keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Of the key.")],
    tenant: TenantOption,
    store: StoreOption = STORE,
) -> None:
    """Take an API key away; servers notice within ten seconds."""
    with open_store(store, tenant) as opened:
        opened.revoke_api_key(name)
    out.print(f"revoked API key {name!r} of tenant {tenant!r}")
