"""Who may import whom: reads every import of the checkout, those inside functions too, and holds it against the table.

The tables below are the rule (CONTRIBUTING.md tells it in words). `violations` is proved on planted faults too, so that
a checker that has gone blind does not pass for a clean tree.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS_NOT_PACKAGES = ("app", "configs", "datasets")
READ = ("coca_video", "app", "benchmarks", "configs", "datasets", "tests")

# room -> the other rooms it may import; a room is a file or folder directly inside coca_video/
_CORE = frozenset({"config", "models", "data", "tokenizer", "distributed", "losses", "hub"})
ROOMS: dict[str, frozenset[str]] = {
    "": frozenset({"hub"}),  # coca_video.load
    "config": frozenset(),
    "distributed": frozenset(),
    "tokenizer": frozenset(),
    "models": frozenset(),
    "data": frozenset(),
    "losses": frozenset({"distributed"}),
    "hub": frozenset({"config", "models", "tokenizer"}),
    "synthetic": frozenset({"data"}),
    "eval": _CORE,
    "train": _CORE | {"eval"},
    "serve": _CORE | {"eval"},
    "cli": _CORE | {"eval", "train", "serve", "synthetic"},
}

# optional library -> the only files (or folders, ending in "/") of coca_video that may import it
_DECODE = ("coca_video/data/decode/",)
LIBRARIES: dict[str, tuple[str, ...]] = {
    "av": _DECODE,
    "decord": _DECODE,
    "torchcodec": _DECODE,
    "fsspec": _DECODE,
    "timm": (
        "coca_video/models/image.py",
        "coca_video/models/adapt.py",
        "coca_video/train/optim.py",
        "coca_video/hub/",
    ),
    "sklearn": ("coca_video/eval/linear.py",),
    "tokenizers": ("coca_video/tokenizer.py",),
    "ftfy": ("coca_video/tokenizer.py",),
    "regex": ("coca_video/tokenizer.py",),
    "tyro": ("coca_video/cli/",),
    "matplotlib": ("coca_video/train/log.py", "coca_video/eval/report.py"),
    "safetensors": ("coca_video/hub/",),
    "huggingface_hub": ("coca_video/hub/",),
    "tensorboard": ("coca_video/train/log.py",),
    "gradio": ("app/",),
}


def imported_names(tree: ast.Module, *, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `tree`, resolved against `package`, the dotted name of the file's folder.

    `from a import b` gives a.b, since b may be a module. `import_module(...)` and `__import__(...)` count with a
    literal name; with a computed one they give the name "<computed>".
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"), args=args
            ):
                literal = args and isinstance(args[0], ast.Constant) and isinstance(args[0].value, str)
                yield node.lineno, args[0].value if literal else "<computed>"


def room_of(dotted: str) -> str | None:
    """The room of coca_video that a dotted name lies in; "" for the package itself, None for anything else."""
    parts = dotted.split(".")
    if parts[0] != "coca_video":
        return None
    return parts[1] if len(parts) > 1 else ""


def fault_of(dotted: str, *, file: str, own_room: str | None) -> str | None:
    """What is wrong with importing `dotted` in `file` (path from the repository, with /), None if nothing is."""
    top, room = dotted.split(".")[0], room_of(dotted)
    if top in FOLDERS_NOT_PACKAGES:
        return f"imports {top}, which is a folder and not a package: load its files by path"
    if own_room is None:
        private = file.startswith("app/") and room is not None and any(p.startswith("_") for p in dotted.split("."))
        return f"imports {dotted}: the demo uses public names only" if private else None
    if dotted == "<computed>" and own_room != "cli":
        return "imports a module by a computed name, which only cli may do"
    if room in ROOMS and room != own_room and room not in ROOMS.get(own_room, frozenset()):
        return f"imports {dotted}: {own_room or 'the package itself'} may not know {room}"
    homes = LIBRARIES.get(top)
    if homes and not any(file.startswith(home) if home.endswith("/") else file == home for home in homes):
        return f"imports {top}, which belongs to {' and '.join(homes)}"
    return None


def violations(root: Path) -> list[str]:
    """Every broken import rule below `root`, as "file:line sentence", sorted."""
    found = [
        f"{folder}/{path.relative_to(root / folder).as_posix()}:1 makes {folder} a package: it must stay a folder"
        for folder in FOLDERS_NOT_PACKAGES
        for path in (root / folder).rglob("__init__.py")
    ]
    for path in (path for folder in READ for path in (root / folder).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        own_room = room_of(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
        if own_room and own_room not in ROOMS:
            found.append(f"{file}:1 lies in {own_room}, which the table of rooms does not know")
        package = ".".join(path.relative_to(root).parent.parts)
        for line, dotted in imported_names(ast.parse(path.read_text(encoding="utf-8")), package=package):
            if fault := fault_of(dotted, file=file, own_room=own_room):
                found.append(f"{file}:{line} {fault}")
    return sorted(found)


def plant(root: Path, file: str, *, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def test_the_checkout_keeps_the_import_rules() -> None:
    assert violations(REPOSITORY) == []


def test_the_checkout_has_files_to_read() -> None:
    assert (REPOSITORY / "coca_video" / "__init__.py") in set((REPOSITORY / "coca_video").rglob("*.py"))


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("coca_video/models/coca.py", "from coca_video.data.video import Clip", "models may not know data"),
        ("coca_video/data/video.py", "def f():\n    import coca_video.models.coca", "data may not know models"),
        ("coca_video/data/video.py", "from coca_video import models", "data may not know models"),
        ("coca_video/data/video.py", "from ..models import coca", "data may not know models"),
        ("coca_video/data/video.py", "from .. import models", "data may not know models"),
        ("coca_video/losses.py", "import coca_video.models", "losses may not know models"),
        ("coca_video/hub.py", "import coca_video.data", "hub may not know data"),
        ("coca_video/tokenizer.py", "import coca_video.distributed", "tokenizer may not know distributed"),
        ("coca_video/distributed.py", "import coca_video.losses", "distributed may not know losses"),
        ("coca_video/synthetic.py", "import coca_video.models", "synthetic may not know models"),
        ("coca_video/eval/metrics.py", "import coca_video.train.loop", "eval may not know train"),
        ("coca_video/train/loop.py", "if True:\n    import coca_video.cli.probe", "train may not know cli"),
        ("coca_video/__init__.py", "from coca_video.eval import metrics", "the package itself may not know eval"),
        (
            "coca_video/models/coca.py",
            "from importlib import import_module\nimport_module('coca_video.hub')",
            "know hub",
        ),
        ("coca_video/models/coca.py", "import importlib\nname = 'a'\nimportlib.import_module(name)", "computed name"),
        ("coca_video/models/video.py", "import av.container", "av, which belongs to coca_video/data/decode/"),
        ("coca_video/train/loop.py", "from tyro.conf import Positional", "tyro, which belongs to coca_video/cli/"),
        ("coca_video/models/pooler.py", "def f():\n    from timm.layers import Mlp", "timm, which belongs to"),
        ("coca_video/cli/probe.py", "import safetensors.torch", "safetensors, which belongs to coca_video/hub/"),
        ("coca_video/cli/probe.py", "import configs.probe", "configs, which is a folder"),
        ("tests/test_a.py", "from datasets.ucf import prepare", "datasets, which is a folder"),
        ("benchmarks/a.py", "import app", "app, which is a folder"),
        ("app/demo.py", "from coca_video.hub import _read", "public names only"),
        ("configs/__init__.py", "", "must stay a folder"),
        ("datasets/ucf/__init__.py", "", "must stay a folder"),
        ("coca_video/utils.py", "", "the table of rooms does not know"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    plant(tmp_path, file, source=source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")
    assert expected in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("coca_video/models/coca.py", "from coca_video.models.text import Decoder\nfrom . import pooler\nimport torch"),
        ("coca_video/losses.py", "from coca_video.distributed import gather"),
        ("coca_video/train/loop.py", "import coca_video.models.coca, coca_video.eval.metrics, coca_video.hub"),
        (
            "coca_video/cli/probe.py",
            "import tyro\nfrom coca_video.synthetic import draw\nfrom coca_video import __version__",
        ),
        (
            "coca_video/cli/__main__.py",
            "import importlib\nverb = 'probe'\nimportlib.import_module(f'coca_video.cli.{verb}')",
        ),
        ("coca_video/data/decode/decord.py", "def f():\n    import decord\n    import av"),
        ("app/demo.py", "from coca_video.hub import load"),
        ("configs/probe/a.py", "from coca_video.train.classify import ProbeConfig"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source=source)
    assert violations(tmp_path) == []


DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where a module is not called like its distribution
THROUGH_TORCH = {"tensorboard"}  # torch.utils.tensorboard imports it
EXTRAS = {"ftfy", "regex"}  # imported where it is used, with a sentence when it is missing


def test_every_imported_library_is_a_declared_dependency() -> None:
    """The wheel test borrows installed libraries, so it would not notice one that pyproject.toml forgets."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in declared}
    imported = {
        name.split(".")[0]
        for folder in ("coca_video", "app")
        for path in (REPOSITORY / folder).rglob("*.py")
        for _, name in imported_names(ast.parse(path.read_text()), package="coca_video")
    }
    beside_the_demo = {path.stem for path in (REPOSITORY / "app").glob("*.py")}  # it is run as a script
    third_party = imported - set(sys.stdlib_module_names) - beside_the_demo - {"coca_video", "<computed>"}
    assert {DISTRIBUTIONS.get(name, name).lower() for name in third_party} == (names - THROUGH_TORCH) | EXTRAS
