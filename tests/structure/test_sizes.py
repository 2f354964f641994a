"""The package stays small enough to read: files, functions, depth, names."""

from tests.structure.source import PACKAGE, sources

FILE_LINES = 700
ADAPTER_LINES = 600
FUNCTION_LINES = 60
USUAL_FUNCTION_LINES = 30
USUAL_SHARE = 0.9
DOTTED_DEPTH = 4
FAMILIES_OF_ADAPTERS = {"transports", "stores"}
NAMES_THAT_SAY_NOTHING = {"base", "common", "helpers", "manager", "utils"}


def test_no_file_is_too_long():
    too_long = {}
    for source in sources():
        adapter = source.path.parent.name in FAMILIES_OF_ADAPTERS
        lines = len(source.text.splitlines())
        if lines > (ADAPTER_LINES if adapter else FILE_LINES):
            too_long[source.name] = lines
    assert not too_long


def test_no_function_is_too_long():
    too_long = {where: lines for source in sources() for where, lines in source.functions() if lines > FUNCTION_LINES}
    assert not too_long


def test_nine_functions_in_ten_are_short():
    lengths = dict(pair for source in sources() for pair in source.functions())
    longer = {where: lines for where, lines in lengths.items() if lines > USUAL_FUNCTION_LINES}
    assert len(longer) <= (1 - USUAL_SHARE) * len(lengths), longer


def test_no_module_lies_too_deep():
    too_deep = []
    for source in sources():
        parts = source.path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = parts[:-1] if parts[-1] == "__init__" else parts
        if len(module) > DOTTED_DEPTH:
            too_deep.append(".".join(module))
    assert not too_deep


def test_every_file_name_says_what_is_in_it():
    nameless = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.stem.strip("_") in NAMES_THAT_SAY_NOTHING
    ]
    assert not nameless
