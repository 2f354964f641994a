"""The runner of documentation pages notices when a page is wrong."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.docs.code_blocks import PageError, blocks, first_missing

RUNNER = Path(__file__).with_name("code_blocks.py")


@pytest.fixture
def run_page(tmp_path):
    """Return a function that runs a page in an empty folder and returns (exit status, output)."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(text):
        page = tmp_path / "page.md"
        page.write_text(textwrap.dedent(text), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, RUNNER, page],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return run


def test_blocks_of_a_page_share_one_namespace_in_order(run_page):
    page = """
        ```python
        count = 1
        ```
        words
        ```python
        print("count is", count + 1)
        ```
        """
    assert run_page(page) == (0, "count is 2\n")


def test_a_class_can_be_found_through_its_module(run_page):
    page = """
        ```python
        import typing
        class Order: ...
        def take(order: "Order"): ...
        assert typing.get_type_hints(take) == {"order": Order}
        import sys
        assert sys.modules[Order.__module__].Order is Order
        ```
        """
    assert run_page(page) == (0, "")


def test_a_failing_block_fails_the_page_and_names_its_line(run_page):
    status, output = run_page("# Title\n\n```python\n\n1 / 0\n```\n")
    assert status == 1
    assert "page.md" in output
    assert "line 5" in output
    assert "ZeroDivisionError" in output


def test_a_file_block_is_written_and_can_be_imported_and_run(run_page):
    page = """
        <!-- file: pack/shop.py -->
        ```python
        price = 3
        if __name__ == "__main__":
            print("the price is", price)
        ```
        ```python
        from pack.shop import price
        assert price == 3
        ```
        ```console
        $ python pack/shop.py
        the price is 3
        ```
        """
    assert run_page(page) == (0, "")


def test_a_block_marked_no_run_is_skipped(run_page):
    assert run_page("<!-- no-run: needs a broker -->\n```python\n1 / 0\n```\n") == (0, "")


def test_a_block_of_another_language_does_nothing(run_page):
    assert run_page("```toml\nnot = = toml\n```\n```\nplain\n```\n") == (0, "")


def test_output_that_the_page_shows_but_the_command_does_not_print_fails(run_page):
    status, output = run_page("```console\n$ echo one\ntwo\n```\n")
    assert status == 1
    assert "lacks the line 'two'" in output


def test_dots_stand_for_anything(run_page):
    page = """
        ```console
        $ printf 'start\\nid 123 kept\\nmore\\nend\\n'
        start
        id ... kept
        ...
        end
        ```
        """
    assert run_page(page) == (0, "")


def test_each_command_of_a_console_block_is_checked(run_page):
    page = """
        ```console
        $ echo one \\
          two
        one two
        $ false
        ```
        """
    status, output = run_page(page)
    assert status == 1
    assert "exit status 1, not 0" in output


def test_another_exit_status_can_be_expected(run_page):
    assert run_page("<!-- exit: 3 -->\n```console\n$ exit 3\n```\n") == (0, "")
    assert run_page("<!-- exit: 3 -->\n```console\n$ true\n```\n")[0] == 1


def test_a_shell_script_stops_at_its_first_failure(run_page):
    assert run_page("```bash\nfalse\ntrue\n```\n")[0] == 1
    assert run_page("```sh\nmkdir here\ncd here\n```\n") == (0, "")


def test_commands_find_the_programs_of_the_environment(run_page):
    page = f"```console\n$ python -c 'import sys; print(sys.prefix)'\n{sys.prefix}\n```\n"
    assert run_page(page) == (0, "")


def test_a_block_inside_a_list_is_dedented():
    (block,) = blocks("- item\n\n  ```python\n  if True:\n      x = 1\n  ```\n")
    assert block.text == "if True:\n    x = 1\n"
    assert block.line == 4


def test_a_longer_fence_may_hold_a_shorter_one():
    (block,) = blocks("````markdown\n```python\n1 / 0\n```\n````\n")
    assert block.language == "markdown"


@pytest.mark.parametrize(
    "page",
    [
        "```python\nx = 1\n",
        "<!-- no-run: -->\n```python\n```\n",
        "<!-- file: a.py -->\nwords\n```python\n```\n",
        "<!-- file: a.py -->\n",
    ],
    ids=["not closed", "no reason", "no block directly after", "no block at all"],
)
def test_a_page_written_wrongly_is_refused(page):
    with pytest.raises(PageError):
        list(blocks(page))


def test_lines_must_appear_in_order():
    assert first_missing(["b", "a"], "a\nb\n") == "a"
    assert first_missing(["a", "b"], "a\nx\nb\n") is None
