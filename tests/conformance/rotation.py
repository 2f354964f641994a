"""How the password of a user is changed on each broker, and the user's connections ended: scheme → function.

Each takes the broker's name for scripts/brokers, the user and the new password; a user who is not there is made.
"""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable

from tests import brokers
from trunkline.clock import system_clock

USER, PASSWORD = "rotated", "the-first-one"


async def kafka(broker: str, user: str, password: str) -> None:
    from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

    # The listener for other nodes asks for no password.
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{_port(broker, 'internal')}"})
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
    changes = admin.alter_user_scram_credentials([UserScramCredentialUpsertion(user, info, password.encode())])
    await asyncio.to_thread(changes[user].result)
    await asyncio.to_thread(brokers.restart, broker)  # nothing else ends a connection that stands


async def nats(broker: str, user: str, password: str) -> None:
    config = brokers.folder(broker) / "nats.conf"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("authorization")]
    config.write_text("\n".join([*lines, f'authorization {{ user: {user}, password: "{password}" }}', ""]))
    os.kill(brokers.record(broker)["pid"], signal.SIGHUP)  # it reads its file again, and ends who is not in it
    while not await _nats_takes(_port(broker), user, password):
        await system_clock.sleep(0.05)


async def _nats_takes(port: int, user: str, password: str) -> bool:
    """Source: NATS client protocol, CONNECT."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await reader.readline()
        options = {"verbose": True, "pedantic": False, "user": user, "pass": password}
        writer.write(f"CONNECT {json.dumps(options)}\r\n".encode())
        return await reader.readline() == b"+OK\r\n"
    finally:
        writer.close()
        await writer.wait_closed()


async def postgres(broker: str, user: str, password: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(brokers.broker_url(broker))
    try:
        if not await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", user):
            await connection.execute(f"CREATE ROLE {user} LOGIN; GRANT CREATE ON DATABASE postgres TO {user}")
        await connection.execute(f"ALTER ROLE {user} PASSWORD '{password}'")
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", user)
    finally:
        await connection.close()


ROTATE = """
{{User, Password, By}} = {{<<"{user}">>, <<"{password}">>, <<"tests">>}},
case rabbit_auth_backend_internal:exists(User) of
  true -> ok;
  false -> rabbit_auth_backend_internal:add_user(User, Password, By)
end,
rabbit_auth_backend_internal:set_permissions(User, <<"/">>, <<".*">>, <<".*">>, <<".*">>, By),
rabbit_auth_backend_internal:change_password(User, Password, By),
[catch rabbit_networking:close_connection(Pid, "rotated") || Pid <- rabbit_networking:connections()], ok.
"""


async def rabbitmq(broker: str, user: str, password: str) -> None:
    # Debian's command on PATH takes root and rabbitmq only, and another's cookie; this is the script beneath it.
    home = brokers.folder(broker)
    env = {
        "HOME": str(home),
        "ERL_EPMD_PORT": str(_port(broker, "mapper")),
        "RABBITMQ_CONF_ENV_FILE": str(home / "env.conf"),
    }
    command = ["/usr/lib/rabbitmq/bin/rabbitmqctl", "--node", "trunkline1@localhost", "eval"]
    done = await asyncio.to_thread(
        subprocess.run, [*command, ROTATE.format(user=user, password=password)], env={**os.environ, **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


async def redis(broker: str, user: str, password: str) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(brokers.broker_url(broker)) as client:
        await client.execute_command("ACL", "SETUSER", user, "on", "resetpass", f">{password}", "~*", "&*", "+@all")
        await client.execute_command("CLIENT", "KILL", "USER", user)


ROTATIONS: dict[str, Callable[[str, str, str], Awaitable[None]]] = {
    "amqp": rabbitmq,
    "kafka": kafka,
    "nats": nats,
    "postgresql": postgres,
    "redis": redis,
}


def _port(broker: str, name: str = "client") -> int:
    return brokers.record(broker)["nodes"][0]["ports"][name]
