"""Routes of completions."""

from fastapi import APIRouter, Request, Response

from controlprefix.errors import RequestError
from controlprefix.serving.bodies import ChatBody, TextBody
from controlprefix.serving.dependencies import ClientDependency, ServerDependency
from controlprefix.serving.openai import ChatFormat, CompletionResponse, ErrorResponse, TextFormat
from controlprefix.serving.server import Server
from controlprefix.serving.stream import CompletionJob

router = APIRouter(
    prefix="/v1",
    tags=["completions"],
    responses={400: {"model": ErrorResponse}, 503: {"model": ErrorResponse}},
)


@router.post("/chat/completions", response_model=CompletionResponse)
async def create_chat_completion(
    body: ChatBody, client: ClientDependency, server: ServerDependency, request: Request
) -> Response:
    """Answer a conversation, steered by the task in `model`, `attributes` and `user`."""
    _require_few_choices(body.n, server)
    messages = [message.to_plain() for message in body.messages]
    requests = body.to_requests(server.name, [{"messages": messages}], server.limits.max_new_tokens)
    form = ChatFormat(body.top_logprobs if body.logprobs else None)
    return await CompletionJob(server, client, body, request, form).respond(requests)


@router.post("/completions", response_model=CompletionResponse)
async def create_completion(
    body: TextBody, client: ClientDependency, server: ServerDependency, request: Request
) -> Response:
    """Continue texts without a chat template."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise RequestError("prompt is an empty list; give a text")
    _require_few_choices(len(prompts) * body.n, server)
    fields = [{"prompt": prompt, "raw": True} for prompt in prompts]
    requests = body.to_requests(server.name, fields, server.limits.max_new_tokens)
    form = TextFormat(body.logprobs)
    return await CompletionJob(server, client, body, request, form).respond(requests)


def _require_few_choices(num_choices: int, server: Server) -> None:
    """Check the number of choices before anything is made of them."""
    limit = server.limits.max_choices
    if num_choices > limit:
        raise RequestError(f"{num_choices:,} choices; this server gives {limit} at most")
