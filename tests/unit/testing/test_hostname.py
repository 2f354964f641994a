"""A host name that is known or not, to processes of a test only."""

import subprocess
import sys

import pytest

from trunkline.testing import hostname
from trunkline.testing.hostname import HostName

LOOK = """
import socket, sys
for line in sys.stdin:
    try:
        print(socket.getaddrinfo("here.test", 80)[0][4][0], flush=True)
    except OSError as error:
        print("unknown", flush=True)
"""


@pytest.mark.skipif(hostname.namespace() is None, reason="unshare gives no mount namespace here")
def test_a_name_is_known_to_a_running_process_as_the_test_says(tmp_path):
    name = HostName("here.test", "127.0.0.7", tmp_path / "names")
    found = []
    with subprocess.Popen(
        [*name.command(), sys.executable, "-c", LOOK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for act in (lambda: None, name.learn, name.forget, name.learn):
            act()
            process.stdin.write("\n")
            process.stdin.flush()
            found.append(process.stdout.readline().strip())
        process.stdin.close()
    assert found == ["unknown", "127.0.0.7", "unknown", "127.0.0.7"]


def test_a_machine_that_cannot_do_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hostname, "namespace", lambda: None)
    with pytest.raises(OSError, match="no mount namespace"):
        HostName("here.test", "127.0.0.7", tmp_path / "names").command()
