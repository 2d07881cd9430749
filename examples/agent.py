"""An agent that answers from your documents: a language model that may search them as often as it likes.

Any endpoint with OpenAI's chat completions and tools will do, such as vLLM, llama.cpp, Ollama or OpenAI itself:

    search-r3 serve notes.store
    python examples/agent.py "which tea is not oxidised?" --base-url http://127.0.0.1:11434/v1 --model qwen3

It needs `pip install openai`. Keys are in the environment: OPENAI_API_KEY, SEARCH_R3_TOKEN.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from openai import OpenAI

SYSTEM = (
    "Answer from the documents that `search` finds, and from nothing else. Search again, with other words or for what "
    "is still missing, until you know. Name the ids of the documents behind your answer in square brackets; if they "
    "do not say it, say so."
)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "The best passages for a question or a description in plain words.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "k": {"type": "integer", "minimum": 1, "default": 5}},
            "required": ["query"],
        },
    },
}
ROUNDS = 8
"""How often the model may search before it has to answer."""
TIMEOUT = 300
"""Seconds for one search."""


def search(server: str, query: str, k: int = 5) -> str:
    """Passages as JSON for the model to read; so is what is wrong with its query, which it can mend."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('SEARCH_R3_TOKEN', '')}"}
    body = json.dumps({"query": query, "k": k}).encode()
    try:
        request = urllib.request.Request(f"{server}/v1/search", body, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            hits = json.load(response)["hits"]
    except urllib.error.HTTPError as error:
        if error.code not in (400, 413, 422):
            raise
        return json.dumps(json.load(error))
    return json.dumps([{name: hit[name] for name in ("id", "title", "text")} for hit in hits], ensure_ascii=False)


def answer(client: OpenAI, model: str, question: str, find: Callable[..., str]) -> str:
    """Let the model search until it answers."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    for turn in range(ROUNDS + 1):
        completion = client.chat.completions.create(
            model=model, messages=messages, tools=[TOOL], tool_choice="auto" if turn < ROUNDS else "none"
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            break
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            print(f"{call.function.name} {call.function.arguments}", file=sys.stderr)
            try:
                result = find(**json.loads(call.function.arguments))
            except (ValueError, TypeError) as error:  # the model wrote other arguments than the tool's
                result = json.dumps({"error": f"search takes query and k: {error}"})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return message.content or ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description="Answer a question from the documents of a search-r3 server.")
    parser.add_argument("question")
    parser.add_argument("--base-url", required=True, help="endpoint of the language model, e.g. http://host:8000/v1")
    parser.add_argument("--model", required=True, help="the language model")
    parser.add_argument("--server", default="http://127.0.0.1:8765", help="where search-r3 serve listens")
    options = parser.parse_args(arguments)
    client = OpenAI(base_url=options.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        print(answer(client, options.model, options.question, lambda query, k=5: search(options.server, query, k)))
    except urllib.error.URLError as error:
        raise SystemExit(f"cannot search at {options.server}: {error}; is search-r3 serve running there?") from error


if __name__ == "__main__":
    main()
