"""The layout of the compare page, and its server. Needs gradio 6."""

import dataclasses
import hmac
import html
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import gradio as gr
from gradio.components import Component

from qlora.arguments import InferenceArguments
from qlora.inference.serve_checks import PASSWORD_VARIABLE
from qlora.inference.web import AFTER, BEFORE, Page
from qlora.inference.web_guard import LOCAL_HOSTS, MOST_TRIES, Readers, middleware

logger = logging.getLogger(__name__)

FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")  # fonts of the system
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important }
.bubble { width: fit-content; max-width: 80%; margin: 0.5em; padding: 0.5em 1em; border-radius: 0.8em }
.bubble.visitor { margin-left: auto; background: var(--color-accent-soft) }
.bubble.model { background: var(--background-fill-secondary) }
.bubble small { color: var(--body-text-color-subdued) }
.bubble .text { white-space: pre-wrap; overflow-wrap: anywhere }
.toast-title { display: none !important } /* gradio's, and in English */
"""
# gradio's page calls this function of the browser for its stream of updates: confirms each piece that was read.
CONFIRM = """
const original = window.fetch;
window.fetch = async (...request) => {
  const response = await original(...request);
  const stream = "/gradio_api/queue/data?", read = "/gradio_api/read?";
  if (!response.url.includes(stream)) return response;
  const confirm = new TransformStream({
    transform(piece, reader) {
      reader.enqueue(piece);
      original(response.url.replace(stream, read), { method: "POST" });
    },
  });
  return new Response(response.body.pipeThrough(confirm), response);
};
"""
LOGIN_NOTE = (
    f"用户名随意，但不能为空；输错 {MOST_TRIES} 次后须等一分钟。 "
    f"Any user name will do, but not an empty one; after {MOST_TRIES} wrong tries wait a minute."
)
FAILURE = "生成失败，原因见服务器的输出。 The answer failed; the server's output says why."


@dataclasses.dataclass
class Shown:
    """Whether the newest answer to a visitor was cleared from the page; gradio keeps one for each visitor."""

    cleared: bool = False


def serve(page: Page, examples: list[str]):
    """Serves the page until Ctrl-C.

    Args:
        page: the event handlers.
        examples: prompts that the page offers.
    """
    args, password = page.args, os.environ.get(PASSWORD_VARIABLE)
    if password is None and args.host not in LOCAL_HOSTS:
        logger.warning("Whoever can reach %s can use the page: %s sets a password.", args.host, PASSWORD_VARIABLE)
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # gradio would store prompts and answers in the visitor's browser
    os.environ["no_proxy"] = "*"  # gradio requests its own page at the start, which a proxy could not reach
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logger.info("The page is at http://%s:%d, until Ctrl-C.", args.host, args.port)
    readers = Readers()
    build_page(page, examples, readers).launch(
        server_name=args.host,
        server_port=args.port,
        auth=password and (lambda _, given: hmac.compare_digest(given.encode(), password.encode())),
        auth_message=LOGIN_NOTE,
        app_kwargs={"middleware": middleware(args.host, readers)},
        quiet=True,
        share=False,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(font=FONTS, font_mono=("monospace",)),
        css=CSS,
        head=f"<script>{CONFIRM}</script>",
    )


def build_page(page: Page, examples: list[str], readers: Readers) -> gr.Blocks:
    """The page: a tab to compare answers, one for a conversation, and below them the settings of both."""
    args, base_path = page.args, page.answerer.model.get_base_model().name_or_path
    with gr.Blocks(title="ChatGLM-6B QLoRA", analytics_enabled=False) as blocks:
        gr.HTML(
            "<h2>微调前后对比 Before and after fine-tuning</h2>"
            f"<p>基座模型 Base model: <code>{html.escape(base_path)}</code> · "
            f"adapter: <code>{html.escape(args.adapter_path[0])}</code></p>"
        )
        settings = setting_controls(args)
        with gr.Tab("对比 Compare"):
            compare_tab(page.compare, examples, settings, readers)
        with gr.Tab("对话 Chat"):
            chat_tab(page.chat, settings, readers)
        with gr.Accordion("解码设置 Decoding settings"), gr.Row():
            for control in settings:
                control.render()
    return blocks.queue(api_open=False)  # without it, a request could have an answer beside the queue


def setting_controls(args: InferenceArguments) -> list[Component]:
    """The controls of `SETTINGS`, not rendered yet: the buttons that send their values are rendered above them."""
    methods = [("贪心 Greedy", False), ("采样 Sampling", True)]
    return [
        gr.Radio(methods, value=args.do_sample, label="方式 Method", min_width=320, render=False),
        gr.Number(args.top_k, label="top_k", precision=0, render=False),
        gr.Number(args.top_p, label="top_p", step=0.05, render=False),
        gr.Number(args.temperature, label="温度 Temperature", step=0.05, render=False),
        gr.Number(args.max_new_tokens, label="最大长度 Max tokens", precision=0, render=False),
        gr.Number(args.seed, label="随机种子 Seed", precision=0, render=False),
    ]


def compare_tab(compare: Callable[..., Iterator], examples: list[str], settings: list[Component], readers: Readers):
    """The tab with a prompt, its answers without and with the adapter, and example prompts."""
    prompt = gr.Textbox(label="输入 Prompt", lines=2, max_lines=8, autofocus=True)
    with gr.Row():
        start, stop = gr.Button("生成 Generate", variant="primary"), gr.Button("停止 Stop")
    with gr.Row():
        answers = [
            gr.Textbox(label=label, lines=8, max_lines=24, min_width=320, interactive=False, buttons=["copy"])
            for label in (BEFORE, AFTER)
        ]
    offered = gr.Examples(examples, prompt, label="示例 Examples", examples_per_page=5)
    inputs, empty = [prompt, *settings], ["", ""]
    ask([start.click, prompt.submit], stop, offered.dataset.click, compare, inputs, answers, empty, readers)


def chat_tab(chat: Callable[..., Iterator], settings: list[Component], readers: Readers):
    """The tab with a conversation, with or without the adapter."""
    rounds = gr.State([])
    # gradio's Chatbot draws HTML, also images of other servers, and Markdown.
    conversation = gr.HTML(
        label="对话 Conversation", show_label=True, container=True, min_height=240, max_height=600, autoscroll=True
    )
    with gr.Row():
        message = gr.Textbox(label="消息 Message", scale=4)
        tuned = gr.Radio([(AFTER, True), (BEFORE, False)], value=True, label="模型 Model", min_width=320)
    with gr.Row():
        send, stop = gr.Button("发送 Send", variant="primary"), gr.Button("停止 Stop")
        clear = gr.Button("清空 Clear")
    inputs, outputs = [message, rounds, tuned, *settings], [message, rounds, conversation]
    empty: Sequence = (gr.skip(), [], "")  # what is typed stays
    ask([send.click, message.submit], stop, clear.click, chat, inputs, outputs, empty, readers)


def ask(
    triggers: list[Callable],
    stop: gr.Button,
    clear: Callable,
    function: Callable[..., Iterator],
    inputs: list,
    outputs: list,
    empty: Sequence,
    readers: Readers,
):
    """Connects buttons with a generator function.

    Args:
        triggers: events that start it; of all visitors' calls one runs at a time.
        stop: button that stops it.
        clear: event that stops it and empties the outputs.
        function: its ValueErrors are shown as notes; of other errors it is shown that there was one.
        inputs, outputs: components whose values it takes and yields.
        empty: values of the outputs without an answer.
        readers: end an answer that nobody reads.
    """

    shown = gr.State(Shown())

    def with_notes(request: gr.Request, shown: Shown, *values) -> Iterator:
        shown.cleared = False
        try:
            for update in readers.while_read(function(*values), request.session_hash):
                if shown.cleared:
                    return
                yield update
        except ValueError as error:
            gr.Warning(str(error))
            yield gr.skip()
        except Exception:
            logger.exception("An answer failed.")
            gr.Warning(FAILURE)
            yield gr.skip()

    def end_and_empty(shown: Shown) -> Sequence:
        shown.cleared = True
        return empty

    def empty_again(shown: Shown) -> Sequence:
        return empty if shown.cleared else [gr.skip()] * len(outputs)

    name = function.__name__
    asked = gr.on(
        triggers, with_notes, [shown, *inputs], outputs, api_name=name, concurrency_limit=1, concurrency_id="model"
    )
    stop.click(None, cancels=asked)
    # gradio's page cancels an answer after it has called `end_and_empty`. A piece that is sent in between fills the
    # outputs again, so that they are emptied once more when the page has shown the last piece.
    clear(end_and_empty, shown, outputs, cancels=asked)
    asked.then(empty_again, shown, outputs, show_progress="hidden", trigger_mode="always_last")
