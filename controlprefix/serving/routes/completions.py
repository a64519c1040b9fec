"""Routes of completions: chat, text, and the Responses API."""

from fastapi import APIRouter, Request, Response

from controlprefix.errors import RequestError
from controlprefix.serving.bodies import ChatBody, TextBody
from controlprefix.serving.dependencies import ClientDependency, ServerDependency, TenantRoute
from controlprefix.serving.image_downloads import download_images
from controlprefix.serving.openai import (
    ChatCompletionResponse,
    ChatFormatter,
    TextCompletionResponse,
    TextFormatter,
)
from controlprefix.serving.responder import CompletionResponder
from controlprefix.serving.responses_api import ResponseObject, ResponsesBody, ResponsesFormatter
from controlprefix.serving.server import Server

router = APIRouter(prefix="/v1", tags=["completions"], route_class=TenantRoute)

_DEFAULT_CHAT_TOKENS = 256
_DEFAULT_TEXT_TOKENS = 16  # as OpenAI


@router.post("/chat/completions", response_model=ChatCompletionResponse)
async def create_chat_completion(
    body: ChatBody, client: ClientDependency, server: ServerDependency, request: Request
) -> Response:
    """Answer a conversation, steered by the task in `model`, `attributes` and `user`."""
    _require_few_choices(body.n, server)
    await download_images(body.messages, client, server)
    requests = body.to_requests(
        server.name,
        [{"messages": tuple(message.to_plain() for message in body.messages)}],
        server.limits.max_new_tokens,
        server.sampling_defaults,
        default_limit=_DEFAULT_CHAT_TOKENS,
        max_tokens=body.max_completion_tokens or body.max_tokens,
    )
    formatter = ChatFormatter(body.top_logprobs if body.logprobs else None, server.token_bytes)
    return await CompletionResponder(server, client, request, formatter, body).respond(requests)


@router.post("/completions", response_model=TextCompletionResponse)
async def create_completion(
    body: TextBody, client: ClientDependency, server: ServerDependency, request: Request
) -> Response:
    """Continue texts or token ids without a chat template.

    With `echo` the prompt is repeated, with its tokens' log-probabilities if `logprobs` is given;
    `max_tokens` 0 writes nothing else.
    """
    prompts = body.prompts()
    _require_few_choices(len(prompts) * body.n, server)
    requests = body.to_requests(
        server.name,
        prompts,
        server.limits.max_new_tokens,
        server.sampling_defaults,
        default_limit=_DEFAULT_TEXT_TOKENS,
        max_tokens=body.max_tokens,
    )
    formatter = TextFormatter(body.logprobs, server.token_bytes)
    responder = CompletionResponder(server, client, request, formatter, body)
    return await responder.respond(requests, echoes=body.echo, generates=body.max_tokens != 0)


@router.post("/responses", response_model=ResponseObject)
async def create_response(
    body: ResponsesBody, client: ClientDependency, server: ServerDependency, request: Request
) -> Response:
    """Answer a conversation in the form of OpenAI's Responses API; nothing is stored."""
    if not isinstance(body.input, str):
        await download_images(body.input, client, server)
    own = body.to_request(
        server.name,
        server.limits.max_new_tokens,
        server.sampling_defaults,
        default_limit=_DEFAULT_CHAT_TOKENS,
    )
    formatter = ResponsesFormatter(body, body.num_log_probs, server.token_bytes)
    return await CompletionResponder(server, client, request, formatter, body).respond([own])


def _require_few_choices(num_choices: int, server: Server) -> None:
    """Check the number of choices before anything is made of them."""
    limit = server.limits.max_choices
    if num_choices > limit:
        raise RequestError(f"{num_choices:,} choices; this server gives {limit} at most")
