"""The reference pages name everything that the code has: names, options, defaults, errors, tables, attributes."""

import ast
import inspect
import re
from pathlib import Path

import msgspec
import pytest

import trunkline
from trunkline import App, Batch, Breaker, Context, Message, Queue, Retry, Running, Service, Stream, System, Topic
from trunkline.handler import Options

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "trunkline"
DOCS = ROOT / "docs"


def page(name):
    return (DOCS / "reference" / name).read_text(encoding="utf-8")


def code_in(text):
    """Return what stands in backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def rows_below(text, heading):
    """Return (first cell's code, second cell's code) of the table below a heading."""
    table = text.partition(heading)[2]
    table = re.split(r"\n#+ ", table)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| `?([^`|]*?)`? \|", table, re.MULTILINE))


def public(cls):
    return {name for name, value in vars(cls).items() if not name.startswith("_") and callable(value)}


def test_every_public_name_is_documented():
    words = set(re.findall(r"\w+", " ".join(code_in(page("api.md")))))
    assert sorted(set(trunkline.__all__) - words) == []


def test_the_import_of_the_page_is_everything():
    (imported,) = re.findall(r"from trunkline import \((.*?)\)", page("api.md"), re.DOTALL)
    assert sorted(re.findall(r"\w+", imported)) == sorted(trunkline.__all__)


def test_every_option_of_handle_is_documented_with_its_default():
    shown = rows_below(page("api.md"), "### Options of `handle`")
    assert set(shown) == set(Options.__struct_fields__)
    in_words = {"subscription": "the service's name", "from_": "the type's home"}
    for name, default in zip(Options.__struct_fields__, Options.__struct_defaults__, strict=True):
        if name in in_words:
            assert shown[name] == in_words[name]
        elif isinstance(default, Retry | Batch):
            assert shown[name] == f"{type(default).__name__}()"
            assert default == type(default)()
        else:
            assert ast.literal_eval(shown[name]) == default


def test_the_overload_of_handle_has_the_same_options():
    overload = next(
        node
        for node in ast.walk(ast.parse(inspect.getsource(trunkline.service)))
        if isinstance(node, ast.FunctionDef) and node.name == "handle" and node.args.kwonlyargs
    )
    assert {argument.arg for argument in overload.args.kwonlyargs} == set(Options.__struct_fields__)


@pytest.mark.parametrize("cls", [Retry, Breaker, Batch])
def test_every_field_of_retry_breaker_and_batch_is_documented_with_its_default(cls):
    shown = rows_below(page("api.md"), "### `Retry`, `Breaker` and `Batch`")
    fields = {
        field.name: "(Exception,)" if field.default == (Exception,) else repr(field.default)
        for field in msgspec.structs.fields(cls)
    }
    assert {name.partition(".")[2]: said for name, said in shown.items() if name.startswith(cls.__name__)} == fields


@pytest.mark.parametrize("cls", [App, Context, Running, Service, System])
def test_every_public_method_is_documented(cls):
    words = set(re.findall(r"\w+", " ".join(code_in(page("api.md")))))
    assert sorted(public(cls) - words) == []


@pytest.mark.parametrize("cls", [Queue, Topic, Stream])
def test_every_parameter_of_a_channel_is_documented_with_its_default(cls):
    (shown,) = (text for text in code_in(page("api.md")) if text.startswith(f"{cls.__name__}(name"))
    parameters = list(inspect.signature(cls).parameters.values())
    names = [
        parameter.name if parameter.default is inspect.Parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in parameters
    ]
    assert shown == f"{cls.__name__}({names[0]}, *, {', '.join(names[1:])})"


@pytest.mark.parametrize("cls", [App, Context, Running])
def test_no_method_is_documented_that_does_not_exist(cls):
    section = page("api.md").partition(f"\n## `{cls.__name__}`")[2] or page("api.md").partition("\n## `System` and")[2]
    table = section.partition("| member |")[2].partition("\n\n")[0]
    for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE):
        for text in code_in(cell):
            name = re.match(r"(?:await )?(\w+)", text)[1]
            known = set(dir(cls)) | {"hooks", "store"}
            assert name in known, text


def test_every_attribute_of_a_message_is_documented():
    assert set(rows_below(page("message.md"), "# Message")) == set(Message.__struct_fields__)


def test_every_table_of_the_file_is_documented():
    made = set()
    for path in PACKAGE.rglob("*.py"):
        made |= set(re.findall(r"CREATE TABLE (?:IF NOT EXISTS )?(trunkline_\w+)", path.read_text(encoding="utf-8")))
    listed = re.findall(r"^\| `(trunkline_\w+)` \|", page("files.md"), re.MULTILINE)
    assert sorted(listed) == sorted(made)


def codes_in_source():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                found |= {value.value for value in values if isinstance(value, ast.Constant)}
    return {code for code in found if isinstance(code, str) and re.fullmatch(r"E\d{3}", code)}


def test_every_error_code_is_documented_and_no_other():
    text = page("errors.md")
    listed = set(re.findall(r"^\| (E\d{3}) \|", text, re.MULTILINE))
    listed |= set(re.findall(r"\| `(E\d{3}) ", text)) | set(re.findall(r"^(E\d{3}), ", text, re.MULTILINE))
    assert listed == codes_in_source()


def test_links_between_pages_lead_somewhere():
    broken = []
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            found = path.parent / name if name else path
            if not found.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in anchors(found):
                broken.append(f"{path.relative_to(ROOT)}: no {anchor} in {name}")
    assert broken == []


def anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
