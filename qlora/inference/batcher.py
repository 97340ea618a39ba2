"""The queue of requests, and the thread that generates their answers in the slots of a batch."""

import asyncio
import collections
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from qlora.inference.slots import Slots, Task

logger = logging.getLogger(__name__)

MOST_WAITING = 1024  # requests


class Ending(NamedTuple):
    """Why no more tokens will come, and the HTTP status that says so."""

    reason: str
    status: int


FAILED = Ending("the generation failed; the log of the server says why", 500)
STOPPED = Ending("the server was stopped", 503)


class GenerationEnded(Exception):
    """The thread that generates has ended before the answer."""

    def __init__(self, ending: Ending):
        super().__init__(ending.reason)
        self.status = ending.status


class Answer:
    """The tokens of an answer, for the event loop in which it was made.

    Args:
        task: what to answer.
    """

    def __init__(self, task: Task):
        self.task, self.cancelled, self.count = task, False, 0
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[list[int] | Ending] = asyncio.Queue()

    def deliver(self, tokens: list[int] | Ending):
        """Hands new tokens over from the thread that generates them, or why there are none."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, tokens)

    async def tokens(self, stop_token_ids: Sequence[int]) -> AsyncGenerator[list[int]]:
        """Yields the new tokens, a few at a time; when it is closed before the end, the generation ends, too.

        Raises:
            GenerationEnded: no more tokens will come.
        """
        received = 0
        try:
            while True:
                piece = await self.pieces.get()
                if isinstance(piece, Ending):
                    raise GenerationEnded(piece)
                yield piece
                received += len(piece)
                if received >= self.task.max_new_tokens or piece[-1] in stop_token_ids:
                    return
        finally:
            self.cancelled = True


class Batcher:
    """Generates answers in a thread, in the order of their requests, as many at a time as there are slots.

    Args:
        slots: of the model.
        stop_token_ids: the tokens that end an answer.
    """

    def __init__(self, slots: Slots, stop_token_ids: Sequence[int]):
        self.slots, self.stop_token_ids = slots, stop_token_ids
        self.waiting: collections.deque[Answer] = collections.deque()
        self.running: dict[int, Answer] = {}  # by slot
        self.changed = threading.Condition()  # guards `waiting` and `stopped`
        self.stopped = False
        self.ending: Ending | None = None  # set by the thread at its end
        self.thread = threading.Thread(target=self.run, name="generation", daemon=True)

    def submit(self, answer: Answer) -> bool:
        """Puts a request into the queue; False if the queue is full.

        Raises:
            GenerationEnded: the thread has ended.
        """
        with self.changed:
            if self.ending:
                raise GenerationEnded(self.ending)
            if len(self.waiting) >= MOST_WAITING:
                return False
            self.waiting.append(answer)
            self.changed.notify()
        return True

    def stop(self):
        """Ends the thread after the present step, and all requests with it."""
        with self.changed:
            self.stopped = True
            self.changed.notify()

    def run(self):
        """Begins waiting answers, generates a few tokens of each, and frees the slots of those that ended."""
        try:
            while self.has_work():
                tasks = self.next_tasks()
                if tasks:
                    tokens = self.slots.begin(tasks)
                    self.deliver({slot: [token] for slot, token in zip(tasks, tokens, strict=True)})
                if self.running:
                    self.deliver(dict(enumerate(self.slots.generate(highest_slot=max(self.running)))))
            self.end_all(STOPPED)
        except Exception:
            logger.exception("The generation failed.")
            self.end_all(FAILED)

    def has_work(self) -> bool:
        """Waits for a request if there is none; False when the thread is to end."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.running or self.stopped)
            return not self.stopped

    def next_tasks(self) -> dict[int, Task]:
        """Takes as many requests from the queue as have free slots, and as fit into one batch of prompts.

        A batch of prompts has no more tokens, with padding, than the longest prompt could have alone: this bounds its
        memory, and how long the running answers pause.
        """
        free = [slot for slot in range(self.slots.count) if slot not in self.running]
        begun: dict[int, Answer] = {}
        with self.changed:
            while self.waiting and free:
                if self.waiting[0].cancelled:
                    self.waiting.popleft()
                    continue
                lengths = [len(answer.task.prompt_ids) for answer in (*begun.values(), self.waiting[0])]
                if begun and len(lengths) * max(lengths) > self.slots.capacity:
                    break
                begun[free.pop(0)] = self.waiting.popleft()
            self.running |= begun
        return {slot: answer.task for slot, answer in begun.items()}

    def deliver(self, tokens: dict[int, list[int]]):
        """Hands new tokens, by slot, over to their requests, and ends answers that are complete or cancelled."""
        for slot, answer in list(self.running.items()):
            if slot not in tokens:
                continue
            piece = tokens[slot][: answer.task.max_new_tokens - answer.count]
            ends = [place for place, token in enumerate(piece, 1) if token in self.stop_token_ids]
            piece = piece[: ends[0]] if ends else piece
            answer.count += len(piece)
            answer.deliver(piece)
            is_complete = bool(ends) or answer.count >= answer.task.max_new_tokens
            if is_complete or answer.cancelled:
                del self.running[slot]
                self.slots.end(slot)

    def end_all(self, ending: Ending):
        """Ends all requests."""
        with self.changed:
            self.ending = ending
            for answer in (*self.running.values(), *self.waiting):
                answer.deliver(ending)
            self.running.clear()
            self.waiting.clear()
