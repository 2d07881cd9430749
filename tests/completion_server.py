"""A server of completions on this machine that writes with a real (tiny) model and speaks as vLLM or as SGLang does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from search_r3.model.backbone import Backbone
from search_r3.model.engine.decoding import _uniforms
from search_r3.model.engine.sampling import Sampling, choose_tokens
from search_r3.model.loading import load_backbone
from search_r3.training.rl import endpoint
from tests.local_http import local_server

Kind = Literal["vllm", "sglang"]
Answer = tuple[int, Any]


class CompletionServer:
    """`answer` may change what is said: it gets path, body and the regular answer."""

    def __init__(self, model: Path, kind: Kind) -> None:
        self.kind, self.backbone = kind, load_backbone(model)
        self.names = {"trained": self.backbone}
        self.answer: Callable[[str, dict[str, Any], Answer], Answer] = lambda path, body, regular: regular
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.http, self.url, self.thread = local_server(
            lambda asked: self.serve(asked, json.loads(asked.rfile.read(int(asked.headers["Content-Length"])))),
            lambda asked: self.serve(asked, {}),
        )

    def bodies(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        return [body for asked, body in self.calls if asked == path]

    def serve(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            self.calls.append((request.path, body))
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            regular = self.regular(request.path, body)
        status, content = self.answer(request.path, body, regular)
        text = content if isinstance(content, str) else json.dumps(content)
        request.send_response(status)
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())

    def fault(self, status: int, message: str, kind: str, param: str | None = None) -> Answer:
        said = {"message": message, "type": kind, "param": param, "code": status}
        return status, {"error": said} if self.kind == "vllm" else {"object": "error", **said}

    def regular(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/models":
            owner = "vllm" if self.kind == "vllm" else "sglang"
            return 200, {
                "object": "list",
                "data": [{"id": n, "object": "model", "owned_by": owner} for n in self.names],
            }
        if path == "/v1/completions":
            return self.complete(body)
        if self.kind == "sglang" and path == "/update_weights_from_disk":
            self.names["trained"] = load_backbone(body["model_path"])
            done = "Succeeded to update model weights."
            return 200, {"success": True, "message": done, "num_paused_requests": 0}
        if self.kind == "vllm" and path == "/collective_rpc":
            assert body["method"] == "reload_weights" and list(body["kwargs"]) == ["weights_path"]
            self.names["trained"] = load_backbone(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if self.kind == "vllm" and path == "/reset_prefix_cache":
            return 200, {"success": True}
        if self.kind == "vllm" and path == "/v1/unload_lora_adapter":
            if self.names.pop(body["lora_name"], None) is None:
                return self.fault(404, f"The lora adapter '{body['lora_name']}' cannot be found.", "NotFoundError")
            return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
        if self.kind == "vllm" and path == "/v1/load_lora_adapter":
            name = body["lora_name"]
            if name in self.names:
                return self.fault(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
            self.names[name] = adapted(self.backbone, Path(body["lora_path"]))
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> Answer:
        if body["model"] not in self.names:
            return self.fault(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        assert all(isinstance(token, int) for token in body["prompt"]), "a prompt of ids"
        backbone, prompt, draws = self.names[body["model"]], body["prompt"], _uniforms(body["seed"], body["max_tokens"])
        sampling = Sampling.of([body["temperature"]], [body["top_p"]], backbone.device)
        written, logprobs, stop = list[int](), list[float](), None
        with torch.no_grad():
            for draw in draws:
                hidden = backbone.hidden_states(torch.tensor([prompt + written]), None)
                at = torch.tensor([draw], dtype=torch.float64)
                tokens, values = choose_tokens(backbone.logits(hidden[:, -1]), sampling, at)
                written.append(tokens.item())
                logprobs.append(values.item())
                if written[-1] in body["stop_token_ids"]:
                    stop = written[-1]
                    break
        tokens = [backbone.tokenizer.convert_ids_to_tokens(one) for one in written]
        tops = [{name: value} for name, value in zip(tokens, logprobs, strict=True)]
        said = {"text_offset": [0] * len(tokens), "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}
        choice = {
            "index": 0,
            "text": backbone.tokenizer.decode(written, skip_special_tokens=True),
            "logprobs": said if body.get("logprobs") is not None else None,
            "finish_reason": "length" if stop is None else "stop",
            "stop_reason" if self.kind == "vllm" else "matched_stop": stop,
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": written, "prompt_token_ids": prompt}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(written)}
        answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        answer |= {"choices": [choice], "usage": usage | {"total_tokens": sum(usage.values())}}
        extra = {"kv_transfer_params": None} if self.kind == "vllm" else {"metadata": {"weight_version": "default"}}
        return 200, answer | extra


def adapted(backbone: Backbone, folder: Path) -> Backbone:
    """The base with adapters, which may hold LoRA matrices alone."""
    import peft
    from safetensors.torch import load_file

    unknown = [name for name in load_file(folder / "adapter_model.safetensors") if "lora_" not in name]
    assert not unknown, f"{unknown} is unsupported LoRA weight"
    fresh = load_backbone(backbone.source)
    fresh.model = peft.PeftModel.from_pretrained(fresh.model, str(folder))
    return fresh


@contextmanager
def running(model: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind = "vllm") -> Iterator[CompletionServer]:
    """No proxy is asked for it, and nothing waits before it is asked again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.0)
    server = CompletionServer(model, kind)
    server.thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.thread.join()
        server.http.server_close()
