"""The READMEs: a front page of one screen or two, links and commands that lead somewhere, Python that runs."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from meanflow.config import RunConfig
from meanflow.objectives.build import OBJECTIVES

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "csrc", "kernels", "meanflow", "scripts", "tests")
FILES = [
    *ROOT.glob("*.md"),
    *(p for f in FOLDERS for p in (ROOT / f).rglob("README.md") if "before_rooms" not in p.parts),
]
TEXTS = {path: path.read_text() for path in sorted(FILES)}
each_file = pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(text: str) -> str:
    """A text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives a file's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path, text: str) -> list[str]:
    """The relative links of a file that lead nowhere, or to a heading that is not there."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target.read_text()))):
            dead.append(link)
    return dead


def dead_names(text: str) -> list[str]:
    """The scripts, modules of benchmarks and tests that a text names and that do not exist."""
    scripts = [f"scripts/{name}" for name in re.findall(r"scripts/(\w+\.(?:py|sh))", text)]
    tests = [name.rstrip("/") for name in re.findall(r"\btests/[\w/]*(?:\.\w+)?", text)]
    dead = [name for name in [*scripts, *tests] if not (ROOT / name).exists() and "NAME" not in name]
    dead += [name for name in re.findall(r"\btest_\w+\.py", text) if name != "test_NAME.py" and not found(name)]
    modules = re.findall(r"python -m benchmarks\.(\w+)", text)
    return dead + [name for name in modules if importlib.util.find_spec(f"benchmarks.{name}") is None]


def found(name: str) -> list[Path]:
    return list((ROOT / "tests").rglob(name))


def test_the_front_page_is_short():
    lines = TEXTS[ROOT / "README.md"].splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@each_file
def test_links_lead_somewhere(path):
    assert dead_links(path, TEXTS[path]) == []


@each_file
def test_commands_exist(path):
    assert dead_names(TEXTS[path]) == []


@each_file
def test_options_exist(path):
    """Those of a run, as they are typed and as tables name them."""
    sections = {
        section.name: {f.name for f in dataclasses.fields(section.type)} for section in dataclasses.fields(RunConfig)
    }
    sections["objective"] = {f.name for made in OBJECTIVES for f in dataclasses.fields(made)}
    for section, option in re.findall(rf"(?:--|`)({'|'.join(sections)})\.(?!py)([a-z_-]+)", TEXTS[path]):
        option = option.replace("-", "_")
        known = sections[section]
        assert option in known or option.removeprefix("no_") in known, f"{section}.{option}"


def test_what_is_dead_is_found():
    text = "[a](nowhere.md) [b](README.md#nothing) [c](#a-title) [d](README.md)\n# A title\n```\n# b\n```\n[e](#b)"
    assert dead_links(ROOT / "x.md", text.replace("#a-title", "README.md#start")) == [
        "nowhere.md",
        "README.md#nothing",
        "#b",
    ]
    text = "bash scripts/no.sh, python -m benchmarks.no, tests/no/, test_no.py; python -m benchmarks.step, tests/data"
    assert dead_names(text) == ["scripts/no.sh", "tests/no", "test_no.py", "no"]


def test_faults_name_tests():
    """Each word of the table of faults is in the name of a test, of the file where one is named."""
    table = TEXTS[ROOT / "meanflow" / "README.md"].partition("| what happens |")[2].partition("\n\n")[0]
    names = re.findall(r"`(?:(test_\w+\.py))?(?: ?-k (\w+))?`", table)
    assert len(names) >= 10
    for file, word in names:
        functions = re.findall(
            r"^def (test_\w+)", "\n".join(p.read_text() for p in found(file or "test_*.py")), re.MULTILINE
        )
        assert functions and any(word in name for name in functions), (file, word)


BLOCKS = [
    (path, code)
    for path, text in TEXTS.items()
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("path, code", BLOCKS, ids=[str(path.relative_to(ROOT)) for path, _ in BLOCKS])
def test_python_runs(path, code, tmp_path, monkeypatch):
    if "pipeline" in code:
        pytest.importorskip("diffusers", reason="the pipeline is diffusers'")
    (tmp_path / "digits-pipeline").symlink_to(ROOT / "tests" / "data" / "before_rooms" / "pipeline")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(path), "exec"), {})
