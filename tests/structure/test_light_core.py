"""The wheel works with the core dependencies alone and loads nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure.source import ROOT

UV = Path(sys.executable).with_name("uv")

# Top-level modules of broker clients, web and ORM libraries, data libraries.
HEAVY = {
    "aio_pika", "aiohttp", "aiosmtplib", "aiokafka", "asyncpg", "attrs", "boto3", "cloudevents",
    "confluent_kafka", "django", "fastapi", "flask", "google", "grpc", "httpx", "kafka", "nats",
    "numpy", "opentelemetry", "pamqp", "pandas", "pika", "prometheus_client", "psycopg", "pydantic", "redis",
    "requests", "sqlalchemy", "starlette", "stripe", "twilio", "uvicorn", "zeep",
}  # fmt: skip


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def install(wheel: Path, python: Path) -> None:
    """Install the wheel in locked versions, from uv's cache where that is enough."""
    command: list[str | Path] = [UV, "pip", "install", "--quiet", "--python", python, wheel]
    command += ["--constraints", ROOT / "requirements.lock"]
    cached = subprocess.run([*command, "--offline"], capture_output=True, check=False)
    if cached.returncode != 0:
        run(*command)


@pytest.fixture(scope="session")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with Trunkline's wheel and its core dependencies only."""
    folder = tmp_path_factory.mktemp("light-core")
    interpreter = ("--python", sys.executable)
    run(UV, "build", "--quiet", "--wheel", "--no-build-isolation", *interpreter, "-o", folder, ROOT)
    (wheel,) = folder.glob("trunkline-*.whl")
    run(UV, "venv", "--quiet", *interpreter, folder / "venv")
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    install(wheel, programs / "python")
    return programs


@pytest.mark.timeout(300)  # the first run may download
@pytest.mark.xdist_group("light-core")
def test_importing_the_core_loads_no_client_web_or_orm_library(bin_folder):
    code = "import sys, trunkline; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run(bin_folder / "python", "-c", code).split())
    assert "trunkline" in loaded
    assert not loaded & HEAVY


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("light-core")
def test_importing_the_core_does_not_load_the_command_line(bin_folder):
    code = "import sys, trunkline; print(*{name.partition('.')[0] for name in sys.modules})"
    assert not set(run(bin_folder / "python", "-c", code).split()) & {"typer", "click", "rich"}


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("light-core")
def test_the_command_line_starts_with_core_dependencies_only(bin_folder):
    assert "Usage" in run(bin_folder / "trunkline", "--help", NO_COLOR="1", COLUMNS="100")


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("light-core")
def test_the_wheel_carries_its_type_marker(bin_folder):
    code = "from importlib.resources import files; print((files('trunkline') / 'py.typed').is_file())"
    assert run(bin_folder / "python", "-c", code).strip() == "True"
