"""What settings of brokers do to what is promised, where no test starts a server that is set so."""

import pytest

from trunkline.channel import Queue, Stream, Topic
from trunkline.postgres.settings import read_settings
from trunkline.transport import Subscription, parse_address
from trunkline.transports.kafka.judgement import TopicFacts, judge_brokers, judge_topic
from trunkline.transports.nats.judgement import judge_consumer, judge_disk, judge_server, judge_stream
from trunkline.transports.postgres.judgement import judge
from trunkline.transports.rabbitmq.judgement import judge_alarm, judge_channel
from trunkline.transports.rabbitmq.judgement import judge_server as judge_rabbitmq

ORDERS = Stream("orders", key="order_id", partitions=4, retention_s=3600)


def by_setting(findings):
    return {finding.setting: finding for finding in findings}


# --- Kafka ---


def topic(copies=3, in_step=3, partitions=4, **settings):
    given = {name.replace("_ms", ".ms"): value for name, value in settings.items()}
    return TopicFacts(partitions, copies, in_step, {"min.insync.replicas": "2", "max.message.bytes": "2162688"} | given)


def test_three_brokers_of_kafka_keep_what_is_confirmed():
    found = by_setting(judge_brokers(3, {"offsets.topic.replication.factor": "3"}, 10.0))
    found |= by_setting(judge_topic(ORDERS, topic(retention_ms="3600000"), 3))
    assert {finding.verdict for finding in found.values()} == {"kept"}
    assert "2 machines fail at the same moment" in found["flush.messages"].loses


@pytest.mark.parametrize(
    ("facts", "setting", "verdict"),
    [
        (topic(partitions=8), "partitions", "broken"),
        (topic(copies=2), "replication factor", "weak"),
        (topic(in_step=1), "min.insync.replicas", "broken"),
        (topic(**{"min.insync.replicas": "1"}), "min.insync.replicas", "weak"),
        (topic(**{"unclean.leader.election.enable": "true"}), "unclean.leader.election.enable", "broken"),
        (topic(**{"cleanup.policy": "compact"}), "cleanup.policy", "broken"),
        (topic(**{"retention.ms": "60000"}), "retention.ms", "weak"),
        (topic(**{"retention.bytes": "1000"}), "retention.bytes", "weak"),
        (topic(**{"max.message.bytes": "1048588"}), "max.message.bytes", "weak"),
        (TopicFacts(4, 3, 3, {}), "topic settings", "unknown"),
    ],
)
def test_each_setting_of_a_topic_that_breaks_the_promise_is_found(facts, setting, verdict):
    found = by_setting(judge_topic(ORDERS, facts, 3))[setting]
    assert (found.verdict, found.channel) == (verdict, "orders")
    assert found.change


@pytest.mark.parametrize(
    ("settings", "setting", "verdict"),
    [
        ({"group.min.session.timeout.ms": "30000"}, "group session timeouts", "broken"),
        ({"offsets.retention.minutes": "60"}, "offsets.retention.minutes", "weak"),
        ({"offsets.topic.replication.factor": "1"}, "offsets.topic.replication.factor", "weak"),
        ({}, "broker settings", "unknown"),
    ],
)
def test_each_setting_of_a_broker_that_breaks_the_promise_is_found(settings, setting, verdict):
    assert by_setting(judge_brokers(3, settings, 10.0))[setting].verdict == verdict


# --- NATS ---


def test_the_interval_that_a_server_tells_is_what_can_be_lost():
    assert judge_disk({"sync_always": True}).verdict == "kept"
    assert judge_disk({"sync_interval": 5_000_000_000}).loses.startswith("up to 5 s of confirmed messages")
    assert judge_disk({}).value == "120 s"
    assert judge_disk(None).verdict == "unknown"


def stream(channel, **changes):
    metadata = {"trunkline.kind": channel.kind}
    if isinstance(channel, Stream):
        metadata["trunkline.partitions"] = str(channel.partitions)
    return {
        "config": {"storage": "file", "num_replicas": 3, "duplicate_window": 120 * 10**9, "metadata": metadata}
        | changes
    }


@pytest.mark.parametrize(
    ("changes", "setting", "verdict"),
    [
        ({"storage": "memory"}, "storage", "broken"),
        ({"num_replicas": 1}, "num_replicas", "weak"),
        ({"metadata": {"trunkline.kind": "queue"}}, "declared as", "broken"),
        ({"max_msgs": 100, "discard": "old"}, "max_msgs", "weak"),
        ({"max_age": 60 * 10**9}, "max_age", "weak"),
    ],
)
def test_each_setting_of_a_stream_of_nats_that_breaks_the_promise_is_found(changes, setting, verdict):
    assert by_setting(judge_stream(ORDERS, stream(ORDERS, **changes), clustered=True))[setting].verdict == verdict


def test_a_cluster_of_nats_keeps_what_is_confirmed():
    found = [*judge_stream(ORDERS, stream(ORDERS, max_age=3600 * 10**9), clustered=True)]
    found += judge_server({"version": "2.12.0", "cluster": "shop", "max_payload": 4 << 20}, {})
    assert {finding.verdict for finding in found} == {"kept"}


def test_a_consumer_that_gives_up_is_wrong():
    jobs = Subscription("owner", Queue("jobs"))
    found = by_setting(judge_consumer(jobs, {"config": {"max_deliver": 5, "ack_wait": 30 * 10**9}}, 300.0))
    assert found["max_deliver"].verdict == "broken"


# --- RabbitMQ ---


def test_a_message_held_longer_than_the_broker_waits_is_found():
    assert by_setting(judge_rabbitmq((4, 1), 300.0))["consumer_timeout"].verdict == "kept"
    found = by_setting(judge_rabbitmq((4, 1), 7200.0))["consumer_timeout"]
    assert (found.verdict, "7200 s" in found.meaning) == ("weak", True)


def test_kinds_of_queues_differ_in_what_they_keep():
    assert by_setting(judge_channel(Queue("jobs", priority=True)))["queue type"].value == "classic"
    assert by_setting(judge_channel(Topic("news")))["queue type"].loses == ""
    assert "does not wait for their disks" in by_setting(judge_channel(ORDERS))["queue type"].meaning
    assert judge_alarm("low on memory").verdict == "broken"


# --- PostgreSQL ---

GOOD = {
    "fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "wal_writer_delay": "200",
    "synchronous_standby_names": "ANY 1 (a, b)", "max_connections": "100",
    "default_transaction_isolation": "read committed",
}  # fmt: skip
FACTS = {
    "server_version": "17.2", "me": "shop", "connections": 5, "standbys": 2, "in_step": 2, "port": 5432,
    "may_create": True, "exists": True,
}  # fmt: skip


def judged(settings=(), facts=(), url="postgresql://db/shop", held_s=300.0):
    return by_setting(judge(GOOD | dict(settings), FACTS | dict(facts), read_settings(parse_address(url)), held_s))


def test_a_database_with_a_standby_in_step_keeps_what_is_confirmed():
    assert {finding.verdict for finding in judged().values()} == {"kept"}


@pytest.mark.parametrize(
    ("settings", "facts", "setting", "verdict"),
    [
        ({"full_page_writes": "off"}, {}, "full_page_writes", "weak"),
        ({}, {"in_step": 0}, "synchronous_standby_names", "broken"),
        ({"synchronous_standby_names": ""}, {}, "synchronous_standby_names", "weak"),
        ({"synchronous_standby_names": ""}, {"standbys": 0, "in_step": 0}, "synchronous_standby_names", "weak"),
        ({"default_transaction_isolation": "serializable"}, {}, "default_transaction_isolation", "weak"),
        ({"idle_in_transaction_session_timeout": "60000"}, {}, "idle_in_transaction_session_timeout", "weak"),
        ({"autovacuum": "off"}, {}, "autovacuum", "weak"),
        ({}, {"port": 6543}, "port", "unknown"),
        ({}, {"exists": False, "may_create": False}, "CREATE", "broken"),
    ],
)
def test_each_setting_of_a_database_that_breaks_the_promise_is_found(settings, facts, setting, verdict):
    found = judged(settings, facts)[setting]
    assert found.verdict == verdict
    assert found.change


def test_a_pooler_that_the_url_names_is_no_riddle():
    found = judged(facts={"port": 6543}, url="postgresql://db/shop?statement_cache=0")
    assert "port" not in found
    assert found["statement_cache"].verdict == "kept"
