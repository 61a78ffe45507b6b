"""Help comes at once: it imports none of the heavy libraries. Asserted on modules, not on seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "av",
    "decord",
    "torchcodec",
    "fsspec",
    "matplotlib",
    "tokenizers",
    "huggingface_hub",
    "tensorboard",
    "sklearn",
    "scipy",
    "gradio",
}
VERBS = (
    "doctor",
    "prepare",
    "transcode",
    "tokenizer",
    "pretrain",
    "probe",
    "sweep",
    "linear",
    "evaluate",
    "predict",
    "caption",
    "demo",
    "quickstart",
)

# writes the names of the loaded modules to the file named first, then exits as the program did
PROGRAM = """
import sys
from pathlib import Path

loaded, sys.argv = Path(sys.argv[1]), ["coca-video", *sys.argv[2:]]
status = 0
try:
    from coca_video.cli.__main__ import main

    status = main()
except SystemExit as exit:
    status = exit.code
loaded.write_text("\\n".join(sys.modules))
sys.exit(status)
"""


def heavy(modules: str) -> set[str]:
    """Those of the heavy libraries that a list of module names, one a line, has."""
    return HEAVY & {name.split(".")[0] for name in modules.splitlines()}


def start(*arguments: str, loaded: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(loaded), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_no_heavy_library(tmp_path: Path, verb: str | None) -> None:
    loaded = tmp_path / "modules.txt"
    done = start(*([verb] if verb else []), "--help", loaded=loaded)
    assert done.returncode == 0, done.stderr
    assert [word for word in ([verb] if verb else VERBS) if word not in done.stdout] == []
    assert heavy(loaded.read_text()) == set()


def test_a_heavy_library_would_be_seen(tmp_path: Path) -> None:
    modules = subprocess.run(
        [sys.executable, "-c", "import av, sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert heavy(modules) == {"av"}
    assert heavy("torch.nn\ntorchlike\njson") == {"torch"}


def test_an_unknown_verb_is_a_sentence(tmp_path: Path) -> None:
    loaded = tmp_path / "modules.txt"
    done = start("evalaute", loaded=loaded)
    assert done.returncode == 2
    assert "evalaute" in done.stderr
    assert "evaluate" in done.stderr  # says what there is
    assert "Traceback" not in done.stderr
    assert heavy(loaded.read_text()) == set()


def test_commands_are_printed_as_they_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name where the shell finds this very program, by path where it would find none or another."""
    from coca_video.cli.arguments import call

    script = tmp_path / "venv" / "coca-video"
    for path in (script, tmp_path / "other" / "coca-video"):
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(script), "quickstart"])
    answers = {"venv": "coca-video", "other": str(script), "nowhere": str(script)}
    for folder, expected in answers.items():
        monkeypatch.setenv("PATH", str(tmp_path / folder))
        assert call() == expected
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert call() == "coca-video"
