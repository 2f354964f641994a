"""The commands: `python -m scripts.brokers --help`, from the root of the repository."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from scripts.brokers.errors import BrokerError, MissingError
from scripts.brokers.lifecycle import KINDS, Brokers, Name

MISSING = 3
ROOT = Path(__file__).resolve().parents[2]
EPILOG = """
A name is kind[nodes][:variant,...][@label]; each name is a server of its own, with its own ports and data:
  redis  kafka3  redis:tls  redis:password,everysec  nats@mine  kafka3/2 (its second node: kill, resume, restart, stop)

variants:
""" + "\n".join(f"  {kind.name}: {', '.join(sorted(kind.variants))}" for kind in KINDS.values())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(
        "python -m scripts.brokers",
        description="Real message brokers on loopback, for tests, the demo and benchmarks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = os.environ.get("TRUNKLINE_BROKERS") or ROOT / "build" / "brokers"
    root.add_argument("--folder", type=Path, default=default, help="of all state (TRUNKLINE_BROKERS; build/brokers)")
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, names: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("names", nargs=names, metavar="NAME")
        return added

    start = command("start", "install what is missing, start, wait until ready; prints name, tab, URL", "+")
    start.add_argument("--no-install", action="store_true", help="fail where something is missing")
    start.add_argument("--nodes", type=int, help="nodes of a cluster: kafka --nodes 3 is kafka3")
    start.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="a line of the server's own configuration; may be repeated"
    )
    command("install", "install what is missing", "+")
    command("url", "print the URL of one that runs", "+")
    stop = command("stop", "end cleanly, all without a name; data and ports stay; prints what it stopped", "*")
    stop.add_argument("--wipe", action="store_true", help="remove data and ports too")
    command("restart", "stop, then start on the same ports and data", "+")
    command("kill", "kill -9; data stays", "+")
    command("resume", "start what was stopped or killed on the same ports and data", "+")
    status = commands.add_parser("status", help="what runs: name, state, URL, process, version")
    status.add_argument("--json", action="store_true")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 1 a broker failed, 2 wrong use, 3 something is not installed."""
    options = parser().parse_args(argv)
    brokers = Brokers(options.folder)
    try:
        if options.command == "status":
            _print_status(brokers, as_json=options.json)
        elif options.command == "stop":
            _stop(options.names or brokers.names(), lambda name: brokers.stop(name, wipe=options.wipe))
        else:
            _run(options, brokers)
    except BrokerError as error:
        print(f"brokers: {error}", file=sys.stderr)
        return MISSING if isinstance(error, MissingError) else 1
    return 0


def _run(options: argparse.Namespace, brokers: Brokers) -> None:
    names: list[str] = options.names
    match options.command:
        case "start":
            names = [_with_nodes(name, options.nodes) for name in names]
            settings = None if options.set is None else dict(_pair(text) for text in options.set)
            _install(names, allowed=not options.no_install)
            _print_urls(names, lambda name: brokers.start(name, settings, install=not options.no_install))
        case "install":
            _install(names, allowed=True)
        case "url":
            for name in names:
                print(brokers.url(name))
        case "kill":
            _each(names, brokers.kill)
        case "restart":
            _each(names, brokers.stop)
            _print_urls(names, brokers.resume)
        case "resume":
            _print_urls(names, brokers.resume)


def _with_nodes(name: str, nodes: int | None) -> str:
    """Return `kafka3` for `kafka` with 3 nodes; a variant or a label stays behind it."""
    if nodes is None or nodes == 1:
        return name
    kind = Name.parse(name).kind.name
    return f"{kind}{nodes}{name.removeprefix(kind)}"


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise BrokerError(f"--set takes KEY=VALUE, not {text!r}")
    return key, value


def _install(names: Iterable[str], *, allowed: bool) -> None:
    for kind in dict.fromkeys(Name.parse(name).kind for name in names):
        kind.install(allowed=allowed)


def _each(names: Sequence[str], act: Callable[[str], object]) -> None:
    """Do one thing to several brokers at once; the first error is raised when all are done."""
    if names:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(act, names))


def _print_urls(names: Sequence[str], act: Callable[[str], str]) -> None:
    """As `_each`, printing each broker's URL as soon as it is ready."""

    def print_url(name: str) -> None:
        print(f"{name}\t{act(name)}\n", end="", flush=True)  # one write: lines of threads do not mix

    _each(names, print_url)


def _stop(names: Sequence[str], act: Callable[[str], bool]) -> None:
    """As `_each`, printing each broker that ran as soon as it is stopped."""
    stopped = []

    def print_stopped(name: str) -> None:
        if act(name):
            stopped.append(name)
            print(f"{name}\tstopped\n", end="", flush=True)

    _each(names, print_stopped)
    if not stopped:
        print("nothing ran")


def _print_status(brokers: Brokers, *, as_json: bool) -> None:
    found = brokers.status()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    for one in found:
        print(one.name, one.state, one.url, one.pid or "-", one.version, sep="\t")


if __name__ == "__main__":
    sys.exit(main())
