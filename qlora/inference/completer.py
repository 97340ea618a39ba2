"""From a request in OpenAI's form to its response, whole or streamed."""

import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from glm_shared.chat import ChatTokenizer, NoTools, Prompt, ToolPrompt
from qlora.arguments import LOWEST_TEMPERATURE, InferenceArguments
from qlora.inference.answer_text import AnswerText
from qlora.inference.batcher import Answer, Batcher, GenerationEnded
from qlora.inference.generation import check_prompt
from qlora.inference.openai_forms import ChatRequest, Completion, GenerationRequest, RequestError, token_counts
from qlora.inference.server_metrics import ServerMetrics
from qlora.inference.slots import Task

# The text so far, why the answer ended (None before), and the numbers of tokens.
Progress = AsyncGenerator[tuple[AnswerText, str | None, dict[str, int]]]


class Completer:
    """Answers the requests of all clients.

    Args:
        batcher: generates the answers.
        tokenizer: of the model.
        names: of the models: that of the base model, then those of the adapters.
        args: the text before every prompt, and what a request leaves open.
        metrics: counts requests and tokens.
    """

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: ChatTokenizer,
        names: list[str],
        args: InferenceArguments,
        metrics: ServerMetrics,
    ):
        self.batcher, self.tokenizer, self.names = batcher, tokenizer, names
        self.args, self.metrics, self.started = args.with_sampling(tokenizer.sampling), metrics, int(time.time())

    def task(self, form: GenerationRequest, prompt: Prompt | ToolPrompt) -> Task:
        """What to generate; RequestError for a model that is not served, or a prompt that cannot be answered."""
        if form.model not in self.names:
            message = f"there is no model {form.model}; this server has {', '.join(self.names)}."
            raise RequestError(404, message, "model", "model_not_found")
        capacity, asked = self.batcher.slots.capacity, form.most_tokens()
        try:
            prompt_ids = check_prompt(prompt, self.tokenizer, capacity, asked or 1, self.args.prompt_text)
        except NoTools as error:
            raise RequestError(400, f"{error}.", "tools") from None
        except ValueError as error:
            code = "context_length_exceeded" if prompt.query.strip() else None
            param = "messages" if isinstance(form, ChatRequest) else "prompt"
            raise RequestError(400, str(error), param, code) from None
        defaults, temperature = self.args.sampling(), form.temperature
        if temperature is None:
            temperature = defaults["temperature"] if self.args.do_sample else 0.0
        return Task(
            prompt_ids,
            asked or min(self.args.max_new_tokens, capacity - len(prompt_ids)),
            adapter=self.names.index(form.model) - 1,
            temperature=temperature if temperature >= LOWEST_TEMPERATURE else 0.0,
            top_p=form.top_p or defaults["top_p"],
            seed=secrets.randbits(63) if form.seed is None else form.seed,
        )

    async def respond(self, request: Request, form: GenerationRequest, prompt: Prompt | ToolPrompt) -> Response:
        """The response with a whole answer, or the stream of it."""
        answer = Answer(self.task(form, prompt))
        if not self.batcher.submit(answer):
            raise RequestError(429, "too many requests are waiting; try again later.", code="rate_limit_exceeded")
        completion = Completion(isinstance(form, ChatRequest), form.model)
        progress = self.follow(request, form, answer)
        if form.stream:
            include_usage = bool(form.stream_options and form.stream_options.include_usage)
            return StreamingResponse(events(progress, completion, include_usage), media_type="text/event-stream")
        async with contextlib.aclosing(progress):
            async for text, reason, usage in progress:
                if reason:
                    return JSONResponse(completion.whole(text.final(), text.call, reason, usage))
        return Response(status_code=499)  # nobody receives it

    async def follow(self, request: Request, form: GenerationRequest, answer: Answer) -> Progress:
        """Yields the growing text of an answer, why it ended (None before), and the numbers of tokens.

        Ends early, and the generation with it, when the client goes away.
        """
        text = AnswerText(self.tokenizer, form.stops(), form.tool_names())
        count, stop_token_ids = 0, self.batcher.stop_token_ids
        piece: list[int] = []
        with self.metrics.observe(form.model, len(answer.task.prompt_ids)) as observation:
            async with contextlib.aclosing(answer.tokens(stop_token_ids)) as pieces:
                async for piece in pieces:
                    if await request.is_disconnected():
                        return
                    for token in piece:
                        if not text.stopped:
                            text.add(token)
                            count += 1
                    observation.received(count)
                    if text.stopped:
                        break
                    yield text, None, token_counts(len(answer.task.prompt_ids), count)
            text.final()  # the last characters may complete a stop string
            has_ended = text.stopped or piece[-1] in stop_token_ids
            reason = "tool_calls" if text.call else "stop" if has_ended else "length"
            observation.outcome = reason
            yield text, reason, token_counts(len(answer.task.prompt_ids), count)


async def events(progress: Progress, completion: Completion, include_usage: bool) -> AsyncIterator[str]:
    """A streamed answer as server-sent events; the first comes with the first token, even if it shows no text yet."""
    shown, first = "", True
    try:
        async for text, reason, usage in progress:
            longer = text.final() if reason else text.shown()
            if first or len(longer) > len(shown):
                new = longer[len(shown) :]
                yield event(completion.piece(None if text.tools and not new else new, first=first))
                shown, first = longer, False
            if reason:
                if text.call:
                    yield event(completion.piece(None, call=text.call))
                yield event(completion.piece(None, reason))
                if include_usage:
                    yield event(completion.usage(usage))
        yield "data: [DONE]\n\n"
    except GenerationEnded as error:
        yield event(RequestError(error.status, str(error)).form())
    finally:
        await progress.aclose()


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
