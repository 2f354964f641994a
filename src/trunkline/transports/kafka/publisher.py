"""Publishing to Kafka: confirmed means written by all replicas that are in step.

Invariant: the future of a batch ends after the broker has answered for each of its messages, with what failed; what has
no place in the log is not confirmed, whatever the client says.
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
from trunkline.channel import Channel, Stream
from trunkline.clock import WorkerThread
from trunkline.errors import PublishError, TransportError, TrunklineError
from trunkline.message import partition_of
from trunkline.transport import Staged
from trunkline.transports.kafka.settings import (
    BATCH_BYTES,
    GONE,
    MAX_MESSAGE_BYTES,
    ClusterState,
    Settings,
    SignIn,
    client_log,
    describe,
    failure,
)
from trunkline.transports.kafka.stranded import Stranded

log = logging.getLogger("trunkline.kafka")
Answer = Callable[[KafkaError | None, Message], None]

LOOK_S = 5.0
"""How long a look for a topic waits for the answer."""
POLL_S = 0.2
"""How long the thread waits for answers before it looks whether it is to end."""
HEADERS: list[tuple[str, str | bytes | None]] = [("content-type", wire.CONTENT_TYPE.encode())]
"""Source: CloudEvents Kafka protocol binding 1.0.2 §3.3."""
NO_PLACE = KafkaError(KafkaError._INCONSISTENT, "reported as written, and no broker says where")  # noqa: SLF001
"""librdkafka reports success too for what it only takes for written, and gives it no offset: a batch that the broker
refused, when a later one of its partition was accepted ("implicit ack"), or when the broker has it already.

With a producer's first messages in a partition whose leader is not ready, that is wrong: the first batch is answered
"not the leader", the second one, on its way already, is accepted, for a broker that knows nothing of a producer takes
any number to begin with, and the first batch is in no log. Seen with librdkafka 2.16.0 and Kafka 4.3.1, on a topic made
a moment before.
"""
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_IN_VAIN = {
    KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT,  # noqa: SLF001
    NO_PLACE.code(),
}  # fmt: skip
_REFUSED = {
    *_TOO_LARGE, *GONE,
    KafkaError.INVALID_MSG, KafkaError.INVALID_RECORD, KafkaError.POLICY_VIOLATION,
}  # fmt: skip


class _Partitions:
    """The partitions of Streams that one producer has written to.

    Its first message in each goes alone: were it refused and the next one taken (see NO_PLACE), the order of their key
    would be lost.
    """

    __slots__ = ("_beginning", "_written")

    def __init__(self) -> None:
        self._written: set[tuple[str, int]] = set()
        self._beginning: set[tuple[str, int]] = set()

    def answer(self, place: tuple[str, int], answer: Answer) -> Answer | None:
        """Return what is to be told the answer for the next message; None if it has to wait for that of the first."""
        if place in self._written:
            return answer
        if place in self._beginning:
            return None
        self._beginning.add(place)
        return partial(self._begun, place, answer)

    def _begun(self, place: tuple[str, int], answer: Answer, error: KafkaError | None, record: Message) -> None:
        """Let others follow, or another be the first; in the thread."""
        if error is None and record.offset() is not None:
            self._written.add(place)
        self._beginning.discard(place)
        answer(error, record)

    def not_sent(self, place: tuple[str, int]) -> None:
        """Let another message be the first."""
        self._beginning.discard(place)


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

    def answer(self, error: KafkaError | None, record: Message) -> None:
        """Note the answer for the only message; in the thread."""
        self.answer_one(0, error, record)

    def answer_one(self, number: int, error: KafkaError | None, record: Message) -> None:
        """Note the answer for one message of several; in the thread."""
        if error is not None or record.offset() is None:
            self.failed[number] = error or NO_PLACE
        self._answered(self)

    def refuse(self, number: int, error: KafkaError) -> None:
        """Note that the client does not take a message."""
        self.failed[number] = error
        self._answered(self)


class Publisher:
    """Sends the messages of one App."""

    def __init__(
        self, settings: Settings, gone: Callable[[Channel], None], too_large: Callable[[Channel], None]
    ) -> None:
        self._settings = settings
        self._gone_topic = gone
        self._too_large = too_large
        self._batch_bytes = BATCH_BYTES
        self._topics: dict[str, str] = {}
        self._answers: deque[_Sending] = deque()
        self._partitions = _Partitions()
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
        self._partitions = _Partitions()
        stranded = Stranded()
        sign_in = SignIn(self._settings.credentials)
        configured = self._settings.producer(self._state.note, stranded.note) | {"batch.size": self._batch_bytes}
        self._producer = producer = Producer(configured, logger=client_log)
        ended: asyncio.Future[None] = self._loop.create_future()
        thread = WorkerThread("trunkline-kafka-publisher")
        thread.submit(partial(self._wait_for_answers, producer, stranded, sign_in), partial(_end, ended))
        self._threads.append((thread, ended))

    async def keep_within(self, limit: int) -> None:
        """Make no batch of several messages larger than `limit` from now on: it would be refused with all of them.

        Another producer does so, once this one has been answered for all it has: the order stays.
        """
        if limit >= self._batch_bytes:
            return
        self._batch_bytes = limit
        self._waiting += 1
        try:
            async with self._line:
                while self._left:
                    self._room = self._loop.create_future()
                    await self._room
                if self._producer is not None:
                    self._begin()
        finally:
            self._waiting -= 1

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
        partitions = self._partitions
        for number in range(start, len(batch)):
            staged = batch[number]
            channel, message = staged.channel, staged.message
            key = message.partitionkey
            topic = topics.get(channel.name) or self._topic(channel.name)
            answer: Answer = partial(sending.answer_one, number) if several else sending.answer
            place = -1
            if isinstance(channel, Stream):
                place = partition_of(message, channel.partitions)
                if (first := partitions.answer((topic, place), answer)) is None:
                    return number
                answer = first
            try:
                producer.produce(topic, wire.encode(message), key, place, answer, headers=HEADERS)
            except BufferError:
                partitions.not_sent((topic, place))
                return number
            except KafkaException as error:
                partitions.not_sent((topic, place))
                sending.refuse(number, error.args[0])
                self._loop.call_soon(self._resolve)
            self._left += 1
        return len(batch)

    def _topic(self, channel: str) -> str:
        topic = self._topics[channel] = self._settings.topic(channel)
        return topic

    async def _send_when_room(self, batch: Sequence[Staged], sending: _Sending | None, start: int) -> None:
        """Wait in line until the rest of `batch` can be handed over: for room in the client, for partitions."""
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

    def look(self, topic: str) -> None:
        """Have the client look for a topic that was made again: it refuses messages for it until then; blocks."""
        if self._producer is not None:
            try:
                self._producer.list_topics(topic, timeout=LOOK_S)
            except KafkaException as error:
                log.debug("publishing: %s is not looked up: %s", topic, describe(error.args[0]))

    # --- answers ---

    def _wait_for_answers(self, producer: Producer, stranded: Stranded, sign_in: SignIn) -> None:
        """Collect answers until the producer is done with; in the thread."""
        asked = False
        while not self._stopping and producer is self._producer:
            sign_in.renew(producer)
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
        if sending.failed[first].code() in GONE:
            self._gone_topic(sending.batch[first].channel)
        if sending.failed[first].code() in _TOO_LARGE:
            self._too_large(sending.batch[first].channel)
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
                "the channel must be declared at start of this or another App" if code in GONE
                else "see the settings of the topic: with cleanup.policy=compact each message needs a key",
                unsent=unsent,
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
