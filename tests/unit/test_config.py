"""Where settings come from, and what is refused."""

import pytest

from trunkline.config import load_settings
from trunkline.errors import ConfigurationError

FILE = 'transport = "sqlite:///file.db"\nstore = "sqlite:///file-store.db"\napp = "shop:system"\n'
ENVIRONMENT = {"TRUNKLINE_TRANSPORT": "sqlite:///env.db", "TRUNKLINE_STORE": "sqlite:///env-store.db"}


def test_an_argument_wins_over_the_environment_over_the_file_over_the_default(tmp_path):
    def transport(**options):
        return load_settings(folder=tmp_path, **options).transport

    assert transport(environ={}) == "sqlite:///trunkline.db"
    (tmp_path / "trunkline.toml").write_text(FILE)
    assert transport(environ={}) == "sqlite:///file.db"
    assert transport(environ=ENVIRONMENT) == "sqlite:///env.db"
    assert transport(environ=ENVIRONMENT, transport="memory:") == "memory:"


def test_each_setting_says_where_it_comes_from(tmp_path):
    (tmp_path / "trunkline.toml").write_text(FILE)
    found = load_settings(folder=tmp_path, environ={"TRUNKLINE_STORE": "sqlite:///e.db"}, app="other:system")
    assert found.origin == {"app": "the command line", "store": "TRUNKLINE_STORE", "transport": "trunkline.toml"}
    assert (found.app, found.store) == ("other:system", "sqlite:///e.db")


def test_the_store_is_the_transports_database_unless_said_otherwise(tmp_path):
    found = load_settings(folder=tmp_path, environ={}, transport="sqlite:///a.db")
    assert found.store == "sqlite:///a.db"
    assert found.origin["store"] == "the transport"


def test_an_empty_variable_counts_as_unset(tmp_path):
    assert load_settings(folder=tmp_path, environ={"TRUNKLINE_TRANSPORT": ""}).transport == "sqlite:///trunkline.db"


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b"\xff\xfe", "E224", "cannot be read"),
        (b"transport = ", "E221", "is not TOML"),
        (b'transports = "memory:"', "E222", "did you mean 'transport'?"),
        (b"[run]\nworkers = 2", "E222", "keys are: transport, store, app"),
        (b"app = 7", "E223", "app is 7"),
        (b'store = ""', "E223", "text is needed"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(tmp_path, content, code, text):
    (tmp_path / "trunkline.toml").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(folder=tmp_path, environ={})
    assert caught.value.code == code
    assert text in str(caught.value)
