"""Queue, Topic and Stream on Redis Streams."""

from trunkline.transports.redis.transport import RedisTransport

__all__ = ["RedisTransport"]
