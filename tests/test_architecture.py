"""The house holds: imports point downwards, the public names are there, errors are documented, files are short."""

from __future__ import annotations

import ast
from pathlib import Path

import espalier
from espalier import errors

SOURCE = Path(espalier.__file__).parent
# Lower rooms first: a room may import those before it.
ROOMS = [
    "errors",
    "config",
    "runfile",
    "data",
    "encode",
    "tree",
    "model",
    "use",
    "training",
    "flags",
    "command_options",
    "cli",
    "__main__",
]
SAME_LEVEL = {("tree", "model"), ("use", "training"), ("training", "use")}


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "__init__"


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("espalier"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("espalier")}
    return {name for name in found if name != "espalier"}


def test_imports_point_downwards() -> None:
    upward, seen = [], 0
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        room = parts[0]
        if room == "__init__":
            continue
        assert room in ROOMS, f"{room} is a room that docs/architecture.md and this test do not know"
        for module in imports(file):
            seen += 1
            other = room_of(module)
            if ROOMS.index(other) > ROOMS.index(room) and (room, other) not in SAME_LEVEL:
                upward.append(f"{'/'.join(parts)} imports {module}")
    assert seen > 100
    assert upward == []


def test_public_names() -> None:
    expected = [
        "Encoded",
        "EspalierError",
        "Example",
        "LoraTrainer",
        "RunConfig",
        "__version__",
        "read_examples",
        "train",
    ]
    assert sorted(espalier.__all__) == sorted(expected)
    for name in espalier.__all__:
        assert getattr(espalier, name) is not None


def test_errors_page_lists_every_error() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(cls.__name__ for cls in classes) == sorted(errors.__all__)
    for cls in classes:
        assert cls.__name__ in (errors.__doc__ or "")
        assert cls.__doc__


def test_no_pickle_is_read_or_written() -> None:
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for word in ("pickle.load", "pickle.dump", "torch.save(", "weights_only=False"):
            assert word not in text, f"{file.name}: {word}"
