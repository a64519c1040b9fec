"""Unmodified clients of OpenAI's API against a controlprefix server, some with steering fields.

    controlprefix serve --tenant default
    pip install openai litellm langchain-openai llama-index-llms-openai-like \\
        pydantic-ai-slim[openai] instructor smolagents llm
    python examples/clients.py http://127.0.0.1:8000/v1 smollm2 --user ana

Clients that are not installed are left out. Most write a text or JSON.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

QUESTION = "Tell Sam that I am late."


class Mood(BaseModel):
    """A form for JSON output."""

    happy: bool


class Server:
    """Where the server is, and whose prefix is asked for."""

    def __init__(self, url: str, model: str, user: str) -> None:
        self.url, self.model, self.user = url, model, user
        self.messages = [{"role": "user", "content": QUESTION}]

    def openai_client(self, **options: Any) -> Any:
        """OpenAI's own client."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", **options)


def openai_chat(server: Server) -> str:
    """A chat completion, steered by `user` and `extra_body`."""
    completion = server.openai_client().chat.completions.create(
        model=server.model, messages=server.messages, user=server.user, max_tokens=12
    )
    return str(completion.choices[0].message.content)


def openai_responses(server: Server) -> str:
    """The Responses API, as a stream."""
    stream = server.openai_client().responses.create(
        model=server.model, input=QUESTION, user=server.user, max_output_tokens=16, stream=True
    )
    return "".join(e.delta for e in stream if e.type == "response.output_text.delta")


def openai_json(server: Server) -> str:
    """JSON of a pydantic model."""
    completion = server.openai_client().chat.completions.parse(
        model=server.model, messages=server.messages, user=server.user, response_format=Mood
    )
    return repr(completion.choices[0].message.parsed)


def litellm_chat(server: Server) -> str:
    """LiteLLM, with the steering fields as `extra_body`."""
    import litellm

    answer = litellm.completion(
        model=f"openai/{server.model}",
        api_base=server.url,
        api_key="none",
        messages=server.messages,
        user=server.user,
        max_tokens=12,
        extra_body={"strengths": {"user": 0.5}},
    )
    return str(answer.choices[0].message.content)


def litellm_context_error(server: Server) -> str:
    """LiteLLM knows a prompt that is too long by its code."""
    import litellm

    try:
        litellm.completion(
            model=f"openai/{server.model}",
            api_base=server.url,
            api_key="none",
            messages=[{"role": "user", "content": "word " * 20_000}],
        )
    except litellm.ContextWindowExceededError:
        return "ContextWindowExceededError"
    return "no error"


def langchain_chat(server: Server) -> str:
    """LangChain, streamed."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=server.url,
        api_key="none",
        model=server.model,
        max_tokens=12,
        extra_body={"user": server.user},
    )
    return "".join(str(chunk.content) for chunk in chat.stream(QUESTION))


def langchain_json(server: Server) -> str:
    """LangChain's structured output by a JSON schema."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=server.url, api_key="none", model=server.model)
    return repr(chat.with_structured_output(Mood, method="json_schema").invoke(QUESTION))


def llama_index_chat(server: Server) -> str:
    """LlamaIndex."""
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=server.model,
        api_base=server.url,
        api_key="none",
        is_chat_model=True,
        max_tokens=12,
        additional_kwargs={"user": server.user},
    )
    return str(model.complete(QUESTION))


def pydantic_ai_json(server: Server) -> str:
    """pydantic-ai with the model's own JSON output."""
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=server.url, api_key="none")
    agent = Agent(OpenAIChatModel(server.model, provider=provider), output_type=NativeOutput(Mood))
    return repr(agent.run_sync(QUESTION).output)


def instructor_json(server: Server) -> str:
    """instructor by a JSON schema."""
    import instructor

    client = instructor.from_openai(server.openai_client(), mode=instructor.Mode.JSON_SCHEMA)
    mood = client.chat.completions.create(
        model=server.model, messages=server.messages, response_model=Mood
    )
    return repr(mood)


def smolagents_model(server: Server) -> str:
    """smolagents' model, as its code agents use it."""
    from smolagents import OpenAIServerModel

    model = OpenAIServerModel(
        model_id=server.model, api_base=server.url, api_key="none", max_tokens=12
    )
    message = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    return str(model.generate([message]).content)


def llm_command(server: Server) -> str:
    """The `llm` command, with the model in extra-openai-models.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "extra-openai-models.yaml").write_text(
            f"- model_id: local\n  model_name: {server.model}\n  api_base: {server.url}\n"
        )
        done = subprocess.run(  # noqa: S603
            [Path(sys.executable).with_name("llm"), "-m", "local", "-o", "max_tokens", "12",
             "--no-log", QUESTION],
            env={**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


CLIENTS: tuple[tuple[str, Callable[[Server], str]], ...] = (
    ("openai", openai_chat),
    ("openai", openai_responses),
    ("openai", openai_json),
    ("litellm", litellm_chat),
    ("litellm", litellm_context_error),
    ("langchain-openai", langchain_chat),
    ("langchain-openai", langchain_json),
    ("llama-index-llms-openai-like", llama_index_chat),
    ("pydantic-ai-slim", pydantic_ai_json),
    ("instructor", instructor_json),
    ("smolagents", smolagents_model),
    ("llm", llm_command),
)


def main() -> None:
    """Print a Markdown table of what each client got."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--user", default="")
    options = parser.parse_args()
    server = Server(options.url, options.model, options.user)
    print("| client | version | what | outcome |\n| --- | --- | --- | --- |")
    for package, client in CLIENTS:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        try:
            outcome = " ".join(client(server).split())[:60]
        except Exception as error:  # whatever a client raises is the outcome
            outcome = f"**{type(error).__name__}**: {' '.join(str(error).split())[:160]}"
        about = (client.__doc__ or "").rstrip(".")
        print(f"| {package} | {installed} | {about} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
