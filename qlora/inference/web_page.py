"""The layout of the compare page, and its server. Needs gradio 6."""

import hmac
import logging
import os
from collections.abc import Callable, Iterator

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from qlora.arguments import InferenceArguments
from qlora.inference.web import PASSWORD_VARIABLE, Page

logger = logging.getLogger(__name__)

BEFORE, AFTER = "微调前 Before", "微调后 After"
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")  # fonts of the system
CSS = ".gradio-container { max-width: 1200px !important; margin: 0 auto !important }"
LOCAL_HOSTS = ("127.0.0.1", "localhost")


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
    build_page(page, examples).launch(
        server_name=args.host,
        server_port=args.port,
        auth=password and (lambda _, given: hmac.compare_digest(given.encode(), password.encode())),
        auth_message="用户名随意。 Any user name will do.",
        quiet=True,
        share=False,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(font=FONTS, font_mono=("monospace",)),
        css=CSS,
    )


def build_page(page: Page, examples: list[str]) -> gr.Blocks:
    """The page: a tab to compare answers, one for a conversation, and below them the settings of both."""
    args, base_path = page.args, page.answerer.model.get_base_model().name_or_path
    with gr.Blocks(title="ChatGLM-6B QLoRA", analytics_enabled=False) as blocks:
        gr.Markdown(
            "## 微调前后对比 Before and after fine-tuning\n"
            f"基座模型 Base model: `{base_path}` · adapter: `{args.adapter_path}`"
        )
        settings = setting_controls(args)
        with gr.Tab("对比 Compare"):
            compare_tab(page.compare, examples, settings)
        with gr.Tab("对话 Chat"):
            chat_tab(page.chat, settings)
        with gr.Accordion("解码设置 Decoding settings"), gr.Row():
            for control in settings:
                control.render()
    return blocks


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


def compare_tab(compare: Callable[..., Iterator], examples: list[str], settings: list[Component]):
    """The tab with a prompt, its answers without and with the adapter, and example prompts."""
    prompt = gr.Textbox(label="输入 Prompt", lines=2, max_lines=8, autofocus=True)
    with gr.Row():
        start, stop = gr.Button("生成 Generate", variant="primary"), gr.Button("停止 Stop")
    with gr.Row():
        answers = [
            gr.Textbox(label=label, lines=8, max_lines=24, min_width=320, interactive=False, buttons=["copy"])
            for label in (BEFORE, AFTER)
        ]
    gr.Examples(examples, prompt, label="示例 Examples", examples_per_page=5)
    ask([start.click, prompt.submit], stop, compare, [prompt, *settings], answers)


def chat_tab(chat: Callable[..., Iterator], settings: list[Component]):
    """The tab with a conversation, with or without the adapter."""
    history = gr.State([])
    # Prompts of product attributes contain # and *, which are not Markdown.
    conversation = gr.Chatbot(label="对话 Conversation", render_markdown=False, buttons=["copy_all"])
    with gr.Row():
        message = gr.Textbox(label="消息 Message", scale=4)
        tuned = gr.Radio([(AFTER, True), (BEFORE, False)], value=True, label="模型 Model", min_width=320)
    with gr.Row():
        send, stop = gr.Button("发送 Send", variant="primary"), gr.Button("停止 Stop")
        clear = gr.Button("清空 Clear")
    inputs, outputs = [message, history, tuned, *settings], [message, history, conversation]
    asked = ask([send.click, message.submit], stop, chat, inputs, outputs)
    gr.on([clear.click, conversation.clear], lambda: ([], []), None, [history, conversation], cancels=asked)


def ask(
    triggers: list[Callable], stop: gr.Button, function: Callable[..., Iterator], inputs: list, outputs: list
) -> Dependency:
    """Connects buttons with a generator function.

    Args:
        triggers: events that start it; of all visitors' calls one runs at a time.
        stop: button that stops it.
        function: its ValueErrors are shown as warnings.
        inputs, outputs: components whose values it takes and yields.
    Returns:
        The event, by which another can cancel it.
    """

    def with_notes(*values) -> Iterator:
        try:
            yield from function(*values)
        except ValueError as error:
            gr.Warning(str(error))
            yield gr.skip()

    name = function.__name__
    asked = gr.on(triggers, with_notes, inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="model")
    stop.click(None, cancels=asked)
    return asked
