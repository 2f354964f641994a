"""What one process reads of one subscription: a consumer in its own thread.

Invariant: an offset is committed only when everything before it is settled; a partition that moves is given up when
nothing of it is under way here, or after a bounded wait. The thread polls, decodes and answers rebalances; the loop
keeps the watermarks. Read next: transport.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from trunkline import wire
from trunkline.channel import Channel, Stream
from trunkline.clock import Clock, WorkerThread
from trunkline.errors import DecodeError
from trunkline.inflow import ROOM, Inflow
from trunkline.partitions import CLOSE_S, Watermark
from trunkline.transport import LIVE, Delivery, Subscription
from trunkline.transports.kafka.cluster import Cluster
from trunkline.transports.kafka.place import CLEAN, FIRST, OPEN, STORED, Place, answered, begin_of, is_clean, metadata
from trunkline.transports.kafka.positions import SHIFT, Late, by_partition, number_of
from trunkline.transports.kafka.records import key_of, plain_of, text_headers
from trunkline.transports.kafka.settings import END, GONE, ClusterState, Settings, SignIn, client_log, describe
from trunkline.transports.kafka.stranded import Stranded

log = logging.getLogger("trunkline.kafka")

BATCH = 500
"""Records taken from the client at once."""
ROOM_BYTES = 16 * 1024 * 1024
"""What waits for the consumer is no more than this, by the average size of the last records."""
MOST_UNSETTLED = 200_000
"""Records of one subscription received and not passed by a watermark before no more are read."""
IDLE_POLL_S = 0.2
STAND_BY_S = 1.0
"""How long the thread waits for room without answering rebalances; then it pauses and polls."""
COMMIT_S = 0.1
SILENT_S, LOOK_S = 5.0, 1.0
"""After so long without a record the thread looks whether the topic is there; how long it waits for the answer."""
SUSPECTS = 1000
"""So many records of a partition may have been under way when the process before died; see consumer.IN_FLIGHT."""
CALL_S = 10.0


class Reader:
    """Reads `topic` for `subscription`.

    Attributes:
        inflow: what was read and not yet asked for.
        held: partition → how far it is settled, for the partitions that this process reads.
        deletes: whether what all groups have handled is of no use any more: on Queues and Topics.
    """

    def __init__(
        self, subscription: Subscription, settings: Settings, clock: Clock, gone: Callable[[Channel], None]
    ) -> None:
        self.subscription = subscription
        self.inflow = Inflow(subscription)
        self.held: dict[int, Watermark] = {}
        channel = subscription.channel
        self.topic = settings.topic(channel.name)
        self.group = settings.group(subscription.name, channel.name)
        self._settings = settings
        self._clock = clock
        self._is_stream = isinstance(channel, Stream)
        self.deletes = not self._is_stream
        self._plain = channel.plain
        self._loop = asyncio.get_running_loop()
        self._made: Consumer | None = None
        self._stranded = Stranded()
        self._sign_in = SignIn(settings.credentials)
        self._state = ClusterState(settings, self.group)
        self._thread: WorkerThread | None = None
        self._failure: BaseException | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # Of the thread: partitions assigned to it, and what it has handed to the loop.
        self._places: dict[int, Place] = {}
        self._unopened: list[int] = []
        self._reached: dict[int, int] = {}
        self._handed = 0
        self._average = 1.0
        self._commit_at = 0.0
        self._record: Message
        # Of the loop: what was taken from the inflow or dropped.
        self._gone = 0
        self._ends: dict[int, int] = {}
        self._late = Late()
        self._leaving: set[asyncio.Task[None]] = set()
        # Of both.
        self._wake = Event()
        self._is_waiting = False
        self._draining = False
        self._stopping = False
        self._gone_topic = gone
        self._topic_id = self._new_id = ""
        self._heard = clock.monotonic()

    # --- start ---

    def prepare(self, cluster: Cluster, ends: dict[int, int]) -> None:
        """Say where a new group begins, then join it; blocks.

        Args:
            ends: where it begins, per partition. They were looked up before this: what is published after two processes
                have started at once is behind the ends that either of them saw.
        """
        consumer = self._make()
        self._cluster: Cluster = cluster
        self._topic_id = self._new_id = cluster.topic_id(self.topic)
        places = [TopicPartition(self.topic, number) for number in ends]
        known = cluster.patiently(
            lambda: consumer.committed(places, timeout=self._settings.timeout_s), f"looking at offsets of {self.group}"
        )
        if all(place.offset < 0 for place in known):  # else what is not known is a partition that was added: all of it
            new = [self._place(number, end, CLEAN) for number, end in ends.items()]
            cluster.begin(self.group, consumer, new)
        self._join()

    def _make(self) -> Consumer:
        self._stranded = Stranded()
        self._sign_in = SignIn(self._settings.credentials)
        configured = self._settings.consumer(self.group, self._state.note, self._stranded.note)
        configured["on_commit"] = partial(answered, self._places)
        self._made = consumer = Consumer(configured, logger=client_log)
        return consumer

    def _join(self) -> None:
        self._consumer.subscribe([self.topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def look_at(self, topic_id: str) -> None:
        """Note which topic has the name now: one that was made anew is read from its first message."""
        self._new_id = topic_id

    def start(self) -> None:
        """Begin to read."""
        self._thread = WorkerThread(f"trunkline-kafka-{self.subscription.label}")
        self._thread.submit(self._work, self._end)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._failure = error
            self.inflow.reassigned()
        if not self._ended.done():
            self._ended.set_result(None)

    # --- the thread ---

    @property
    def _consumer(self) -> Consumer:
        assert self._made is not None  # noqa: S101 - made by prepare, before the thread
        return self._made

    def _work(self) -> None:
        try:
            while not self._stopping:
                if self._stranded:
                    self._join_anew(f"the client has lost every broker of {self._settings.shown}, it is made anew")
                elif self._new_id != self._topic_id:
                    known, self._topic_id = self._topic_id, self._new_id
                    if known:
                        self._join_anew(f"topic {self.topic} was made anew, it is read from its first message on")
                self._commit()
                most = self._room()
                if most < 1:
                    self._stand_by()
                else:
                    self._read(most)
        finally:
            self._close()

    def _look(self) -> None:
        """See whether the topic is still there: of one that was deleted the client says nothing, nothing comes."""
        now = self._clock.monotonic()
        if now - self._heard < SILENT_S or self._state.is_down:
            return
        self._heard = now
        try:
            found = self._consumer.list_topics(self.topic, timeout=LOOK_S).topics[self.topic].error
        except KafkaException as error:
            log.debug("%s: the topic is not looked up: %s", self.group, describe(error.args[0]))
        else:
            if found is not None and found.code() in GONE:
                self._loop.call_soon_threadsafe(self._gone_topic, self.subscription.channel)

    def _join_anew(self, why: str) -> None:
        """Read on with a new consumer: this one asks nobody any more, see stranded.py, or for what is not there."""
        log.warning("%s: %s", self.group, why)
        stranded = self._consumer
        numbers = list(self._places)
        self._places.clear()
        self._reached.clear()
        self._unopened.clear()
        self._on_loop(self._leave, numbers)
        self._make()
        self._join()
        self._loop.call_soon_threadsafe(self._leave_behind, stranded)

    def _leave_behind(self, stranded: Consumer) -> None:
        """Close a consumer in a thread of its own: without a coordinator that can take for ever; on the loop."""
        thread = WorkerThread(f"trunkline-kafka-{self.subscription.label}-left")

        def closed(error: BaseException | None) -> None:
            log.log(logging.DEBUG if error is None else logging.WARNING, "%s: old client closed: %s", self.group, error)
            thread.stop()

        thread.submit(stranded.close, closed)

    def _read(self, most: int) -> None:
        """Hand over what the client has; wait for one record while it has none."""
        consumer = self._consumer
        records = consumer.consume(most, 0)
        if not records:
            record = consumer.poll(IDLE_POLL_S)
            records = [] if record is None else [record]
        if self._unopened:
            self._open()
        if not records:
            self._look()
        else:
            self._heard = self._clock.monotonic()
            self._hand_over(records)

    def _commit(self) -> None:
        """Commit how far partitions are settled, without waiting for the answer.

        Here, not on the loop: the client blocks a second thread while this one polls.
        """
        if self._reached:  # after all records before it were handed over
            self._loop.call_soon_threadsafe(self._read_up_to, self._reached)
            self._reached = {}
        now = self._clock.monotonic()
        if now < self._commit_at:
            return
        self._commit_at = now + COMMIT_S
        self._sign_in.renew(self._consumer)
        offsets = []
        for number, low in self.settled_offsets().items():
            place = self._places.get(number)
            if place is not None and place.committed < low:
                place.committed = low
                offsets.append(self._place(number, low, OPEN))
        if not offsets:
            return
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            log.warning("%s: offsets are not committed: %s", self.group, describe(error.args[0]))

    def _room(self) -> int:
        """Return how many records may be read now."""
        room = min(ROOM, int(ROOM_BYTES / self._average) or 1)
        waiting = self._handed - self._gone
        if self._draining or waiting >= room or sum(map(len, list(self.held.values()))) > MOST_UNSETTLED:
            return 0
        return min(BATCH, room)

    def _stand_by(self) -> None:
        """Wait for room; after a while answer rebalances meanwhile, with everything paused."""
        self._wake.clear()
        self._is_waiting = True
        try:
            if self._room() or self._stopping or self._wake.wait(STAND_BY_S):
                return
            while not (self._room() or self._stopping):
                self._commit()
                self._consumer.pause(self._assignment())
                if (record := self._consumer.poll(IDLE_POLL_S)) is not None:
                    self._hand_over([record])  # it was on its way when the partition was paused
            self._consumer.resume(self._assignment())
        finally:
            self._is_waiting = False

    def _place(self, number: int, offset: int, how: str) -> TopicPartition:
        return TopicPartition(self.topic, number, offset, metadata(how, self._topic_id))

    def _assignment(self) -> list[TopicPartition]:
        return [TopicPartition(self.topic, number) for number in self._places]

    def _hand_over(self, records: Sequence[Message]) -> None:
        """Decode records and give them to the loop, all at once."""
        subscription, places, is_stream, plain = self.subscription, self._places, self._is_stream, self._plain
        deliveries: list[Delivery] = []
        size = 0
        message: Any
        record: Any
        for record in records:
            if (wrong := record.error()) is not None:
                self._wrong(wrong, record)
                continue
            number: int = record.partition()
            place = places.get(number)
            if place is None:
                continue  # revoked after it was fetched
            body: bytes = record.value() or b""
            size += len(body)
            self._record = record
            raw: bytes | None = None
            key = unread = None
            try:
                message = wire.decode(body, self._headers, None if plain is None else plain_of(record, plain))
                key = message.partitionkey
                if key is None and (key := key_of(record)) is not None:
                    message = msgspec.structs.replace(message, partitionkey=key)
            except DecodeError as error:
                log.debug("unreadable record on %s: %s", self.topic, error)
                message, raw, unread = None, body, wire.why_unread(error)
            offset: int = record.offset()
            if offset < place.committed:
                deliveries = [one for one in deliveries if number_of(one) != number]
                place = self._begin_again(number, offset)
            suspect = False
            if place.suspects:
                place.suspects -= 1
                suspect = offset < place.until
            position, partition = (offset, number) if is_stream else (number << SHIFT | offset, -1)
            deliveries.append(
                Delivery(
                    subscription, message, raw, key, position, partition,
                    0, LIVE, suspect, False, unread,  # noqa: FBT003 - positional for speed
                )
            )  # fmt: skip
        if deliveries:
            self._state.works()
            self._average += 0.2 * (size / len(deliveries) + 1 - self._average)
            self._handed += len(deliveries)
            self._loop.call_soon_threadsafe(self._arrived, deliveries)

    def _begin_again(self, number: int, offset: int) -> Place:
        """Count a partition from `offset` on, which the group has passed: its topic was made anew.

        Cursors of the old topic would otherwise stand for messages of the new one that nobody has read.
        """
        log.warning(
            "%s: partition %d of %s was made anew, it is read from %d on", self.group, number, self.topic, offset
        )
        self._reached.pop(number, None)
        self._on_loop(self._leave, [number])
        self._loop.call_soon_threadsafe(self._opened, {number: offset})
        self._new_id = self._cluster.topic_id(self.topic) or self._topic_id
        if len(self._places) == 1:  # else the others begin again too: from now on they may be behind where they were
            self._topic_id = self._new_id
        self._places[number] = place = Place(offset, 0, 0)
        return place

    def _on_loop(self, act: Callable[[list[int]], None], numbers: list[int]) -> None:
        """Have the loop do something and wait for that: until then it says of partitions what does not hold now."""
        done = Event()

        def work() -> None:
            act(numbers)
            done.set()

        self._loop.call_soon_threadsafe(work)
        done.wait()

    def _wrong(self, error: KafkaError, record: Message) -> None:
        """Note an error that came in place of a record.

        Raises: ConfigurationError E241 if the broker does not take the lease.
        """
        if error.code() == END:
            number, offset = record.partition(), record.offset()
            if number in self._places and offset is not None:
                self._reached[number] = offset
            return
        if error.code() == KafkaError.INVALID_SESSION_TIMEOUT:
            raise self._settings.lease_refused()
        if error.code() in GONE:
            self._loop.call_soon_threadsafe(self._gone_topic, self.subscription.channel)
        self._state.note(error)

    def _headers(self) -> dict[str, str]:
        return text_headers(self._record)

    # --- partitions come and go: in the thread, from within poll ---

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Begin where the group has committed; after an unclean end the next records are suspects."""
        if not partitions or consumer is not self._made:
            return
        try:
            known = consumer.committed(partitions, timeout=CALL_S)
        except KafkaException as error:
            log.warning("%s: no committed offsets, all are looked up again: %s", self.group, describe(error.args[0]))
            known = [TopicPartition(self.topic, place.partition, STORED) for place in partitions]
        begins = {}
        for place in known:
            number, begin, clean = place.partition, begin_of(place, self._topic_id), is_clean(place.metadata)
            first, until = (begin, 0) if clean and begin >= 0 else self._bounds(consumer, number)
            begins[number] = begin = first if begin == FIRST else begin
            self._places[number] = Place(begin, 0 if clean else SUSPECTS, until)
            if clean or begin != place.offset:
                self._unopened.append(number)
        consumer.incremental_assign([TopicPartition(self.topic, number, begin) for number, begin in begins.items()])
        self._loop.call_soon_threadsafe(self._opened, begins)

    def _bounds(self, consumer: Consumer, number: int) -> tuple[int, int]:
        """Return the first offset, and that before which a record may have been read by the process before."""
        try:
            first, end = consumer.get_watermark_offsets(TopicPartition(self.topic, number), timeout=CALL_S)
        except KafkaException as error:
            log.warning("%s: the ends of %d are not known: %s", self.group, number, describe(error.args[0]))
            return FIRST, 1 << SHIFT
        return int(first), int(end)

    def _open(self) -> None:
        """Commit, before anything is handed out, that from now on something may be under way.

        And where: a group without offsets, as after its topic was deleted, begins as a new one, perhaps at the end.
        """
        numbers, self._unopened = self._unopened, []
        self._commit_now({n: self._places[n].committed for n in numbers if n in self._places}, OPEN)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Give partitions up: wait until nothing of them is under way, commit."""
        numbers = [place.partition for place in partitions if place.partition in self._places]
        if not numbers or self._stopping or consumer is not self._made:
            return
        done = Event()
        lows: dict[str, dict[int, int]] = {}
        self._loop.call_soon_threadsafe(self._give_up, numbers, lows, done)
        done.wait(CLOSE_S + CALL_S)
        for number in numbers:
            del self._places[number]
        for how, offsets in lows.items():
            self._commit_now(offsets, how)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Forget partitions that another process reads already."""
        if consumer is not self._made:
            return
        numbers = [place.partition for place in partitions if self._places.pop(place.partition, None) is not None]
        log.warning("%s lost partitions %s: another process may read them now", self.group, numbers)
        self._loop.call_soon_threadsafe(self._drop, numbers)

    def _commit_now(self, offsets: dict[int, int], how: str) -> None:
        places = [self._place(number, low, how) for number, low in offsets.items() if low >= 0]
        if not places:
            return
        try:
            self._consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as error:
            log.warning("%s: offsets are not committed, messages come again: %s", self.group, describe(error.args[0]))

    def _close(self) -> None:
        for how, offsets in self._lows(self.held).items():
            self._commit_now(offsets, how)
        self._consumer.close()

    # --- partitions come and go: on the loop ---

    def _opened(self, begins: dict[int, int]) -> None:
        for number, begin in begins.items():
            self.held[number] = Watermark(begin if self._is_stream or begin < 0 else number << SHIFT | begin)
        self.inflow.reassigned()

    def _give_up(self, numbers: list[int], lows: dict[str, dict[int, int]], done: Event) -> None:
        self._forget(numbers)
        marks = {number: self.held[number] for number in numbers if number in self.held}
        task = self._loop.create_task(self._give_up_idle(marks, lows, done))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _give_up_idle(self, marks: dict[int, Watermark], lows: dict[str, dict[int, int]], done: Event) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                for mark in marks.values():
                    await mark.idle()
        except TimeoutError:
            log.warning("%s: partitions %s move while messages of them are under way", self.group, list(marks))
        finally:
            lows |= self._lows(marks)
            # The thread waits no longer than it must: a partition may have come back meanwhile.
            self._drop([number for number, mark in marks.items() if self.held.get(number) is mark])
            done.set()

    def _leave(self, numbers: list[int]) -> None:
        """Drop partitions whose records may be others from now on: what is under way is not settled among those."""
        for number in numbers:
            if (mark := self.held.get(number)) is not None:
                self._late.add(number if self._is_stream else -1, mark.unfinished())
        self._drop(numbers)

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self.held.pop(number, None)
        self._forget(numbers)
        self.inflow.reassigned()

    def _forget(self, numbers: list[int]) -> None:
        """Drop what waits of some partitions; the broker brings it again."""
        for number in numbers:
            self._ends.pop(number, None)
        dropped = self.inflow.forget()
        kept = [delivery for delivery in dropped if number_of(delivery) not in numbers]
        self._gone += len(dropped) - len(kept)
        self.inflow.put(kept)

    def _lows(self, marks: dict[int, Watermark]) -> dict[str, dict[int, int]]:
        """Return metadata → partition → offset to commit."""
        lows: dict[str, dict[int, int]] = {CLEAN: {}, OPEN: {}}
        for number, mark in marks.items():
            lows[OPEN if len(mark) else CLEAN][number] = self._offset(number, mark.low)
        return lows

    def _offset(self, number: int, low: int) -> int:
        return low if self._is_stream or low < 0 else low - (number << SHIFT)

    # --- messages, on the loop ---

    def _arrived(self, deliveries: list[Delivery]) -> None:
        before = len(self.inflow)
        self.inflow.put(deliveries)
        self._gone += len(deliveries) - (len(self.inflow) - before)  # dropped: draining

    def _read_up_to(self, ends: dict[int, int]) -> None:
        """Note up to which offset there is no record that was not brought."""
        self._ends |= {number: end for number, end in ends.items() if number in self.held}
        self._pass_ends()

    def _pass_ends(self) -> None:
        """Let watermarks pass what is no record: markers of transactions, what was aborted or compacted.

        Only while nothing waits here or is under way; what a drain dropped comes again.
        """
        if self._draining or len(self.inflow):
            return
        for number, end in list(self._ends.items()):
            mark = self.held[number]
            if not len(mark):
                del self._ends[number]
                mark.low = max(mark.low, end if self._is_stream else number << SHIFT | end)

    async def receive(self, limit: int) -> list[Delivery]:
        """Return deliveries and note that they are under way; see Transport."""
        taken = await self.inflow.receive(limit)
        if not taken and self._failure is not None:
            raise self._failure
        self._gone += len(taken)
        if self._is_waiting:
            self._wake.set()
        if self._late:
            self._late.taken(taken)
        for number, positions in by_partition(taken):
            self.held[number].take(positions)
        return taken

    def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Note what is settled; the thread commits it soon."""
        if self._late:
            deliveries = self._late.without(deliveries)
        for number, positions in by_partition(deliveries):
            mark = self.held.get(number)
            if mark is not None:
                mark.done(positions)
        if self._ends:
            self._pass_ends()

    def settled_offsets(self) -> dict[int, int]:
        """Return the offset up to which each partition held here is settled."""
        return {n: self._offset(n, mark.low) for n, mark in list(self.held.items()) if mark.low >= 0}

    # --- end ---

    def drain(self) -> None:
        """Read no more; what was handed out may still be settled."""
        self._draining = True
        self._gone += len(self.inflow.drain())

    async def _end_of_thread(self, thread: WorkerThread) -> None:
        """Wait for the thread, but not for librdkafka, which may wait for a coordinator that is gone."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.shield(self._ended)
        except TimeoutError:
            log.warning("%s: the group was not left within %.0f s: others wait for the lease", self.group, CLOSE_S)
        else:
            thread.stop()

    async def stop(self) -> None:
        """Commit what is settled and leave the group."""
        self._draining = self._stopping = True
        for task in list(self._leaving):
            task.cancel()
        self._wake.set()
        if self._thread is not None:
            await self._end_of_thread(self._thread)
            self._thread = None
        elif self._made is not None:
            self._leave_behind(self._made)
        self.held.clear()
