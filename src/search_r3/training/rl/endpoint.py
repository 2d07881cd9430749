"""Rollouts from a server of OpenAI's completions that takes and returns token ids: vLLM (from 0.10.2 on), SGLang.

Prompts go out as token ids, and no text comes back into the training: what a tokenizer makes of a decoded reply need
not be what the model wrote. Each reply is a request of its own with its own seed; servers batch them, and compute a
prompt that several of them share once. Everything that a server could add by itself (its defaults come from the model's
`generation_config.json`: top-k, penalties) is set in the request: what is sampled from is the plain distribution.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from ...config import GRPOSettings
from ...data.writing.chat import error_words
from ...errors import ConfigError, RunError
from ...model.engine.decoding import DecodeRequest
from ...sections import SamplerSettings
from .sampler import PolicyWeights, RolloutSampler, SampledReply

logger = logging.getLogger(__name__)

BACKOFF_S = 1.0
"""Seconds before a request is sent again, doubled each time."""
CONNECT_S = 10.0
ADAPTER = "search-r3"
"""What the adapters are called at the server."""
PLAIN = {
    "n": 1,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Sampling from the plain distribution, whatever a server's own defaults are."""
RELOADS: dict[str, str] = {
    "vllm": "start it with VLLM_SERVER_DEV_MODE=1",
    "vllm_adapter": "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora",
    "sglang": "it has to serve a model of the same shape",
}
"""How a server is told of new weights -> what it needs for that."""


def find_sampler(settings: GRPOSettings, folder: Path, given: RolloutSampler | None) -> RolloutSampler | None:
    """The sampler that was given, or that of the settings, if there is any but the model itself.

    Raises:
        ConfigError: there are two, or the server cannot be used.
    """
    if settings.sampler.url is None:
        return given
    if given is not None:
        raise ConfigError(f"a sampler was given, and grpo.sampler.url={settings.sampler.url} names another; leave one")
    return EndpointSampler(settings.sampler, folder, settings.rollout_batch_size)


class EndpointSampler:
    """See `RolloutSampler`. The server's model has to be the one that is trained: start it with the stage-1 model.

    Args:
        settings: of the section `grpo.sampler`; its `url` is set.
        folder: where weights for the server are written, where the settings name no other.
        concurrency: requests at one time.

    Raises:
        ConfigError: the server cannot be reached, refuses the key, or has no model of this name.
    """

    def __init__(self, settings: SamplerSettings, folder: Path, concurrency: int) -> None:
        assert settings.url is not None
        address = settings.url.rstrip("/").removesuffix("/completions")
        self._url = f"{address}{'' if urlsplit(address).path else '/v1'}"
        self._root = self._url.removesuffix("/v1")
        self._settings, self._concurrency = settings, concurrency
        self._folder = Path(settings.folder or folder).absolute()
        self._key = os.environ.get(settings.api_key_variable, "")
        if not re.fullmatch(r"[!-~]*", self._key):
            raise ConfigError(
                f"the key in {settings.api_key_variable} holds a blank or a letter beyond ASCII; copy it anew"
            )
        # What huggingface_hub brings: httpx2, or httpx in its releases before 2.
        self._http: Any = import_module("httpx2" if find_spec("httpx2") else "httpx")
        self._ends: list[int] = []
        self._version = -1
        try:
            self._model = self._served_model()
        except RunError as error:
            raise ConfigError(f"grpo.sampler: {error}") from error
        if settings.reload == "none":
            logger.warning(
                "grpo.sampler.reload=none: %s goes on writing with the weights that it was started with, and rollouts "
                "grow stale (sampler_gap, importance_weight); let it reload them, or train a few steps only",
                self._url,
            )

    def sample(self, requests: Sequence[DecodeRequest]) -> list[SampledReply]:
        """See `RolloutSampler`.

        Raises:
            RunError: a request failed, retries included, or was answered with something else than ids.
        """
        with self._open() as client, ThreadPoolExecutor(max(1, min(self._concurrency, len(requests)))) as pool:
            futures = [pool.submit(self._reply, client, request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def update(self, weights: PolicyWeights) -> None:
        """See `RolloutSampler`.

        Raises:
            RunError: the weights cannot be written, or the server did not take them.
        """
        settings, first, backbone = self._settings, self._version < 0, weights.model.backbone
        self._ends = sorted({backbone.embed_token_id, *backbone.prompt_encoder.end_token_ids})
        if settings.reload == "none" or not (first or weights.version - self._version >= settings.reload_every):
            return
        # A folder of their own for these weights: servers keep in mind what they have read from one.
        folder = self._folder / f"weights-{weights.version:06d}"
        if settings.reload == "vllm_adapter":
            weights.save_adapters(folder)
            self._model = ADAPTER
        else:
            weights.save(folder)
        weights.in_first(lambda: self._tell(folder, weights.version), folder, "have the server load")
        self._version = weights.version

    def _tell(self, folder: Path, version: int) -> None:
        """Have the server load what a folder holds, and drop those that it has loaded before."""
        match self._settings.reload:
            case "vllm":
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self._reload("/collective_rpc", body)
                if self._reload("/reset_prefix_cache", {}).get("success") is False:
                    raise RunError(
                        f"{self._root}/reset_prefix_cache was refused, and prompts would keep states of old weights; "
                        "the server is to serve nobody else during a training"
                    )
            case "vllm_adapter":
                # Loading in place makes vLLM read the files again at each step; a name that is new to it does not.
                self._reload("/v1/unload_lora_adapter", {"lora_name": ADAPTER}, allowed=(404,))
                self._reload("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(folder)})
            case _:
                body = {"model_path": str(folder), "weight_version": str(version)}
                answer = self._reload("/update_weights_from_disk", body)
                if answer.get("success") is not True:
                    words = " ".join(str(answer.get("message", answer)).split())[:300]
                    raise RunError(f"{self._root}/update_weights_from_disk failed: {words}; {RELOADS['sglang']}")
        for path in self._folder.glob("weights-*"):
            if re.fullmatch(r"weights-\d{6,}", path.name) and path != folder:
                shutil.rmtree(path, ignore_errors=True)

    def _reload(self, path: str, body: Mapping[str, Any], allowed: Sequence[int] = ()) -> dict[str, Any]:
        try:
            with self._open() as client:
                response = client.post(f"{self._root}{path}", json=dict(body))
        except self._http.HTTPError as error:
            raise RunError(self._unreachable(f"{self._root}{path}", error)) from error
        if response.status_code != 200 and response.status_code not in allowed:
            raise RunError(
                f"{self._root}{path} answered HTTP {response.status_code} ({self._words(response)}); "
                f"{RELOADS[self._settings.reload]}, and let it see the folder {self._folder} (grpo.sampler.folder)"
            )
        try:
            answer = response.json()
        except ValueError:  # vLLM says some things in words
            answer = {}
        return answer if isinstance(answer, dict) else {}

    def _served_model(self) -> str:
        """The name under which the server has its model."""
        url = f"{self._url}/models"
        with self._open() as client:
            body = self._checked(url, lambda: client.get(url))
        try:
            names = [str(one["id"]) for one in body["data"]]
        except (KeyError, TypeError) as error:
            raise RunError(f"{url} gave no list of models; is this the address of a server of completions?") from error
        model = self._settings.model
        if model is None and len(names) == 1:
            return names[0]
        if model not in names:
            said = "names none" if model is None else f"is {model!r}"
            raise RunError(
                f"{self._url} has the models {', '.join(names) or '(none)'}, and sampler.model {said}; set it"
            )
        return model

    def _reply(self, client: Any, request: DecodeRequest) -> SampledReply:
        url = f"{self._url}/completions"
        body = {
            "model": self._model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop_token_ids": self._ends,
            "logprobs": 1,
            "return_token_ids": True,
            **PLAIN,
        }
        answer = self._checked(url, lambda: client.post(url, json=body))
        try:
            [choice] = answer["choices"]
            said, reason = choice.get("logprobs") or {}, choice.get("finish_reason")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{url} gave no completion: {str(answer)[:300]}") from error
        ids, logprobs = choice.get("token_ids"), said.get("token_logprobs")
        if not _are(ids, int) or not _are(logprobs, float | int):
            missing = "token ids" if not _are(ids, int) else "log-probabilities"
            raise RunError(
                f"{url} gave a completion without {missing}, and a text does not say which tokens were written; it has "
                "to know return_token_ids and logprobs (vLLM 0.10.2 and SGLang do)"
            )
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise RunError(
                f"{url} changed the prompt: {len(request.prompt_ids)} tokens were sent, and "
                f"{len(choice['prompt_token_ids'])} read; it must add none to prompts that are token ids"
            )
        if reason not in ("stop", "length"):
            raise RunError(f"{url} broke a reply off (finish_reason {reason!r}); look at the server's own messages")
        stop = choice.get("stop_reason", choice.get("matched_stop"))
        if len(logprobs) == len(ids) + 1 and stop in self._ends:
            ids = [*ids, stop]  # a server that keeps the token that ends a reply to itself
        return SampledReply(ids, logprobs)

    def _open(self) -> Any:
        limits = self._http.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        timeout = self._http.Timeout(self._settings.timeout, connect=min(CONNECT_S, self._settings.timeout))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return self._http.Client(headers=headers, timeout=timeout, limits=limits)

    def _checked(self, url: str, send: Callable[[], Any]) -> Any:
        """The JSON of an answer; requests that may do better later are sent again.

        Raises:
            RunError: there is none.
        """
        for attempt in range(self._settings.retries + 1):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                response = send()
            except self._http.HTTPError as error:
                fault = self._unreachable(url, error)
                cause: BaseException | None = error
                continue
            status, cause = response.status_code, None
            if status == 200:
                try:
                    return response.json()
                except ValueError as error:
                    raise RunError(f"{url} answered with something else than JSON: {response.text[:200]!r}") from error
            fault = f"{url} answered HTTP {status} ({self._words(response)}); {_remedy(status)}"
            if status not in (408, 429) and status < 500:
                break
        raise RunError(fault) from cause

    def _unreachable(self, url: str, error: BaseException) -> str:
        if isinstance(error, self._http.TimeoutException) and not isinstance(error, self._http.ConnectTimeout):
            return (
                f"{url} gave no answer within {self._settings.timeout:g} s; raise grpo.sampler.timeout, or lower "
                "grpo.rollout_batch_size"
            )
        return f"{url} cannot be reached ({type(error).__name__}); start the server, or mend grpo.sampler.url"

    def _words(self, response: Any) -> str:
        words = " ".join(error_words(response).split())[:300]
        return words.replace(self._key, "***") if self._key else words


def _are(values: object, kind: Any) -> TypeGuard[list[Any]]:
    """Whether something is a list of such numbers."""
    return isinstance(values, list) and bool(values) and all(isinstance(one, kind) for one in values)


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "put its key into the environment variable that grpo.sampler.api_key_variable names"
    if status == 404:
        return "mend grpo.sampler.url and grpo.sampler.model"
    if status in (400, 413, 422):
        return (
            "it has to take prompts of token ids, stop_token_ids and logprobs, and to have room for max_length + "
            "max_new_tokens"
        )
    return "look at the server's own messages; then go on with --resume"
