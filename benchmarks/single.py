"""One query at a time on a CPU: ours, ours through llama.cpp, llama.cpp alone, and transformers' `generate`.

    pip install search-r3[benchmarks,llamacpp]
    python benchmarks/single.py SmolLM2-135M-Instruct Qwen2.5-0.5B-Instruct --out runs/bench/single.json    # an hour
    python benchmarks/single.py --quick                                                               # a few minutes

Models are folders, GGUF files or names, as `SearchR3` takes them. Each is written once as a folder that has the embed
token and once as a GGUF file by our export, and all contenders load one of the two: the same weights. They get the same
prompts and write the same number of tokens, the likeliest ones, to the end of which the embed token is put; an end of
the turn is a token like any other here, so that no reply ends early. Then its state is the vector:

- `ours/DTYPE`: `encode_query` in that precision; float16 is packed (docs/laptop.md).
- `backend`: the same with `backend="llama.cpp"`.
- `llama.cpp`: its own C functions through the binding, nothing of ours. It keeps what prompts begin with, as its server
  does, and reads the vector in the decoding step of the embed token.
- `generate/DTYPE`: transformers' own, and a forward pass over the whole for the vector.

Each contender is a process of its own. They take turns in rounds, every other round backwards, after a warm-up each;
those who wait sleep. Of each round p50 and p95 over the queries count, and of these the medians over the rounds, in
milliseconds. `cpu` is the same in CPU time of the process, which says more where others share the machine. `peak` is
the most resident memory the process ever had, loading included, `resident` what it has in the end, in MB. `cosine` is
the least and the mean over the queries with the first of --contenders; replies may differ where near ties tip,
`same_replies` is the share of those that do not. Who cannot be measured is named in `absent`, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, machine, make_model, need, peak_memory, say, versions

MODES = ("direct", "reason")
CONTENDERS = ("ours/float32", "ours/float16", "backend", "llama.cpp", "generate/float32", "generate/bfloat16")
QUERIES = (
    "what do people pay with in Tashkent?",
    "capital of France",
    "Which river flows through Vienna, Budapest and Belgrade?",
    "Who was the first woman to win a Nobel Prize, and in what field?",
    "side effects of taking ibuprofen with aspirin",
    "how do plants get their food?",
    "why does the sea rise and fall twice a day",
    "which language do they speak in the country whose currency is the som and whose capital is on the river Chirchiq",
    "python: read a csv file without its header",
    "In what year was the first paper mill of Nuremberg built, and what did it cost?",
    "difference between a lease and a licence when one rents a room to a lodger in one's own house",
    "best time to prune apple trees",
)


class Ours:
    """`SearchR3`, in a precision or through llama.cpp."""

    def __init__(self, job: dict[str, Any], **options: Any) -> None:
        from search_r3 import SearchR3

        self.model = SearchR3(max_new_tokens=job["tokens"] + 1, **options)
        # An end of the turn is a token like any other: all write equally many.
        self.model.backbone.prompt_encoder.end_token_ids = frozenset()
        self.queries = job["queries"]

    def __call__(self, mode: str, place: int) -> tuple[Any, str]:
        """The vector, and the reply's text."""
        result = self.model.encode_query(self.queries[place], mode)
        return result.vectors[0], result.reasoning[0]


class LlamaAlone:
    """llama.cpp's own functions; the embed token's state is read in the step that takes it in."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self.lib, self.job = llama_cpp, job
        self.model = llama_cpp.Llama(
            job["gguf"],
            n_ctx=1024,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE,
            verbose=False,
        )
        self.context = self.model.ctx
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        self.known: list[int] = []  # what the context holds

    def __call__(self, mode: str, place: int) -> tuple[Any, str]:
        """As `Ours`."""
        prompt = self.job["prompts"][mode][place]
        same = next((i for i, (a, b) in enumerate(zip(prompt, self.known, strict=False)) if a != b), len(self.known))
        kept = min(same, len(prompt) - 1, self.job["beginnings"][mode])
        self.lib.llama_memory_seq_rm(self.memory, 0, kept, -1)
        self.known, reply = prompt, []
        if mode == "direct":
            self.decode(prompt[kept:-1])
        else:
            self.decode(prompt[kept:])
            for _ in range(self.job["tokens"]):
                reply.append(self.lib.llama_sampler_sample(self.sampler, self.context, -1))
                self.decode(reply[-1:])
        # Where states are wanted llama.cpp computes the logits of a whole batch, so the embed token has one of its own.
        self.lib.llama_set_embeddings(self.context, True)
        self.decode([self.job["embed_token_id"]])
        self.lib.llama_set_embeddings(self.context, False)
        state = self.lib.llama_get_embeddings_ith(self.context, -1)
        vector = np.array(state[: self.job["dimension"]], dtype=np.float32)
        text = self.model.detokenize(reply).decode(errors="replace").strip() if reply else ""
        return vector / np.linalg.norm(vector), text

    def decode(self, ids: Sequence[int]) -> None:
        """Take tokens in; only the last of them has an output."""
        array = (self.lib.llama_token * len(ids))(*ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")


class Generate:
    """`generate` for the reply, then a forward pass over all of it."""

    def __init__(self, job: dict[str, Any], dtype: str) -> None:
        import torch
        import transformers

        self.torch, self.job = torch, job
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).eval()
        self.options = transformers.GenerationConfig(
            max_new_tokens=job["tokens"], do_sample=False, eos_token_id=None, pad_token_id=self.tokenizer.pad_token_id
        )

    def __call__(self, mode: str, place: int) -> tuple[Any, str]:
        """As `Ours`."""
        torch = self.torch
        with torch.inference_mode():
            ids, reply = torch.tensor([self.job["prompts"][mode][place]]), ""
            if mode == "reason":
                start = ids.shape[1]
                ids = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=self.options)
                reply = self.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
                ids = torch.cat([ids, torch.tensor([[self.job["embed_token_id"]]])], dim=1)
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            return torch.nn.functional.normalize(hidden.float(), dim=-1).numpy(), reply


def contender(name: str, job: dict[str, Any]) -> Any:
    kind, _, dtype = name.partition("/")
    if kind == "ours":
        return Ours(job, model=job["folder"], device="cpu", dtype=dtype)
    if kind == "backend":
        return Ours(job, model=job["gguf"], backend="llama.cpp")
    return LlamaAlone(job) if kind == "llama.cpp" else Generate(job, dtype)


def work(name: str) -> None:
    """A contender's process: a job on the first line of stdin, then a line per round, each answered by one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    job = json.loads(sys.stdin.readline())
    quiet(job["threads"])

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        ask = contender(name, job)
        results = {mode: [ask(mode, place) for place in range(len(job["queries"]))] for mode in MODES}  # the warm-up
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"[:300]})
        return
    answer({"results": {mode: [(vector.tolist(), text) for vector, text in results[mode]] for mode in MODES}})
    for mode in map(str.strip, sys.stdin):
        if mode == "memory":
            answer({"peak": peak_memory() / 1e6, "resident": resident() / 1e6})
            continue
        spent = []
        for place in range(len(job["queries"])):
            started = time.perf_counter(), time.process_time()
            ask(mode, place)
            spent.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        answer(spent)


def quiet(threads: int) -> None:
    """No downloads, no progress bars, as many threads as asked for."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1"}
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)


def resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


class Worker:
    """The process of a contender."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--worker", name]
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.first = self.ask(json.dumps(job))

    def ask(self, line: str) -> Any:
        """Send a line and read one."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def prepare(source: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The job of all contenders: a folder and a GGUF file of one model, the prompts and what else they need to know."""
    from search_r3 import SearchR3

    folder, gguf = scratch / "model", scratch / "model.gguf"
    model = SearchR3(source, device="cpu")
    model.save_pretrained(folder, dtype="float16")
    model = SearchR3(folder, device="cpu")  # all have the numbers of the file
    backbone, queries = model.backbone, list(QUERIES[: options.queries])
    why = None
    try:
        from search_r3.model.llamacpp.writing import export_gguf

        export_gguf(backbone, gguf, options.gguf_type)
    except Exception as error:  # the other contenders are measured all the same
        why = f"{type(error).__name__}: {error}"[:300]
    encoder = backbone.prompt_encoder
    return {
        "folder": str(folder),
        "gguf": str(gguf),
        "no_gguf": why,
        "queries": queries,
        "prompts": {mode: [prompt.ids for prompt in encoder.encode_batch(queries, mode)] for mode in MODES},
        "beginnings": {mode: len(encoder.frame(mode)[0]) for mode in MODES},
        "embed_token_id": backbone.embed_token_id,
        "dimension": backbone.dimension,
        "tokens": options.tokens,
    }


def rounds(workers: dict[str, Worker], count: int) -> dict[str, dict[str, list[Any]]]:
    """By contender and mode, what each round took: pairs of seconds and of CPU seconds per query."""
    spent: dict[str, dict[str, list[Any]]] = {name: {mode: [] for mode in MODES} for name in workers}
    for number in range(count):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            for mode in MODES:
                spent[name][mode].append(workers[name].ask(mode))
        say(f"round {number + 1}/{count}")
    return spent


def summary(taken: list[Any]) -> dict[str, float]:
    """Milliseconds, from the seconds and CPU seconds of each query in each round."""
    values = np.array(taken) * 1000  # rounds x queries x 2
    found = {}
    for share in (50, 95):
        wall, cpu = np.median(np.percentile(values, share, axis=1), axis=0)
        found |= {f"p{share}": round(float(wall), 2), f"cpu_p{share}": round(float(cpu), 2)}
    return found


def likeness(results: Any, truth: Any) -> dict[str, Any]:
    found = {}
    for mode in MODES:
        pairs = list(zip(results[mode], truth[mode], strict=True))
        cosines = [float(np.dot(one[0], other[0])) for one, other in pairs]
        found[mode] = {"least": min(cosines), "mean": float(np.mean(cosines))}
    same = [one[1] == other[1] for one, other in pairs]
    return {"cosine": found, "same_replies": float(np.mean(same))}


def measure(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One model with one number of threads."""
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    try:
        for name in options.contenders:
            if name in ("backend", "llama.cpp") and job["no_gguf"]:
                absent[name] = f"no GGUF file ({job['no_gguf']})"
                continue
            worker = workers[name] = Worker(name, job)
            if "error" in worker.first:
                absent[name] = worker.first["error"]
                workers.pop(name).close()
        for name, reason in absent.items():
            say(f"{name} is absent: {reason}")
        spent = rounds(workers, options.runs)
        if not workers:
            sys.exit("no contender is left")
        truth = next(iter(workers.values())).first["results"]
        found = {
            name: {
                **{mode: summary(spent[name][mode]) for mode in MODES},
                "memory": worker.ask("memory"),
                **likeness(worker.first["results"], truth),
            }
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()
    return {"contenders": found, "absent": absent, "ratios": ratios(found), "spent": spent}


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Each contender's time by that of llama.cpp alone, in both modes."""
    if "llama.cpp" not in found:
        return {}
    base = found["llama.cpp"]
    return {
        name: {
            f"{mode}_{share}": one[mode][share] / base[mode][share] for mode in MODES for share in ("p50", "cpu_p50")
        }
        for name, one in found.items()
        if name != "llama.cpp"
    }


def tell(found: dict[str, Any]) -> None:
    for name, one in found["contenders"].items():
        modes = ", ".join(f"{mode} {one[mode]['p50']:.0f} (p95 {one[mode]['p95']:.0f}) ms" for mode in MODES)
        say(f"{name:18} {modes}, peak {one['memory']['peak']:.0f} MB, cosine {one['cosine']['reason']['mean']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders, GGUF files or names")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, help="also ours/bfloat16, generate/float16")
    parser.add_argument("--gguf-type", default="f16", help="of the GGUF file's weights, as search-r3 export names it")
    parser.add_argument("--tokens", type=int, default=24, help="of reasoning, the embed token left out")
    parser.add_argument("--queries", type=int, default=len(QUERIES))
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, few queries, two rounds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    need("torch", "transformers", "psutil")
    quiet(max(options.threads))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            from common import Shape

            options.models = [make_model(Path(scratch) / "tiny", QUERIES * 20, Shape(2, 128), 600, 1024)]
            options.threads, options.queries, options.runs, options.tokens = [1], 3, 2, 6
        if not options.models:
            parser.error("give a model, or --quick")
        for number, source in enumerate(options.models):
            job = prepare(str(source), Path(scratch) / str(number), options)
            for threads in options.threads:
                say(f"{source}, {threads} threads")
                found.setdefault(str(source), {})[str(threads)] = measure({**job, "threads": threads}, options)
                tell(found[str(source)][str(threads)])
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "models", "worker")}
    record = {"benchmark": "single", "unit": "milliseconds per query, one at a time", "models": found}
    finish({**record, "settings": {**settings, **versions("torch", "transformers")}, "machine": machine()}, options.out)


if __name__ == "__main__":
    main()
