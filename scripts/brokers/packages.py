"""Getting what brokers are made of: Debian's packages and Maven's jars.

Invariant: no package starts a service of its own, and no jar is used whose hash is not the locked one.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from scripts.brokers.errors import BrokerError, MissingError

MAVEN_REPOSITORY = "https://repo1.maven.org/maven2"
MAKE = "make brokers"

# policy-rc.d is Debian's switch against starting services; where the machine has one of its own, that one decides.
# Units are disabled as well, or the package's server would come up with the next boot.
APT = """
set -e
services=$1; shift
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\\nexit 101\\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q -o DPkg::Lock::Timeout=300 update || true
apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "$@"
if [ -d /run/systemd/system ]; then
    for service in $services; do systemctl disable --quiet "$service" || true; done
fi
"""


def cache() -> Path:
    """Return the folder of downloads, shared by all clones."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRUNKLINE_CACHE") or Path(home) / "trunkline")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; it goes with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(program: str, *folders: str) -> str | None:
    """Return the path of a program in one of `folders` (patterns; the last match wins) or on PATH."""
    for pattern in folders:
        matches = sorted(Path("/").glob(pattern.lstrip("/") + "/" + program))
        if matches:
            return str(matches[-1])
    return shutil.which(program)


def need(program: str, package: str, *folders: str) -> str:
    """Return the path of a program. Raises: MissingError with how to install it."""
    path = find(program, *folders)
    if path is None:
        raise MissingError(f"{program} is not installed; run: {MAKE}    (Debian, Ubuntu: apt-get install {package})")
    return path


def apt_install(packages: Sequence[str], services: Sequence[str] = (), *, allowed: bool) -> None:
    """Install Debian packages without starting the services they bring.

    Raises: MissingError if it is not allowed, or there is no apt-get or no right to use it; BrokerError if it fails.
    """
    command = f"apt-get install {' '.join(packages)}"
    if not allowed:
        raise MissingError(f"not installed: {', '.join(packages)}; run: {MAKE}    (or: {command})")
    if shutil.which("apt-get") is None:
        raise MissingError(f"not installed: {', '.join(packages)}, and there is no apt-get; install them and try again")
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if root and (shutil.which("sudo") is None or subprocess.run([*root, "true"], check=False).returncode):
        raise MissingError(f"not installed: {', '.join(packages)}; run: sudo {command}")
    print(f"brokers: installing {', '.join(packages)}", file=sys.stderr)
    with locked(cache() / "apt.lock"):
        done = subprocess.run(
            [*root, "sh", "-c", APT, "sh", " ".join(services), *packages],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise BrokerError(f"{command} failed with {done.returncode}:\n{done.stdout[-3000:]}")


def locked_jars(lock: Path) -> dict[str, str]:
    """Return path in the repository to SHA-256, from the lines of a lock file."""
    lines = [line.split() for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    return {path: digest for digest, path in lines}


def jars_missing(jars: dict[str, str], folder: Path) -> list[str]:
    """Return the jars that are not in `folder`; what is there was checked when it came."""
    return [path for path in jars if not (folder / Path(path).name).exists()]


def download_jars(jars: dict[str, str], folder: Path, *, allowed: bool) -> None:
    """Bring `folder` up to what the lock file names. Raises: MissingError if not allowed, BrokerError if it fails."""
    if not jars_missing(jars, folder):
        return
    if not allowed:
        raise MissingError(f"{folder.name} is not downloaded; run: {MAKE}")
    with locked(cache() / "maven.lock"), ThreadPoolExecutor(4) as pool:
        missing = jars_missing(jars, folder)
        print(f"brokers: downloading {len(missing)} jars of {folder.name}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        list(pool.map(lambda path: _download(path, jars[path], folder), missing))


def _download(path: str, digest: str, folder: Path) -> None:
    url = f"{(os.environ.get('MAVEN_REPOSITORY') or MAVEN_REPOSITORY).rstrip('/')}/{path}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - the repository is the user's choice
            data: bytes = answer.read()
    except OSError as error:
        raise BrokerError(f"cannot download {url}: {error}; MAVEN_REPOSITORY names another repository") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise BrokerError(f"{url} has the SHA-256 {actual}, kafka.lock says {digest}")
    part = folder / (Path(path).name + ".part")
    part.write_bytes(data)
    part.rename(folder / Path(path).name)
