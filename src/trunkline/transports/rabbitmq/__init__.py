"""Queue, Topic and Stream on RabbitMQ: `transport.py` carries, `client.py` speaks AMQP 0-9-1.

Read next: transport.py.
"""

from trunkline.transports.rabbitmq.transport import RabbitmqTransport

__all__ = ["RabbitmqTransport"]
