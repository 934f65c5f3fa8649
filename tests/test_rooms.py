"""The house: which room may import which, and that nobody imports those who look in from outside."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# csrc -> kernels -> meanflow -> scripts
ROOMS = {  # folder: the project's own modules it may import
    "kernels": {"meanflow_kernels"},
    "meanflow": {"meanflow_kernels", "meanflow"},
    "scripts": {"meanflow_kernels", "meanflow"},
    "benchmarks": {"meanflow_kernels", "meanflow", "benchmarks"},
}
# what a file of ours may name; a file of tests/ by its stem alone, as they name each other
OURS = set().union({"tests", "scripts"}, *ROOMS.values(), (path.stem for path in (ROOT / "tests").rglob("*.py")))


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_direction(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not imports(path) & OURS - ROOMS[room], path


# the rooms of two packages, each with those it may import; "" is the package's root
INNER = {
    "meanflow": {
        "recipes": set(),
        "model": set(),
        "method": set(),
        "objectives": {"method", "recipes"},
        "storage": set(),
        "data": set(),
        "evaluation": {"method", "data", "storage"},
        "interop": {"model", "method", "data", "storage"},
        "training": {"model", "method", "objectives", "data", "storage", "evaluation", "interop"},
        "apps": {"method", "objectives", "data", "storage", "evaluation", "interop", "training"},
        "": {"recipes"},
    },
    "benchmarks": {
        "harness": set(),
        "counting": {"harness"},
        "workloads": {"harness", "counting"},
        "parts": {"harness", "workloads"},
        "tuning": {"harness", "workloads"},
        "static": set(),
        "pages": {"harness", "counting", "workloads"},
        "": {"harness", "counting", "workloads", "parts", "tuning", "static", "pages"},
    },
}
SHARED_ROOT = {"meanflow"}
"""Packages whose root all rooms may import; at the root of the others stands what people call."""
MOST_MODULES, LONGEST_CHAIN, LONGEST_CHAIN_OF_ROOMS, MOST_LINES = 12, 8, 4, 400


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names within it, rooms left out."""
    folder = ROOT / package
    files = (p for p in folder.rglob("*.py") if p.name != "__init__.py")
    return {".".join(p.relative_to(folder).with_suffix("").parts): p for p in files}


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def inner_imports(package: str, module: str, path: Path, lazy: bool) -> set[str]:
    """The modules of the package that one imports; lazy: those that it imports when a function is called, too."""
    known, found, tree = modules(package), set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = room_of(module).split(".") if room_of(module) else []
        base = base[: len(base) - node.level + 1] + (node.module.split(".") if node.module else [])
        inside = {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
        found |= inside & known.keys()
    return found


def graph(package: str, lazy: bool) -> dict[str, set[str]]:
    return {name: inner_imports(package, name, path, lazy) for name, path in modules(package).items()}


def chain(edges: dict[str, set[str]], start: str, seen: tuple[str, ...] = ()) -> list[str]:
    """The longest way down from a node; fails on a circle."""
    assert start not in seen, [*seen, start]
    ways = [chain(edges, end, (*seen, start)) for end in edges[start]]
    return [start, *max(ways, key=len, default=[])]


@pytest.mark.parametrize("package", INNER)
def test_the_rooms_import_downwards(package):
    allowed, shared = INNER[package], {""} if package in SHARED_ROOT else set()
    assert {room_of(module) for module in modules(package)} == allowed.keys()
    for module, imported in graph(package, lazy=True).items():
        rooms = {room_of(name) for name in imported} - {room_of(module)} - shared
        assert rooms <= allowed[room_of(module)], module


@pytest.mark.parametrize("package", INNER)
def test_chains_are_short_and_no_circle(package):
    edges, lazily = graph(package, lazy=False), graph(package, lazy=True)
    longest = max((chain(edges, module) for module in edges), key=len)
    assert len(longest) <= LONGEST_CHAIN, longest
    for module in lazily:
        chain(lazily, module)  # no circle among them either
    inner = {room: below for room, below in INNER[package].items() if room}
    longest = max((chain(inner, room) for room in inner), key=len)
    assert len(longest) <= LONGEST_CHAIN_OF_ROOMS, longest


def test_rooms_and_modules_are_small():
    for package, rooms in INNER.items():
        for room in rooms.keys() if package in SHARED_ROOT else rooms.keys() - {""}:
            held = [name for name in modules(package) if room_of(name) == room]
            assert len(held) <= MOST_MODULES, held
    files = [path for folder in ROOMS for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *(ROOT / "tests").rglob("*.py")]:
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES, (path, lines)


def test_on_top_of_the_benchmarks_stands_what_people_call():
    for name, path in modules("benchmarks").items():
        is_bench = name.startswith("bench_") or name == "conftest"
        is_command = 'if __name__ == "__main__":' in path.read_text()
        assert (is_bench or is_command) == (not room_of(name)), name


def test_top_level():
    for name in ("README.md", "setup.py", "csrc", "meanflow", "kernels", "benchmarks", "tests", "scripts"):
        assert (ROOT / name).exists(), name
    # Hugging Face's package `kernels` keeps its name: the folder is none
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_is_unpickled():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            for call in calls:
                name = ast.unparse(call.func)
                # weights_only reads tensors and plain containers, and runs nothing
                tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                assert name != "torch.load" or tensors_only, path
                assert name not in ("pickle.load", "pickle.loads"), path
                allowed = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
                assert not allowed, path
