"""Answer the same prompts with the base model and with the adapter.

python inference_qlora.py                                        # the adapter that `bash train.sh` leaves
python inference_qlora.py --prompt 类型#裤*风格#简约 --prompt 类型#裙*颜色#白色
python inference_qlora.py --prompt_file data/dev.jsonl --do_sample --output answers.jsonl
python inference_qlora.py --chat                                 # a conversation with the tuned model
python inference_qlora.py --web                                  # a page for both in the browser
python inference_qlora.py --serve                                # OpenAI's API for both
python inference_qlora.py --adapter_path none --model_name_or_path THUDM/chatglm-6b-merged   # one model alone
"""

import contextlib
import io
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.arguments import DEFAULT_MODEL, DEFAULT_PROMPT, InferenceArguments, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt, set_up_logging
from qlora.startup import quick_imports

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from glm_shared.chat import ChatTokenizer, Prompt
    from glm_shared.description import ModelDescription
    from qlora.inference.decoding import Sampler

EXAMPLES = Path(__file__).parent / "data" / "dev.jsonl"
LABELS = {"prompt": "输入 Input: ", "base": "微调前 Before:", "adapter": "微调后 After: ", "answer": "回答 Answer:"}


@one_line_on_interrupt()
def main():
    set_up_logging()
    with message_instead_of_traceback():
        args = parse_command_line(InferenceArguments)
    # Imported here: the libraries behind them take seconds to import, and a misspelt flag is answered before.
    with quick_imports():
        import torch

        from qlora.adapter import base_model_path, load_adapters, read_adapter
        from qlora.checkpoint import check_checkpoint
        from qlora.hub.fetch import fetch_model
        from qlora.inference.decoding import make_sampler
        from qlora.inference.serve_checks import check_serve, check_web
        from qlora.inference.web import Answerer, Page
        from qlora.layers.replacement import replace_layers
        from qlora.loading import (
            advice_if_out_of_memory,
            check_hardware,
            choose_compute_dtype,
            load_quantized_model,
            load_tokenizer,
        )

    with message_instead_of_traceback():
        base_path = args.model_name_or_path or in_repository(DEFAULT_MODEL)
        for path in args.adapter_path:
            read_adapter(path)  # a mistake in it is reported before anything is loaded
        if args.adapter_path:
            base_path = args.model_name_or_path or base_model_path(args.adapter_path[0])
        prompts = read_all_prompts(args)
        check_output(args.output)
        if args.web:
            check_web(args)
        elif args.serve:
            check_serve(args)
        fetch_model(base_path, args)
        config, compute_dtype = check_checkpoint(base_path), choose_compute_dtype(args.compute_dtype)
        check_hardware(config, compute_dtype)
        tokenizer = load_tokenizer(base_path)
        args = args.with_sampling(tokenizer.sampling)
        if not (args.chat or args.web or args.serve):
            check_prompts(prompts, tokenizer, config, args)
        model = load_adapters(load_quantized_model(base_path, compute_dtype, config), args.adapter_path)
    replace_layers(model.eval(), for_training=False)
    torch.manual_seed(args.seed)
    sampler = make_sampler(**args.sampling())
    if args.web:
        from qlora.inference.web_page import serve  # gradio is optional

        serve(Page(Answerer(model, tokenizer), args), [prompt.query for prompt in prompts.values()])
    elif args.serve:
        from qlora.inference.server import serve  # fastapi is optional

        with message_instead_of_traceback():
            serve(model, tokenizer, args)
    elif args.chat:
        with advice_if_out_of_memory("hold a shorter conversation, or lower --max_new_tokens"):
            converse(model, tokenizer, sampler, args)
    else:
        advice = "lower --batch_size or --max_new_tokens"
        with message_instead_of_traceback(OSError), advice_if_out_of_memory(advice):
            answer(model, tokenizer, list(prompts.values()), sampler, args)


def read_all_prompts(args: InferenceArguments) -> "dict[str, Prompt]":
    """Where each prompt stands -> the prompt: those of `--prompt` and `--prompt_file`, at most `--max_prompts`.

    Without any, the default one, or for the page the sample rows.
    """
    from glm_shared.chat import Prompt
    from qlora.data.rows import read_prompts

    prompts = {f"--prompt, number {number}": Prompt(text) for number, text in enumerate(args.prompt, 1)}
    if args.prompt_file:
        prompts |= read_prompts(args.prompt_file)
    if not prompts:
        prompts = read_prompts(str(EXAMPLES)) if args.web else {"the default prompt": Prompt(DEFAULT_PROMPT)}
    return dict(itertools.islice(prompts.items(), args.max_prompts))


def check_output(path: str | None):
    """ValueError for an output file that exists, or whose folder does not."""
    if path and Path(path).exists():
        raise ValueError(f"--output: {path} exists; give the name of a new file.")
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"--output: there is no folder {Path(path).parent}; make it, or name another one.")


def check_prompts(
    prompts: "dict[str, Prompt]", tokenizer: "ChatTokenizer", config: "ModelDescription", args: InferenceArguments
):
    """ValueError with its place for the first prompt that cannot be answered."""
    from qlora.inference.generation import check_prompt

    for place, prompt in prompts.items():
        try:
            check_prompt(prompt, tokenizer, config.max_position_embeddings, args.max_new_tokens, args.prompt_text)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def answer(
    model: "PeftModel | PreTrainedModel",
    tokenizer: "ChatTokenizer",
    prompts: "list[Prompt]",
    sampler: "Sampler",
    args: InferenceArguments,
):
    """Prints, and keeps in `--output`, each prompt with its answers as soon as these are finished."""
    from qlora.atomic import append_lines
    from qlora.inference.generation import compare_answers

    options = (args.max_new_tokens, sampler, args.batch_size, args.prompt_text)
    rows = compare_answers(model, tokenizer, prompts, *options)
    output = Path(args.output) if args.output else None
    if output:
        output.touch(exist_ok=False)
    try:
        for row in rows:
            print("", *(f"{LABELS[name]} {text}" for name, text in row.items()), sep="\n", flush=True)
            if output:
                append_lines(output, [row])
    except KeyboardInterrupt:
        kept = f"; the finished answers are in {output}" if output else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    finally:
        if output and output.stat().st_size == 0:
            output.unlink()


def converse(
    model: "PeftModel | PreTrainedModel",
    tokenizer: "ChatTokenizer",
    sampler: "Sampler",
    args: InferenceArguments,
):
    """A conversation on the terminal; each reply is printed as it is generated."""
    from glm_shared.chat import Prompt
    from qlora.inference.generation import check_prompt, stream_answer

    print("停止回答 stop the answer: Ctrl-C   清空历史 clear history: clear   结束 leave: exit")
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no UTF-8 is refused with the prompt
        sys.stdin.reconfigure(errors="surrogateescape")
    history = []
    while (query := ask()) not in ("exit", "quit", None):
        if query == "clear":
            history = []
        elif query:
            prompt, reply, limit = Prompt(query, history), "", model.config.max_position_embeddings
            try:
                check_prompt(prompt, tokenizer, limit, args.max_new_tokens, args.prompt_text)
            except ValueError as error:
                print(error)
                continue
            with contextlib.suppress(KeyboardInterrupt):  # it ends the answer alone
                for longer in stream_answer(model, tokenizer, prompt, args.max_new_tokens, sampler, args.prompt_text):
                    # A mark that is printed already may become full-width with the next character; it stays as it is.
                    print(longer[len(reply) :], end="", flush=True)
                    reply = longer
            print()
            if reply:
                history.append((query, reply))


def ask() -> str | None:
    """What the user types; None at the end of the input."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    main()
