"""Measure the speed and memory of training, decoding and loading, each with the code that users run.

    python scripts/benchmark.py --what train  --model_name_or_path THUDM/chatglm-6b --data_path data/train.jsonl
    python scripts/benchmark.py --what train  ... --memory_budget 4.6GiB          # the memory plan of a smaller GPU
    python scripts/benchmark.py --what train  ... --samples_per_step 128
    python scripts/benchmark.py --what train  ... --compute_dtype fp8
    python scripts/benchmark.py --what train  ... --compare_plain                 # the plain path, too
    python scripts/benchmark.py --what decode ... --data_path data/dev.jsonl
    python scripts/benchmark.py --what load   ...
    python scripts/benchmark.py --what serve  ... --data_path data/dev.jsonl --batch_size 128
    python scripts/benchmark.py --what train  ... --throttle_host                 # one core, shared with a busy loop
    python scripts/benchmark.py --what train  ... --record docs/benchmarks.jsonl  # for the tables in the documentation

Training runs `train_qlora.py` with the shipped JSON except for the number of steps, the samples of a step and logging,
and without checkpoints and evaluations. Tokens are those of the samples, without padding. The last line of the output
is one JSON object. Without the official weights, use those of scripts/make_random_checkpoint.py, of the same size.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from qlora.arguments import DEFAULT_MODEL, TRAINING_DTYPE_FLAG, DownloadArguments, in_repository
from qlora.benchmark.api_client import ask_all, running_server
from qlora.benchmark.host import BusyShare, throttled_host
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt
from qlora.units import GIB

with one_line_on_interrupt():  # these imports take seconds
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, BatchEncoding

    from glm_shared.chat import ChatTokenizer, Prompt
    from qlora.adapter import add_lora
    from qlora.atomic import append_lines
    from qlora.benchmark.arithmetic import flops_per_token, matmul_rate
    from qlora.benchmark.records import code_hash, machine
    from qlora.data.rows import read_rows
    from qlora.hub.fetch import fetch_model
    from qlora.inference.decoding import decode, make_sampler
    from qlora.layers.replacement import replace_layers
    from qlora.loading import choose_compute_dtype, load_quantized_model, load_tokenizer

WARM_UP = 40  # training steps that are not measured: in these, rows of nearly all sizes have been seen
BATCHES = (1, 32)  # prompts that are answered at a time
CLIENTS = (1, 8, 32, 128)  # of the server, at a time


@dataclass
class BenchmarkArguments(DownloadArguments):
    """What to measure, on what."""

    what: str = field(metadata={"help": "What to measure.", "choices": ["train", "decode", "load", "serve"]})
    model_name_or_path: str = field(
        default_factory=lambda: in_repository(DEFAULT_MODEL), metadata={"help": "Folder with the weights."}
    )
    data_path: str = field(
        default_factory=lambda: in_repository("data/train.jsonl"), metadata={"help": "Rows to train on or to answer."}
    )
    steps: int = field(default=60, metadata={"help": "Training steps to count, after the warm-up."})
    samples_per_step: int = field(default=32, metadata={"help": "Effective batch; 32 is that of the shipped JSON."})
    memory_budget: str | None = field(default=None, metadata={"help": "GPU memory to plan for, such as 4.6GiB."})
    compute_dtype: str | None = field(default=None, metadata=TRAINING_DTYPE_FLAG | {"expert": False})
    compare_plain: bool = field(default=False, metadata={"help": "Train the plain way too, for a few steps."})
    batch_size: int = field(default=256, metadata={"help": "Prompts answered at once."})
    requests_per_client: int = field(default=4, metadata={"help": "Requests of each client of the server."})
    answer_tokens: int = field(default=64, metadata={"help": "Most tokens of each answer of the server."})
    throttle_host: bool = field(default=False, metadata={"help": "Use one core only, which a busy loop uses as well."})
    record: str | None = field(default=None, metadata={"help": "File of JSON lines to which the result is added."})

    def __post_init__(self):
        if self.samples_per_step < 4 or self.samples_per_step % 4:
            raise ValueError(f"--samples_per_step is {self.samples_per_step}; the shipped JSON takes 4 at a time.")
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}; it must be at least 1.")

    @property
    def name(self) -> str:
        """What was measured, by the flags that make a difference to the figures."""
        name = self.what
        if self.memory_budget:
            name += f" --memory_budget {self.memory_budget}"
        if self.samples_per_step != 32:
            name += f" --samples_per_step {self.samples_per_step}"
        if self.compute_dtype:
            name += f" --compute_dtype {self.compute_dtype}"
        return name + " --throttle_host" * self.throttle_host


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(BenchmarkArguments)
        fetch_model(args.model_name_or_path, args)
    measures = {
        "train": measure_training,
        "decode": measure_decoding,
        "load": measure_loading,
        "serve": measure_serving,
    }
    with throttled_host() if args.throttle_host else contextlib.nullcontext():
        result = measures[args.what](args)
    model = AutoConfig.from_pretrained(args.model_name_or_path).display_name
    name = args.name if model == "ChatGLM-6B" else f"{model} {args.name}"
    record = {"name": name, "date": time.strftime("%Y-%m-%d"), "code": code_hash(), **result, **machine()}
    if args.record:
        append_lines(Path(args.record), [record])
    print(json.dumps(record))


def measure_training(args: BenchmarkArguments) -> dict:
    """Tokens per second and peak memory of train_qlora.py; on a GPU also its fraction of the measured matmul rate."""
    measured_rate = matmul_rate() if torch.cuda.is_available() else None
    result = train(args, args.steps, [])
    if measured_rate:
        flops = flops_per_token(args.model_name_or_path, args.data_path) * result["tokens_per_second"]
        result |= {"matmul_tflops": round(measured_rate / 1e12), "mfu": round(flops / measured_rate, 3)}
    if args.compare_plain:
        plain = train(args, 5, ["--plain"], warm_up=2)
        ratio = round(result["tokens_per_second"] / plain["tokens_per_second"], 1)
        result |= {"plain": plain, "times_plain": ratio}
    return result


def train(args: BenchmarkArguments, steps: int, flags: list[str], warm_up: int = WARM_UP) -> dict:
    """Runs train_qlora.py once.

    Args:
        args: of the benchmark.
        steps: number of measured steps.
        flags: more flags of train_qlora.py.
        warm_up: number of steps before them.
    Returns:
        Figures from the log of the run, without the warm-up.
    """
    settings = json.loads(Path(in_repository("chatGLM_6B_QLoRA.json")).read_text())
    settings["gradient_accumulation_steps"] = args.samples_per_step // settings["per_device_train_batch_size"]
    settings |= {"max_steps": warm_up + steps, "logging_steps": math.gcd(warm_up, steps), "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as scratch:
        settings |= {"output_dir": scratch, "report_to": "none", "disable_tqdm": True}
        path = Path(scratch) / "settings.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, in_repository("train_qlora.py"), "--train_args_json", path, *flags]
        command += ["--train_data_path", args.data_path, "--eval_data_path", "none"]
        command += ["--model_name_or_path", args.model_name_or_path]
        if args.memory_budget and "--plain" not in flags:
            command += ["--memory_budget", args.memory_budget]
        if args.compute_dtype and "--plain" not in flags:
            command += ["--compute_dtype", args.compute_dtype]
        with BusyShare() if torch.cuda.is_available() else contextlib.nullcontext() as busy:
            started = time.monotonic()
            output, logged = run_training(command)
            seconds = time.monotonic() - started
        log = json.loads((Path(scratch) / "trainer_state.json").read_text())["log_history"]
    counted = [entry for entry in log if "loss" in entry and entry["step"] > warm_up]
    predicted = re.search(r"predicted peak memory +([\d.]+)", output)
    return {
        "tokens_per_second": round(sum(entry["tokens_per_second"] for entry in counted) / len(counted)),
        "peak_memory_gib": max(entry.get("peak_memory_gib", 0.0) for entry in counted),
        "predicted_memory_gib": float(predicted.group(1)) if predicted else None,
        "gpu_busy": busy.between(logged[warm_up // settings["logging_steps"] - 1], logged[-1]) if busy else None,
        "samples_per_step": args.samples_per_step,
        "seconds_until_training": round(seconds - log[-1]["train_runtime"], 1),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
    }


def run_training(command: list) -> tuple[str, list[float]]:
    """Runs train_qlora.py; its output, which is shown too, and the moments at which it logged a loss."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines, logged = [], []
    for line in run.stdout:
        lines.append(line)
        print(line, end="", file=sys.stderr)
        if "'loss': " in line:
            logged.append(time.monotonic())
    if run.wait():
        raise SystemExit("error: train_qlora.py failed, see above.")
    return "".join(lines), logged


def measure_decoding(args: BenchmarkArguments) -> dict:
    """Tokens per second of greedy answers with an adapter, for 1 and 32 prompts and for all prompts in batches."""
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_quantized_model(args.model_name_or_path, choose_compute_dtype(None))
    model = add_lora(model, 4, 32, 0.0, ["query_key_value"]).eval()
    rows = list(read_rows(args.data_path))
    prompts = [Prompt(query) for query in sorted((row["query"] for row in rows), key=len)]
    answer_tokens = round(sum(len(tokenizer.build_answer_ids(row["answer"])) for row in rows) / len(rows))
    transformers_rate = generate_rate(model, tokenizer, prompts[len(prompts) // 2], 64)
    replace_layers(model, for_training=False)
    rates = {f"tokens_per_second_batch_{n}": answer_rate(model, tokenizer, prompts, n, 512) for n in BATCHES}
    answer(model, tokenizer, prompts[: args.batch_size], 32)
    batches = [prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size)]
    batches_seconds = timed(lambda: [answer(model, tokenizer, batch, answer_tokens) for batch in batches])
    return {
        **rates,
        "tokens_per_second_batch_1_transformers": round(transformers_rate, 1),
        "prompts": len(prompts),
        "tokens_per_answer": answer_tokens,
        "seconds_for_all_prompts": round(batches_seconds, 1),
        "tokens_per_second_all_prompts": round(len(prompts) * answer_tokens / batches_seconds),
        "batch_size": args.batch_size,
    }


def batch_of(tokenizer: ChatTokenizer, prompts: list[Prompt], device: torch.device) -> BatchEncoding:
    """The ids of prompts, and their attention mask, padded on the left."""
    ids = [prompt.ids(tokenizer) for prompt in prompts]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)


def answer(model, tokenizer: ChatTokenizer, prompts: list[Prompt], tokens: int):
    """Generates answers of exactly `tokens` tokens: those that end an answer are excluded."""
    batch = batch_of(tokenizer, prompts, model.device)
    greedy = make_sampler(False)
    # On the device: the sampler is a part of a CUDA graph.
    stop_token_ids = torch.tensor(tokenizer.stop_token_ids, device=model.device)

    def sampler(logits: torch.Tensor) -> torch.Tensor:
        return greedy(logits.index_fill(1, stop_token_ids, float("-inf")))

    for _ in decode(model.get_base_model(), **batch, max_new_tokens=tokens, sampler=sampler):
        pass


def answer_rate(model, tokenizer: ChatTokenizer, prompts: list[Prompt], most_prompts: int, tokens: int) -> int:
    """Tokens per second of answers of `tokens` tokens to prompts of medium length, all at a time."""
    batch = prompts[len(prompts) // 2 :][:most_prompts]
    answer(model, tokenizer, batch, 32)  # warms up
    return round(len(batch) * tokens / timed(lambda: answer(model, tokenizer, batch, tokens)))


def generate_rate(model, tokenizer: ChatTokenizer, prompt: Prompt, tokens: int) -> float:
    """Tokens per second of transformers' `generate` with the layers of peft and bitsandbytes."""
    batch = batch_of(tokenizer, [prompt], model.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(**batch, **options | {"max_new_tokens": 4, "min_new_tokens": 4})
    return tokens / timed(lambda: model.generate(**batch, **options))


def measure_loading(args: BenchmarkArguments) -> dict:
    """Seconds to load and quantize the model on the GPU, and its memory."""
    seconds = timed(lambda: load_quantized_model(args.model_name_or_path, choose_compute_dtype(None)))
    return {
        "seconds": round(seconds, 1),
        "allocated_gib": round(torch.cuda.memory_allocated() / GIB, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }


def measure_serving(args: BenchmarkArguments) -> dict:
    """Rates and times to the first token of `inference_qlora.py --serve`, with 1 to 128 clients at a time.

    Every client asks again as soon as it has its answer. Answers are greedy, with an adapter, and end by themselves or
    after `answer_tokens`. Beside them, the rates of the same model without a server, a prompt at a time.
    """
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_quantized_model(args.model_name_or_path, choose_compute_dtype(None))
    model = add_lora(model, 4, 32, 0.0, ["query_key_value"]).eval()
    prompts = [row["query"] for row in read_rows(args.data_path)]
    with tempfile.TemporaryDirectory() as scratch:
        adapter = f"{scratch}/adapter"
        model.save_pretrained(adapter)
        replace_layers(model, for_training=False)
        result = {"one_by_one": one_by_one(model, tokenizer, prompts[:8], args.answer_tokens)}
        del model
        torch.cuda.empty_cache()
        flags = ["--adapter_path", adapter, "--model_name_or_path", args.model_name_or_path]
        with running_server(*flags, "--batch_size", str(args.batch_size)) as address:
            ask_all(address, prompts, 8, 1, 8)  # warms up
            for clients in CLIENTS:
                figures = ask_all(address, prompts, clients, args.requests_per_client, args.answer_tokens)
                result[f"clients_{clients}"] = figures
            metrics = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    slots = int(float(re.search(r"^chatglm_slots (\S+)$", metrics, re.M).group(1)))
    return {"slots": slots, "answer_tokens": args.answer_tokens, **result}


def one_by_one(model: PeftModel, tokenizer: ChatTokenizer, prompts: list[str], most_tokens: int) -> dict:
    """Rates of answers one by one, without a server."""

    def count_tokens_of_answer(prompt: str) -> int:
        batch, stops = batch_of(tokenizer, [Prompt(prompt)], model.device), tokenizer.stop_token_ids
        options = {"max_new_tokens": most_tokens, "sampler": make_sampler(False), "stop_token_ids": stops}
        tokens = torch.cat(list(decode(model.get_base_model(), **batch, **options)), dim=1)[0].tolist()
        return next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))

    count_tokens_of_answer(prompts[0])  # warms up
    counts: list[int] = []
    seconds = timed(lambda: counts.extend(map(count_tokens_of_answer, prompts)))
    return {"requests_per_second": round(len(prompts) / seconds, 2), "tokens_per_second": round(sum(counts) / seconds)}


def timed(work) -> float:
    """Seconds that `work()` takes, until the GPU has completed it."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
