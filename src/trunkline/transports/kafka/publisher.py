"""Publishing to Kafka: confirmed means written by all replicas that are in step.

Invariant: the future of a batch ends after the broker has answered for each of its messages, with what failed.
A thread waits for the answers; one wake-up of the loop for all that came together. Read next: settings.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from trunkline import wire
from trunkline.channel import Stream
from trunkline.clock import WorkerThread
from trunkline.errors import PublishError, TransportError, TrunklineError
from trunkline.message import partition_of
from trunkline.transport import Staged
from trunkline.transports.kafka.settings import MAX_MESSAGE_BYTES, ClusterState, Settings, client_log, describe, failure
from trunkline.transports.kafka.stranded import Stranded

log = logging.getLogger("trunkline.kafka")

POLL_S = 0.2
"""How long the thread waits for answers before it looks whether it is to end."""
HEADERS: list[tuple[str, str | bytes | None]] = [("content-type", wire.CONTENT_TYPE.encode())]
"""Source: CloudEvents Kafka protocol binding 1.0.2 §3.3."""
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_IN_VAIN = {
    KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT,  # noqa: SLF001
}  # fmt: skip
_REFUSED = {
    *_TOO_LARGE, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    KafkaError.INVALID_MSG, KafkaError.INVALID_RECORD, KafkaError.POLICY_VIOLATION,
}  # fmt: skip


class _Sending:
    """A batch on its way.

    Attributes:
        left: messages that the broker has not answered for.
        failed: number of a message → why.
        down: how often the cluster had been reached again when it was handed over while it was not reached, else -1.
        producer: who sends it.
    """

    __slots__ = ("_answered", "batch", "down", "failed", "future", "left", "producer")

    def __init__(
        self, batch: Sequence[Staged], future: asyncio.Future[None], answered: Callable[[_Sending], None], down: int
    ) -> None:
        self.batch = batch
        self.future = future
        self.left = len(batch)
        self.failed: dict[int, KafkaError] = {}
        self.down = down
        self.producer: Producer | None = None
        self._answered = answered

    def answer(self, error: KafkaError | None, _record: Message) -> None:
        """Note the answer for the only message; in the thread."""
        if error is not None:
            self.failed[0] = error
        self._answered(self)

    def answer_one(self, number: int, error: KafkaError | None, _record: Message | None) -> None:
        """Note the answer for one message of several; in the thread."""
        if error is not None:
            self.failed[number] = error
        self._answered(self)


class Publisher:
    """Sends the messages of one App."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topics: dict[str, str] = {}
        self._answers: deque[_Sending] = deque()
        self._left = 0
        self._state = ClusterState(settings, "publishing")
        self._stopping = False
        self._line = asyncio.Lock()
        self._waiting = 0
        self._room: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._threads: list[tuple[WorkerThread, asyncio.Future[None]]] = []
        self._producer: Producer | None = None

    def start(self) -> None:
        """Begin; the producer connects by itself."""
        self._loop = asyncio.get_running_loop()
        self._begin()

    def _begin(self) -> None:
        stranded = Stranded()
        configured = self._settings.producer(self._state.note, stranded.note)
        self._producer = producer = Producer(configured, logger=client_log)
        ended: asyncio.Future[None] = self._loop.create_future()
        thread = WorkerThread("trunkline-kafka-publisher")
        thread.submit(partial(self._wait_for_answers, producer, stranded), partial(_end, ended))
        self._threads.append((thread, ended))

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Send `batch`; see Transport."""
        if self._waiting:
            return self._send_when_room(batch, None, 0)
        future = self._loop.create_future()
        sending = _Sending(batch, future, self._answers.append, self._state.times_up if self._state.is_down else -1)
        if not batch:
            future.set_result(None)
        handed = self._hand_over(sending, 0)
        return future if handed == len(batch) else self._send_when_room(batch, sending, handed)

    def _hand_over(self, sending: _Sending, start: int) -> int:
        """Give messages from number `start` on to the client; return how many of the batch it has now."""
        producer = self._producer
        if producer is None:
            raise TransportError(
                "E520",
                f"{self._settings.shown}: publishing after the stop",
                "publish before",
                unsent=list(sending.batch),
            )
        sending.producer = producer
        batch, topics, several = sending.batch, self._topics, len(sending.batch) > 1
        for number in range(start, len(batch)):
            staged = batch[number]
            channel, message = staged.channel, staged.message
            key = message.partitionkey
            topic = topics.get(channel.name) or self._topic(channel.name)
            place = -1
            if isinstance(channel, Stream):
                place = partition_of(message, channel.partitions)
            answer = partial(sending.answer_one, number) if several else sending.answer
            try:
                producer.produce(topic, wire.encode(message), key, place, answer, headers=HEADERS)
            except BufferError:
                return number
            except KafkaException as error:
                sending.answer_one(number, error.args[0], None)
                self._loop.call_soon(self._resolve)
            self._left += 1
        return len(batch)

    def _topic(self, channel: str) -> str:
        topic = self._topics[channel] = self._settings.topic(channel)
        return topic

    async def _send_when_room(self, batch: Sequence[Staged], sending: _Sending | None, start: int) -> None:
        """Wait in line until the client's buffer has room for the rest of `batch`."""
        self._waiting += 1
        try:
            if sending is None:
                sending = _Sending(batch, self._loop.create_future(), self._answers.append, -1)
            async with self._line:
                while (start := self._hand_over(sending, start)) < len(batch):
                    self._room = self._loop.create_future()
                    await self._room
        finally:
            self._waiting -= 1
        await sending.future

    # --- answers ---

    def _wait_for_answers(self, producer: Producer, stranded: Stranded) -> None:
        """Collect answers until the producer is done with; in the thread."""
        asked = False
        while not self._stopping and producer is self._producer:
            if producer.poll(POLL_S):
                self._loop.call_soon_threadsafe(self._resolve)
            if stranded and not asked:
                asked = True
                self._loop.call_soon_threadsafe(self._begin_anew, producer)
        producer.flush(0 if self._stopping or stranded else self._settings.timeout_s)
        producer.purge()
        producer.flush(POLL_S)
        self._loop.call_soon_threadsafe(self._resolve)

    def _begin_anew(self, stranded: Producer) -> None:
        """Send with a new producer: this one asks nobody any more, what it has is not confirmed; see stranded.py."""
        if stranded is self._producer:
            log.warning("publishing: the client has lost every broker of %s, it is made anew", self._settings.shown)
            self._begin()

    def _resolve(self) -> None:
        answers = self._answers
        count = len(answers)
        good = False
        for _ in range(count):
            sending = answers.popleft()
            sending.left -= 1
            if sending.left:
                continue
            future = sending.future
            if not sending.failed:
                good = True
                if not future.done():
                    future.set_result(None)
            else:
                self._fail(sending)
        self._left -= count
        if good:
            self._state.works()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if not self._left:
            self._idle.set()

    def _fail(self, sending: _Sending) -> None:
        """End a batch with what was wrong with its first message that failed."""
        first = min(sending.failed)
        unsent = [sending.batch[number] for number in sorted(sending.failed)]
        never_up = self._state.is_down and sending.down == self._state.times_up
        error = self._error(sending.failed[first], sending.batch[first], unsent, never_up=never_up)
        if sending.failed[first].fatal() and sending.producer is self._producer:
            log.error("%s: the producer is made anew: %s", self._settings.shown, describe(sending.failed[first]))
            self._begin()
        if not sending.future.done():
            sending.future.set_exception(error)

    def _error(self, error: KafkaError, staged: Staged, unsent: list[Staged], *, never_up: bool) -> TrunklineError:
        shown, name = self._settings.shown, staged.channel.name
        code = error.code()
        if code in _TOO_LARGE:
            return PublishError(
                "E313", f"message {staged.message.id} for {name!r} is too large for {shown}: {error.str()}",
                f"at most {MAX_MESSAGE_BYTES} bytes, or what max.message.bytes of the topic allows", unsent=unsent,
            )  # fmt: skip
        if code in _REFUSED:
            return PublishError(
                "E313", f"message {staged.message.id} for {name!r} was refused by {shown}: {describe(error)}",
                "the channel must be declared at start of this or another App", unsent=unsent,
            )  # fmt: skip
        if code in _IN_VAIN and never_up:
            return TransportError(
                "E520", f"{shown} was not reached within {self._settings.timeout_s:g} s",
                "check that the broker runs; nothing was sent", unsent=unsent,
            )  # fmt: skip
        if code in _IN_VAIN:
            return TransportError(
                "E521", f"{shown} did not confirm message {staged.message.id} for {name!r}: {describe(error)}",
                "it may have been stored or not; publish it again under the same id", unsent=unsent,
            )  # fmt: skip
        wrong = failure(error, shown, f"publishing to {name!r}")
        wrong.fields["unsent"] = unsent
        return wrong

    # --- end ---

    async def stop(self) -> None:
        """Wait for what is under way, then end; what is not confirmed by then fails with E521."""
        if self._producer is None:
            return
        self._idle.clear()
        try:
            async with asyncio.timeout(0 if self._state.is_down else self._settings.timeout_s):
                if self._left:
                    await self._idle.wait()
        except TimeoutError:
            log.warning("%s: %d messages were not confirmed at stop", self._settings.shown, self._left)
        self._stopping = True
        self._producer = None
        for thread, ended in self._threads:
            await ended
            thread.stop()
        self._threads.clear()


def _end(future: asyncio.Future[None], error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
