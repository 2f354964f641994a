"""Channels on Apache Kafka, with confluent-kafka. Read next: transport.py."""

from trunkline.transports.kafka.transport import KafkaTransport

__all__ = ["KafkaTransport"]
