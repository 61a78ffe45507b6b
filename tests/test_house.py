"""The house is kept: what is public says what it is, nothing is left over, pages and their links exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = ("coca_video", "datasets", "configs", "app", "benchmarks")
PAGES = ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$")
# "TO" "DO" in two pieces, so that this file does not find itself
NOTE = re.compile("|".join((r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b", r"\bHA" + r"CK\b")))


def python_files(root: Path, *, folders: tuple[str, ...] = CODE) -> Iterator[tuple[str, str]]:
    """(path from the root, source) of every Python file below the folders."""
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def undocumented(tree: ast.Module, *, file: str) -> Iterator[str]:
    """The module, and each public class, function and method of a public class, that has no docstring.

    Names with a leading underscore, what lies in functions, and overloads are not public.
    """
    if ast.get_docstring(tree) is None:
        yield f"{file}:1 the file says nowhere what it is"
    owners: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    while owners:
        prefix, body = owners.pop()
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                yield f"{file}:{node.lineno} {prefix}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                owners.append((f"{prefix}{node.name}.", node.body))


def anchors(markdown: str) -> set[str]:
    """The anchors of the headings of a page: lower case, no punctuation, hyphens for spaces, -1, -2 for repeats."""
    seen: dict[str, int] = {}
    found = set()
    for line in re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL).splitlines():
        if heading := HEADING.match(line):
            text = LINK.sub("]", heading.group(1)).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
            seen[slug] = seen.get(slug, 0) + 1
    return found


def broken_links(page: Path) -> list[str]:
    """The links of a page to files or headings of this repository that do not exist."""
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_a_page_exists_and_says_something(page: str) -> None:
    assert len((REPOSITORY / page).read_text(encoding="utf-8").split()) > 20


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(REPOSITORY / page) == []


def test_changelog_says_what_is_unreleased() -> None:
    assert "unreleased" in anchors((REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"))


def test_what_is_public_has_a_docstring() -> None:
    assert [
        fault for file, source in python_files(REPOSITORY) for fault in undocumented(ast.parse(source), file=file)
    ] == []


def test_no_notes_to_ourselves_and_no_old_code() -> None:
    sources = [*python_files(REPOSITORY), *python_files(REPOSITORY, folders=("tests",))]
    assert [file for file, source in sources if NOTE.search(source)] == []
    old = "leg" + "acy"
    assert [file for file, source in sources if old in file.lower() or old in source.lower()] == []


def test_the_licence_is_the_one_that_pyproject_names() -> None:
    first_words = " ".join((REPOSITORY / "LICENSE").read_text(encoding="utf-8").split()[:4])
    assert first_words == "Apache License Version 2.0,"
    assert 'license = "Apache-2.0"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_a_planted_missing_docstring_is_found() -> None:
    source = 'class A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\ndef _i(): ...\n'
    assert sorted(undocumented(ast.parse(source), file="a.py")) == [
        "a.py:1 the file says nowhere what it is",
        "a.py:3 A.f has no docstring",
        "a.py:5 h has no docstring",
    ]


def test_a_planted_note_is_found() -> None:
    assert NOTE.search("x = 1  # TO" + "DO: later")
    assert not NOTE.search("mastodons = 3")


def test_anchors_are_made_as_a_reader_of_markdown_makes_them() -> None:
    page = "# A title\n## 2025-01-02: UT-Interaction, 3 seeds (`probe`)\n## Twice\n## Twice\n```\n# no heading\n```\n"
    assert anchors(page) == {"a-title", "2025-01-02-ut-interaction-3-seeds-probe", "twice", "twice-1"}


def test_planted_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "LOG.md").write_text("## Quickstart, 3 seeds\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "# Top\n[a](LOG.md#quickstart-3-seeds) [b](LOG.md#gone) [c](GONE.md) [d](#top) [e](#gone) [f](https://example.org/x)",
        encoding="utf-8",
    )
    assert broken_links(tmp_path / "README.md") == ["LOG.md#gone", "GONE.md", "#gone"]
