"""A file is one noun, at most 400 lines; a function is one sentence, at most 60 lines without its docstring."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
READ = ("coca_video", "datasets", "configs", "app", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of lines that the docstring takes, quotes included; 0 if there is none."""
    if ast.get_docstring(function) is None:
        return 0
    return (function.body[0].end_lineno or 0) - function.body[0].lineno + 1


def too_long(root: Path) -> list[str]:
    """Every file and function below `root` over its limit, as sentences, sorted."""
    found = []
    for path in (path for folder in READ for path in (root / folder).rglob("*.py")):
        file, source = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            found.append(f"{file} has {lines} lines, {MAX_FILE_LINES} are allowed")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)
                if lines > MAX_FUNCTION_LINES:
                    found.append(
                        f"{file}:{node.lineno} {node.name} has {lines} lines, {MAX_FUNCTION_LINES} are allowed"
                    )
    return sorted(found)


def write(root: Path, *, lines: list[str], file: str = "coca_video/a.py") -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_files_and_functions_are_short() -> None:
    assert too_long(REPOSITORY) == []


def test_a_planted_long_file_is_found_in_every_folder(tmp_path: Path) -> None:
    for folder in READ:
        write(tmp_path, lines=["x = 1"] * 401, file=f"{folder}/deep/a.py")
    assert too_long(tmp_path) == sorted(f"{folder}/deep/a.py has 401 lines, 400 are allowed" for folder in READ)


def test_a_file_of_just_the_limit_passes(tmp_path: Path) -> None:
    assert too_long(write(tmp_path, lines=["x = 1"] * 400)) == []


def test_a_planted_long_function_is_found_also_inside_a_class(tmp_path: Path) -> None:
    root = write(tmp_path, lines=["class A:", "    def f(self):", *["        x = 1"] * 60])
    assert too_long(root) == ["coca_video/a.py:2 f has 61 lines, 60 are allowed"]


def test_a_docstring_does_not_count(tmp_path: Path) -> None:
    docstring = ['    """One.', *["    more"] * 30, '    """']
    assert too_long(write(tmp_path, lines=["async def f():", *docstring, *["    x = 1"] * 59])) == []
    longer = write(tmp_path, lines=["async def f():", *docstring, *["    x = 1"] * 60])
    assert too_long(longer) == ["coca_video/a.py:1 f has 61 lines, 60 are allowed"]
