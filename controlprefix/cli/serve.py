"""Commands of the server: serve, playground, api-keys."""

import signal
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from controlprefix._io import requires_extra
from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    AttributeFileOption,
    EncryptionKeysOption,
    ModelOption,
    StoreOption,
    TenantOption,
    api_keys_app,
    app,
    open_store,
    out,
    read_encryption_keys,
    silence_transformers,
)
from controlprefix.cli.evaluate import train_classifiers
from controlprefix.cli.options import parse_json_object
from controlprefix.errors import RequestError

LabelledTextsOption = Annotated[
    Path | None,
    typer.Option(help="Labelled texts for /v1/classify, as in `eval`."),
]
PortOption = Annotated[int, typer.Option(help="Port to listen on.")]
KeyNameArgument = Annotated[str, typer.Argument(help="Name of the API key.")]


@app.command()
def serve(
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: Annotated[
        str | None,
        typer.Option(help="Serve this tenant without API keys; left out, every request needs one."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients call the model by.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: PortOption = 8000,
    max_sequences: Annotated[int, typer.Option(help="Sequences decoded concurrently.")] = 32,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; others are answered 503.")
    ] = 256,
    requests_per_minute: Annotated[
        int, typer.Option(help="Limit per API key; 0 for no limit.")
    ] = 0,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds per request; then it is answered 504.")
    ] = 300.0,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of new tokens per completion.")] = 2048,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help="JSON object of variables for the chat template, in every prompt: "
            '{"enable_thinking": false}.'
        ),
    ] = None,
    encryption_keys: EncryptionKeysOption = None,
    attribute_file: AttributeFileOption = None,
    labelled_texts: LabelledTextsOption = None,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What runs the model: this process, or a vLLM server."),
    ] = "transformers",
    vllm_url: Annotated[str, typer.Option(help="URL of the vLLM server.")] = (
        "http://127.0.0.1:8001"
    ),
    vllm_prefixes: Annotated[
        Path | None, typer.Option(help="Folder from which vLLM's workers read prefixes.")
    ] = None,
    vllm_api_key: Annotated[
        str | None,
        typer.Option(envvar="CONTROLPREFIX_VLLM_API_KEY", help="API key of the vLLM server."),
    ] = None,
) -> None:
    """Serve the model behind OpenAI's API, with users, attributes and tasks per request."""
    with requires_extra("serve", "a server"):
        import uvicorn

        from controlprefix.serving import Server, ServerLimits, create_app
    from accelerate import PartialState

    from controlprefix.attributes import AttributeSpace
    from controlprefix.model import FrozenModel

    if (engine == "vllm") != (vllm_prefixes is not None):
        raise RequestError(
            "--engine vllm and --vllm-prefixes, the folder its workers read, go together"
        )
    silence_transformers()
    frozen = FrozenModel.from_pretrained(
        model,
        device=PartialState().device,
        chat_template_kwargs=parse_json_object("--chat-template-kwargs", chat_template_kwargs),
    )
    runner = None
    if vllm_prefixes is not None:
        with requires_extra("vllm", "a vLLM server"):
            from controlprefix.vllm.prefix_folder import PrefixFolder
            from controlprefix.vllm.runner import VllmRunner

        runner = VllmRunner(
            frozen,
            url=vllm_url,
            folder=PrefixFolder(vllm_prefixes),
            api_key=vllm_api_key,
            max_requests=max_sequences + max_waiting,
        )
    server = Server(
        frozen,
        store,
        name=served_model_name or Path(model).name,
        open_tenant=tenant,
        encryption_keys=read_encryption_keys(encryption_keys),
        attributes=AttributeSpace.read(attribute_file) if attribute_file else None,
        classifiers=train_classifiers(labelled_texts, 0) if labelled_texts else (),
        limits=ServerLimits(
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            requests_per_minute=requests_per_minute,
            timeout_s=timeout_s,
            max_new_tokens=max_new_tokens,
        ),
        runner=runner,
    )
    url = f"http://{host}:{port}"
    audience = f"tenant {tenant!r}, without API keys" if tenant else "tenants by their API keys"
    out.print(f"serving {server.name!r} on {url}/v1 to {audience}; playground: {url}/playground")
    # uvicorn finishes its requests, and then raises the signal that it was stopped by.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(create_app(server), host=host, port=port, log_level="warning")


@app.command()
def playground(
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    port: PortOption = 8000,
    encryption_keys: EncryptionKeysOption = None,
    attribute_file: AttributeFileOption = None,
    labelled_texts: LabelledTextsOption = None,
) -> None:
    """Serve one tenant on this machine, and open a page to try users, labels and strengths."""
    threading.Timer(2.0, webbrowser.open, [f"http://127.0.0.1:{port}/playground"]).start()
    serve(
        model,
        store,
        tenant=tenant,
        port=port,
        encryption_keys=encryption_keys,
        attribute_file=attribute_file,
        labelled_texts=labelled_texts,
    )


@api_keys_app.command("create")
def create_api_key(name: KeyNameArgument, tenant: TenantOption, store: StoreOption = STORE) -> None:
    """Create an API key of a tenant. It is shown once."""
    with open_store(store, tenant) as opened:
        out.print(opened.create_api_key(name), soft_wrap=True)


@api_keys_app.command("list")
def list_api_keys(tenant: TenantOption, store: StoreOption = STORE) -> None:
    """List a tenant's API keys by name."""
    table = Table("name", "created")
    with open_store(store, tenant) as opened:
        for info in opened.api_keys():
            table.add_row(info.name, f"{info.created_at:%Y-%m-%d %H:%M}")
    out.print(table if table.row_count else "there are no API keys yet")


@api_keys_app.command("revoke")
def revoke_api_key(name: KeyNameArgument, tenant: TenantOption, store: StoreOption = STORE) -> None:
    """Revoke an API key; servers notice within ten seconds."""
    with open_store(store, tenant) as opened:
        opened.revoke_api_key(name)
    out.print(f"revoked API key {name!r} of tenant {tenant!r}")
