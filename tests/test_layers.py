"""The plan of the house: which room may import which. A room imports only from the floors below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "model": 0, "records": 0, "wikitext": 0, "processes": 0, "splits": 0,
    "tokenizer": 1, "runtime": 1, "metrics": 1, "sources": 1, "rows": 1, "lora": 1, "packed": 1,
    "wordpiece": 2, "formats": 2, "classifier": 2, "resume": 2,
    "corpus": 3, "checkpoint": 3, "dialogue": 3,
    "generate": 4, "runs": 4, "preview": 4,
    "evaluate": 5, "rehearsal": 5, "terminal": 5, "batching": 5, "explore": 5,
    "training": 6, "report": 6, "tasks": 6, "openai_api": 6,
    "door": 7, "server": 8,
}
SCRIPTS = ("train", "finetune", "sample")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "nanochat":
            rooms |= {alias.name for alias in node.names if alias.name[0].islower() and alias.name in FLOORS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanochat."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nanochat.")}
    return rooms


def test_every_room_has_a_floor():
    assert {path.stem for path in (ROOT / "nanochat").glob("[!_]*.py")} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_point_down(room):
    for other in imported_rooms(ROOT / "nanochat" / f"{room}.py"):
        assert FLOORS[other] < FLOORS[room], f"{room} imports {other}"


def test_nothing_imports_a_script():
    for path in [*(ROOT / "nanochat").glob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(SCRIPTS), path


def test_only_the_scripts_use_tyro():
    for path in (ROOT / "nanochat").glob("*.py"):
        assert "tyro" not in path.read_text(encoding="utf-8"), path
