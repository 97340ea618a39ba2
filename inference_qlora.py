"""Answer the same prompts with the base model and with the adapter.

python inference_qlora.py                                        # the adapter that `bash train.sh` leaves
python inference_qlora.py --prompt 类型#裤*风格#简约 --prompt 类型#裙*颜色#白色
python inference_qlora.py --prompt_file data/dev.jsonl --do_sample
python inference_qlora.py --chat                                 # a conversation with the tuned model
python inference_qlora.py --web                                  # a page for both in the browser
"""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizer

from chatglm.chat import build_prompt
from qlora.arguments import DEFAULT_PROMPT, InferenceArguments, choose_compute_dtype, parse_command_line
from qlora.data.rows import read_prompts
from qlora.errors import message_instead_of_traceback
from qlora.inference.decoding import Sampler, make_sampler, use_inference_kernels
from qlora.inference.generation import generate_answers, stream_answer
from qlora.inference.web import Answerer, Page, check_web
from qlora.loading import adapter_config, load_adapter, load_quantized_model, load_tokenizer

EXAMPLES = Path(__file__).parent / "data" / "dev.jsonl"


def main():
    with message_instead_of_traceback():
        args = parse_command_line(InferenceArguments)
        base_path = args.model_name_or_path or adapter_config(args.adapter_path).base_model_name_or_path
        prompts = prompts_of(args)[: args.max_prompts]
        if args.web:
            check_web(args)
        compute_dtype = choose_compute_dtype(args.compute_dtype, {})
        tokenizer = load_tokenizer(base_path)
        model = load_adapter(load_quantized_model(base_path, compute_dtype), args.adapter_path).eval()
    use_inference_kernels(model)
    torch.manual_seed(args.seed)
    sampler = make_sampler(args.do_sample, args.top_p, args.temperature)
    if args.web:
        from qlora.inference.web_page import serve  # gradio is optional

        serve(Page(Answerer(model, tokenizer), args), prompts)
    elif args.chat:
        converse(model, tokenizer, args.prompt_text, args.max_new_tokens, sampler)
    else:
        prompts = [args.prompt_text + prompt for prompt in prompts]
        compare(model, tokenizer, prompts, args.max_new_tokens, sampler, args.batch_size)


def prompts_of(args: InferenceArguments) -> list[str]:
    """The prompts that were given; without any, the default one, or for the page the sample data's."""
    if args.prompt_file:
        return read_prompts(args.prompt_file)
    return args.prompt or (read_prompts(str(EXAMPLES)) if args.web else [DEFAULT_PROMPT])


def compare(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
):
    """Prints each prompt with the answers before and after fine-tuning."""
    with model.disable_adapter():
        before = generate_answers(model, tokenizer, prompts, max_new_tokens, sampler, batch_size)
    after = generate_answers(model, tokenizer, prompts, max_new_tokens, sampler, batch_size)
    for prompt, base_answer, tuned_answer in zip(prompts, before, after, strict=True):
        print(f"\n输入 Input:  {prompt}\n微调前 Before: {base_answer}\n微调后 After:  {tuned_answer}")


def converse(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizer, prompt_text: str, max_new_tokens: int, sampler: Sampler
):
    """A conversation on the terminal, the reply shown as it comes."""
    print("清空历史 clear history: clear   结束 leave: exit")
    history = []
    while (query := ask()) not in ("exit", "quit", None):
        if query == "clear":
            history = []
        elif query:
            prompt, reply = prompt_text + build_prompt(query, history), ""
            for longer in stream_answer(model, tokenizer, prompt, max_new_tokens, sampler):
                # Punctuation on the screen may still change its width with the next character: never mind it.
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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
