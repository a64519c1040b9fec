"""Commands of the server: serve, playground, api-keys."""

import errno
import ipaddress
import logging
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from controlprefix._io import requires_extra
from controlprefix.cli.common import api_keys_app, app, err, out, print_table
from controlprefix.cli.evaluate import train_classifiers
from controlprefix.cli.groups import (
    EngineArguments,
    StoreArguments,
    YesOption,
    grouped,
    require_yes,
)
from controlprefix.cli.options import is_on_command_line, parse_json_object
from controlprefix.errors import RequestError

LabelledTextsOption = Annotated[
    Path | None,
    typer.Option(help="Labelled texts for /v1/classify, as in `eval`."),
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")]
KeyNameArgument = Annotated[str, typer.Argument(help="Name of the API key.")]


@dataclass(frozen=True)
class ServerArguments(EngineArguments):
    """A model, a store, and whose prefixes are served."""

    tenant: Annotated[
        str,
        typer.Option(help="Serve this tenant without API keys; left out, every request needs one."),
    ] = ""


def _serve(
    context: typer.Context,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients call the model by.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: PortOption = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name under which a server without API keys is reached, beside localhost "
            "and IP addresses. Repeatable."
        ),
    ] = None,
    max_sequences: Annotated[
        int,
        typer.Option(
            help="Rows decoded concurrently; requests with strengths below 0, or that mix by "
            "logits, have several."
        ),
    ] = 32,
    max_sequences_per_tenant: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of the batch that one tenant may use: the fewer, the less it slows others. "
            "Left out, 7/8 of --max-sequences, half while another tenant asks, or all with "
            "--tenant.",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; others are answered 503.")
    ] = 256,
    requests_per_minute: Annotated[
        int, typer.Option(help="Limit per API key; 0 for no limit.")
    ] = 0,
    tokens_per_minute: Annotated[
        int, typer.Option(help="Limit of tokens per API key, prompts included; 0 for no limit.")
    ] = 0,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds per request; then it is answered 504.")
    ] = 300.0,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of new tokens per completion.")] = 2048,
    max_body_bytes: Annotated[
        int, typer.Option(min=1024, help="Size of a request body, images included.")
    ] = 1 << 20,
    jobs: Annotated[
        bool,
        typer.Option(help="Train users in this process; --no-jobs: `controlprefix worker` does."),
    ] = True,
    unknown_users: Annotated[
        Literal["refuse", "plain"],
        typer.Option(help="A user without a prefix: refuse the request, or write without one."),
    ] = "refuse",
    allow_image_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin from which images may be downloaded that requests name by URL, such as "
            "https://images.example.com; without it none are. Repeatable."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may call the server from a browser, such as "
            "https://app.example.com; * for any. Repeatable."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=2,
            help="Temperature of requests that name none; 0 is greedy. Left out, that of the "
            "model's generation config.",
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1, help="top_p of requests that name none.")
    ] = None,
    request_log: Annotated[
        bool, typer.Option(help="Log a line of JSON per request, without texts or users.")
    ] = True,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help="JSON object of variables for the chat template, in every prompt: "
            '{"enable_thinking": false}.'
        ),
    ] = None,
    labelled_texts: LabelledTextsOption = None,
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option("--engine", help="What runs the model: this process, or a vLLM server."),
    ] = "transformers",
    vllm_url: Annotated[str, typer.Option(help="URL of the vLLM server.")] = (
        "http://127.0.0.1:8001"
    ),
    vllm_model: Annotated[
        str | None,
        typer.Option(
            help="Which of vLLM's models to use, such as a LoRA adapter, which --model then has "
            "too; left out, its first."
        ),
    ] = None,
    vllm_prefixes: Annotated[
        Path | None, typer.Option(help="Folder from which vLLM's workers read prefixes.")
    ] = None,
    vllm_max_folder_bytes: Annotated[
        int, typer.Option(min=1, help="Limit of the files in that folder.")
    ] = 10 << 30,
    vllm_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a key (16, 24 or 32 bytes in base64) that prefixes in that folder are "
            "encrypted with; vLLM's connector needs it as `key_file`."
        ),
    ] = None,
    vllm_api_key: Annotated[
        str | None,
        typer.Option(envvar="CONTROLPREFIX_VLLM_API_KEY", help="API key of the vLLM server."),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the playground in a browser.")
    ] = False,
    *,
    engine: ServerArguments,
) -> None:
    """Serve the model behind OpenAI's API, with users, attributes and tasks per request."""
    with requires_extra("serve", "a server"):
        import uvicorn

        from controlprefix.serving import Server, ServerLimits, create_app
        from controlprefix.serving.connections import config_for

    if (backend == "vllm") != (vllm_prefixes is not None):
        raise RequestError(
            "--engine vllm and --vllm-prefixes, the folder its workers read, go together"
        )
    _refuse_without_effect(
        context,
        ("max_sequences_per_tenant",)
        if backend == "vllm"
        else ("vllm_url", "vllm_model", "vllm_max_folder_bytes", "vllm_key_file", "vllm_api_key"),
        f"--engine {backend}",
    )
    tenant = engine.tenant
    if tenant:
        per_key = ("requests_per_minute", "tokens_per_minute", "max_sequences_per_tenant")
        _refuse_without_effect(context, per_key, "--tenant, which has no API keys")
    if tenant and not _is_local(host):
        err.print(
            f"warning: whoever reaches {host} can read, change and remove what tenant {tenant!r} "
            "has; leave --tenant out, so that every request needs an API key"
        )
    listener = _listen(host, port)  # before the model is loaded
    if request_log:
        _log_requests()
    template_kwargs = parse_json_object("--chat-template-kwargs", chat_template_kwargs)
    attributes, encryption_keys = engine.attribute_space(), engine.read_keys()
    classifiers = train_classifiers(labelled_texts, 0) if labelled_texts else ()
    frozen = engine.load(chat_template_kwargs=template_kwargs)
    runner = None
    if vllm_prefixes is not None:
        with requires_extra("vllm", "a vLLM server"):
            from controlprefix.vllm.prefix_folder import PrefixFolder
            from controlprefix.vllm.runner import VllmRunner

        runner = VllmRunner(
            frozen,
            url=vllm_url,
            folder=PrefixFolder(
                vllm_prefixes, max_bytes=vllm_max_folder_bytes, key_file=vllm_key_file
            ),
            api_key=vllm_api_key,
            model_name=vllm_model,
            max_requests=max_sequences + max_waiting,
        )
    server = Server(
        frozen,
        engine.store,
        name=served_model_name or Path(engine.model).name,
        open_tenant=engine.tenant or None,
        encryption_keys=encryption_keys,
        attributes=attributes,
        classifiers=classifiers,
        limits=ServerLimits(
            max_sequences=max_sequences,
            max_sequences_per_tenant=max_sequences_per_tenant,
            max_waiting=max_waiting,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            timeout_s=timeout_s,
            max_new_tokens=max_new_tokens,
            max_body_bytes=max_body_bytes,
        ),
        runner=runner,
        allowed_hosts=[host, *(allow_host or ())],
        unknown_users=unknown_users,
        image_origins=allow_image_origin or (),
        does_jobs=jobs,
        sampling_defaults={
            name: value
            for name, value in (("temperature", temperature), ("top_p", top_p))
            if value is not None
        },
    )
    if tenant and not server.has_prefixes(tenant):
        err.print(
            f"warning: tenant {tenant!r} has no prefix for this model in {server.store_label}; "
            "check --tenant, --store and --model, or train and enroll"
        )
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{listener.getsockname()[1]}"
    audience = f"tenant {tenant!r}, without API keys" if tenant else "tenants by their API keys"
    out.print(f"serving {server.name!r} on {url}/v1 to {audience}; playground: {url}/playground")
    # uvicorn finishes its requests, and then raises the signal that it was stopped by.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    application = create_app(server, allow_origins=allow_origin or ())
    config = config_for(application, host=host, port=port, limits=server.limits)
    if open_page:  # the socket listens, so the page waits for the server; not so a text browser
        local = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        opening = threading.Thread(
            target=webbrowser.open, args=(f"{local}/playground",), daemon=True
        )
        opening.start()
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        out.print("the server has stopped")


app.command("serve")(grouped(_serve))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to, and wait at until the server has loaded.

    Raises:
        RequestError: If the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "another process listens there; stop it, or give another --port"
        else:
            reason = f"{error.strerror or error}; check --host and --port"
        raise RequestError(f"cannot listen on {host}:{port}: {reason}") from error


def _refuse_without_effect(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options on the command line that have no effect.

    Raises:
        RequestError: With the option.
    """
    for name in names:
        if is_on_command_line(context, name):
            option = f"--{name.replace('_', '-')}"
            raise RequestError(f"{option} has no effect with {why}; leave it out")


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_requests() -> None:
    """Write the request log to stderr, a line each."""
    logger = logging.getLogger("controlprefix.requests")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@app.command()
@grouped
def playground(
    context: typer.Context,
    port: PortOption = 8000,
    labelled_texts: LabelledTextsOption = None,
    *,
    engine: EngineArguments,
) -> None:
    """Serve one tenant on this machine, and open a page to try users, labels and strengths."""
    _serve(
        context,
        port=port,
        labelled_texts=labelled_texts,
        open_page=True,
        engine=ServerArguments(**vars(engine)),
    )


@dataclass(frozen=True, kw_only=True)
class TenantArguments(StoreArguments):
    """A store, and a tenant that must be named."""

    tenant: Annotated[
        str, typer.Option(envvar="CONTROLPREFIX_TENANT", help="Tenant whose API keys they are.")
    ] = field()  # without a default, which it would have from the class above


@api_keys_app.command("create")
@grouped
def create_api_key(name: KeyNameArgument, *, store: TenantArguments) -> None:
    """Create an API key of a tenant. It is shown once."""
    with store.open_store(create=True) as opened:
        out.print(opened.create_api_key(name), soft_wrap=True)


@api_keys_app.command("list")
@grouped
def list_api_keys(*, store: TenantArguments) -> None:
    """List a tenant's API keys by name."""
    table = Table("name", "created")
    with store.open_store() as opened:
        for info in opened.api_keys():
            table.add_row(info.name, f"{info.created_at:%Y-%m-%d %H:%M}")
    print_table(table, empty="there are no API keys yet")


@api_keys_app.command("revoke")
@grouped
def revoke_api_key(
    name: KeyNameArgument, yes: YesOption = False, *, store: TenantArguments
) -> None:
    """Revoke an API key; servers notice within ten seconds."""
    require_yes(yes, f"Revoke the API key {name!r} of tenant {store.tenant!r}?")
    with store.open_store() as opened:
        opened.revoke_api_key(name)
    out.print(f"revoked API key {name!r} of tenant {store.tenant!r}")
