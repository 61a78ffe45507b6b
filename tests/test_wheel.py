"""The wheel stands on its own: built, installed in a fresh environment, used from a folder that is not the checkout."""

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = "Scripts" if sys.platform == "win32" else "bin"
SMALL = {
    "--num-pictures": "64",
    "--num-train-clips": "20",
    "--num-test-clips": "10",
    "--pretrain-steps": "4",
    "--probe-steps": "4",
}

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The wheel, the environment it was installed in, and an empty folder to work in."""

    wheel: Path
    environment: Path
    elsewhere: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment in the empty folder; its exit status must be 0."""
        return run([str(self.environment / BIN / program), *arguments], folder=self.elsewhere)


def run(command: Sequence[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH could bring the checkout back in; the cache must not be the user's
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"COCA_VIDEO_CACHE": str(folder / "cache"), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that finds this environment's libraries, but not its coca_video.

    This environment's own .pth files (an editable install is one) are not read again through ours.
    """
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "Lib" / "site-packages" if sys.platform == "win32" else folder / "lib" / tag / "site-packages"
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    dist, elsewhere = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("elsewhere")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), "."], folder=REPOSITORY)
    (wheel,) = dist.glob("coca_video-*.whl")
    environment = fresh_environment(tmp_path_factory.mktemp("fresh") / "venv")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / BIN / "python"), "install"]
    # --ignore-installed: pip sees the editable install through libraries.pth, and that one is not ours to remove
    run([*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], folder=elsewhere)
    return Installed(wheel=wheel, environment=environment, elsewhere=elsewhere)


def shipped_files() -> Iterator[str]:
    """The files of configs/, datasets/ and app/ that git keeps (or would keep), as paths from the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "configs", "datasets", "app"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    yield from (line for line in listing.splitlines() if (REPOSITORY / line).is_file())


def accuracies(report: object, *, below: bool = False) -> Iterator[float]:
    """Every number of a report that lies below a key with "accuracy" or "accuracies" in it."""
    match report:
        case dict():
            for key, value in report.items():
                yield from accuracies(value, below=below or "accurac" in str(key))
        case list():
            for value in report:
                yield from accuracies(value, below=below)
        case int() | float() if below:
            yield float(report)


def test_the_wheel_carries_the_folders_as_data(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    expected = sorted(f"coca_video/_shipped/{file}" for file in shipped_files())
    assert any(file.startswith("coca_video/_shipped/configs/") for file in expected)
    assert sorted(name for name in names if name.startswith("coca_video/_shipped/")) == expected
    assert "coca_video/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"coca_video"}


def test_the_package_comes_from_the_fresh_environment(installed: Installed) -> None:
    said = installed.run("python", "-c", "import coca_video; print(coca_video.__file__)").stdout.strip()
    assert Path(said).resolve().is_relative_to(installed.environment.resolve())


def test_help_says_how_to_use_the_quickstart(installed: Installed) -> None:
    said = installed.run("coca-video", "quickstart", "--help").stdout
    assert [option for option in ("--out", *SMALL) if option not in said] == []


def test_the_demo_is_the_one_that_came_along(installed: Installed) -> None:
    """And not what somebody's own project has in its app/demo.py."""
    (installed.elsewhere / "app").mkdir()
    (installed.elsewhere / "app" / "demo.py").write_text("raise SystemExit(7)\n")
    assert "--keep-minutes" in installed.run("coca-video", "demo", "--help").stdout


def test_a_small_quickstart_runs_and_reports_accuracies(installed: Installed) -> None:
    installed.run("coca-video", "quickstart", "--out", "run", *itertools.chain(*SMALL.items()))
    report = json.loads((installed.elsewhere / "run" / "report.json").read_text(encoding="utf-8"))
    found = list(accuracies(report))
    assert len(found) >= 3  # pretrained, random, middle frame
    assert all(0.0 <= accuracy <= 1.0 for accuracy in found)
