"""Answer the same prompts with the base model and with the adapter.

python inference_qlora.py                                        # the adapter that `bash train.sh` leaves
python inference_qlora.py --prompt 类型#裤*风格#简约 --prompt 类型#裙*颜色#白色
python inference_qlora.py --prompt_file data/dev.jsonl --do_sample
python inference_qlora.py --chat                                 # a conversation with the tuned model
python inference_qlora.py --web                                  # a page for both in the browser
"""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora.arguments import DEFAULT_PROMPT, InferenceArguments
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt, set_up_logging

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizer

    from qlora.inference.decoding import Sampler

EXAMPLES = Path(__file__).parent / "data" / "dev.jsonl"


@one_line_on_interrupt()
def main():
    set_up_logging()
    with message_instead_of_traceback():
        args = parse_command_line(InferenceArguments)
    # Imported here: the libraries behind them take seconds to import, and a misspelt flag is answered before.
    import torch

    from qlora.checkpoint import check_checkpoint
    from qlora.inference.decoding import make_sampler
    from qlora.inference.web import Answerer, Page, check_web
    from qlora.layers.replacement import replace_layers
    from qlora.loading import (
        base_model_path,
        check_hardware,
        choose_compute_dtype,
        load_adapter,
        load_quantized_model,
        load_tokenizer,
    )

    with message_instead_of_traceback():
        base_path = args.model_name_or_path or base_model_path(args.adapter_path)
        prompts = read_all_prompts(args)[: args.max_prompts]
        if args.web:
            check_web(args)
        config, compute_dtype = check_checkpoint(base_path), choose_compute_dtype(args.compute_dtype)
        check_hardware(config, compute_dtype)
        tokenizer = load_tokenizer(base_path)
        model = load_quantized_model(base_path, compute_dtype, config)
        model = load_adapter(model, args.adapter_path).eval()
    replace_layers(model, for_training=False)
    torch.manual_seed(args.seed)
    sampler = make_sampler(args.do_sample, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.web:
        from qlora.inference.web_page import serve  # gradio is optional

        serve(Page(Answerer(model, tokenizer), args), prompts)
    elif args.chat:
        converse(model, tokenizer, args.prompt_text, args.max_new_tokens, sampler)
    else:
        prompts = [args.prompt_text + prompt for prompt in prompts]
        compare(model, tokenizer, prompts, args.max_new_tokens, sampler, args.batch_size)


def read_all_prompts(args: InferenceArguments) -> list[str]:
    """The prompts of `--prompt` and `--prompt_file`; without any, the default one, or for the page the sample rows."""
    from qlora.data.rows import read_prompts

    prompts = [*args.prompt, *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    return prompts or (read_prompts(str(EXAMPLES)) if args.web else [DEFAULT_PROMPT])


def compare(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizer",
    prompts: list[str],
    max_new_tokens: int,
    sampler: "Sampler",
    batch_size: int,
):
    """Prints each prompt with the answers before and after fine-tuning."""
    from qlora.inference.generation import generate_answers

    with model.disable_adapter():
        before = generate_answers(model, tokenizer, prompts, max_new_tokens, sampler, batch_size)
    after = generate_answers(model, tokenizer, prompts, max_new_tokens, sampler, batch_size)
    for prompt, base_answer, tuned_answer in zip(prompts, before, after, strict=True):
        print(f"\n输入 Input:  {prompt}\n微调前 Before: {base_answer}\n微调后 After:  {tuned_answer}")


def converse(
    model: "PeftModel", tokenizer: "PreTrainedTokenizer", prompt_text: str, max_new_tokens: int, sampler: "Sampler"
):
    """A conversation on the terminal; each reply is printed as it is generated."""
    from chatglm.chat import build_prompt
    from qlora.inference.generation import stream_answer

    print("清空历史 clear history: clear   结束 leave: exit")
    history = []
    while (query := ask()) not in ("exit", "quit", None):
        if query == "clear":
            history = []
        elif query:
            prompt, reply = prompt_text + build_prompt(query, history), ""
            for longer in stream_answer(model, tokenizer, prompt, max_new_tokens, sampler):
                # A mark that is printed already may become full-width with the next character; it is not reprinted.
                print(longer[len(reply) :], end="", flush=True)
                reply = longer
            print()
            history.append((query, reply))


def ask() -> str | None:
    """What the user types; None at the end of the input."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    main()
