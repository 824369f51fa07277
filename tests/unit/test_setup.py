"""Setting up a clone, with stand-ins for Python, apt and the rest that write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for the machine's Python and, copied there by `-m venv`, for .venv's. $FAKE is the folder of what it is told.
PYTHON = """#!/bin/bash
case "$*" in
    *version_info*|"-c import"*) exit 0 ;;
    *sys.version*) cat "$FAKE/version"; exit ;;
    --version) echo Python; exit ;;
esac
echo "python $*" >>"$FAKE/calls"
[[ -e $FAKE/slow ]] && sleep 0.1
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$FAKE"/tools/* .venv/bin ;;
    *"pip install"*) [[ ! -e $FAKE/pip-fails ]] ;;
    *"pip check"*) [[ ! -e $FAKE/conflict ]] || { echo 'x wants y'; exit 1; } ;;
    "-m pytest"*) env >"$FAKE/environment"; exit 5 ;;
esac
"""
TOOL = """#!/bin/bash
echo "$(basename "$0") $*" >>"$FAKE/calls"
[[ ! -e $FAKE/$(basename "$0")-fails ]]
"""
# `unknown` has a package that apt has no version of: it is not there, or only a name for others.
APT = """#!/bin/bash
[[ $* == *update* && -e $FAKE/offline ]] && exit 100
[[ $* == *update* ]] && exec touch "$FAKE/updated"
all=$* packages=${all##*-recommends }
echo "apt-get $packages" >>"$FAKE/calls"
[[ -e $FAKE/apt-fails || " $packages " == *" $(cat "$FAKE/unknown" 2>/dev/null) "* ]] && exit 100
for package in $packages; do printf '#!/bin/true' >"$FAKE/bin/fake-$package"; chmod +x "$FAKE/bin/fake-$package"; done
"""
APT_CACHE = """#!/bin/bash
[[ ! -e $FAKE/updated || $2 == "$(cat "$FAKE/unknown" 2>/dev/null)" ]] || echo "$2 | 1.0 | somewhere"
"""
SET_UP = ["bash", "-euo", "pipefail", "-c", "source scripts/lib/setup.sh; set_up"]
BUILD = ["python -m venv .venv", "requirements-build.lock", "requirements.lock", "--editable ."]


@dataclass(frozen=True, slots=True)
class Clone:
    """A folder with the scripts and next to nothing else, and the folder of the stand-ins."""

    folder: Path
    fake: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment(environment), capture_output=True, text=True, check=False
        )

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        return {"PATH": f"{self.fake}/bin:/usr/bin:/bin", "FAKE": str(self.fake), **more}

    def set_up(self) -> subprocess.CompletedProcess[str]:
        return self.run(*SET_UP)

    def calls(self) -> list[str]:
        """What was called since this was last asked; of a pip install only what it installs."""
        log = self.fake / "calls"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        installed = [
            " ".join(line.split()[-2:]).removeprefix("-r ") if "pip install" in line else line for line in lines
        ]
        return [line for line in installed if "pip check" not in line]

    def tell(self, name: str, text: str = "") -> None:
        (self.fake / name).write_text(text, encoding="utf-8")


def shortened(call: str) -> str:
    return " ".join(call.split()[-2:]).removeprefix("-r ") if "pip install" in call else call


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    made = Clone(tmp_path / "clone", tmp_path / "fake")
    shutil.copytree(ROOT / "scripts", made.folder / "scripts")
    for name in ("requirements-build.lock", "requirements.lock", "pyproject.toml"):
        (made.folder / name).write_text(name, encoding="utf-8")
    (made.folder / "testbed").mkdir()
    packages = "# comment\n\npython3  python:sys  build  all\nwalker  command:sh  required  walking\n"
    (made.folder / "testbed/packages.txt").write_text(packages, encoding="utf-8")
    executable(made.fake / "bin/python3", PYTHON)
    executable(made.fake / "bin/apt-get", APT)
    executable(made.fake / "bin/apt-cache", APT_CACHE)
    executable(made.fake / "bin/id", "#!/bin/sh\ncat $FAKE/uid\n")
    executable(made.fake / "bin/unshare", "#!/bin/true\n")
    for tool in ("ruff", "mypy"):
        executable(made.fake / "tools" / tool, TOOL)
    made.tell("version", "3.11")
    made.tell("uid", "0")
    return made


def need(clone: Clone, when: str, package: str = "fiddle") -> None:
    """Let the clone want a package that the machine does not have, whatever else the machine has."""
    with (clone.folder / "testbed/packages.txt").open("a", encoding="utf-8") as packages:
        packages.write(f"{package}  command:fake-{package}  {when}  fiddling in time\n")


def test_a_fresh_clone_gets_its_venv_and_the_second_run_does_nothing(clone: Clone) -> None:
    assert clone.set_up().returncode == 0
    assert clone.calls() == BUILD

    second = clone.set_up()

    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert clone.calls() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param("echo x >>requirements.lock", BUILD, id="lock"),
        pytest.param("echo x >>requirements-build.lock", BUILD, id="build lock"),
        pytest.param("echo 3.12 >$FAKE/version", BUILD, id="python"),
        pytest.param("rm .venv/stamp-packages", BUILD, id="half made"),
        pytest.param("rm .venv/bin/python", BUILD, id="python gone"),
        pytest.param("rm -r .venv", BUILD, id="no venv"),
        pytest.param("echo x >>pyproject.toml", BUILD[3:], id="pyproject"),
        pytest.param("rm .venv/stamp-project", BUILD[3:], id="project not installed"),
    ],
)
def test_what_changed_decides_what_is_made_again(clone: Clone, change: str, expected: list[str]) -> None:
    clone.set_up()
    clone.calls()
    clone.run("sh", "-c", change)

    assert clone.set_up().returncode == 0
    assert clone.calls() == expected
    clone.set_up()
    assert clone.calls() == []


def test_a_copied_clone_does_not_use_the_venv_that_points_to_the_first(clone: Clone) -> None:
    clone.set_up()
    clone.calls()
    copy = Clone(clone.folder.with_name("copy"), clone.fake)
    shutil.copytree(clone.folder, copy.folder)

    copy.set_up()

    assert copy.calls() == BUILD


def test_pip_failing_is_told_and_the_next_run_begins_anew(clone: Clone) -> None:
    clone.tell("pip-fails")
    failed = clone.set_up()
    assert failed.returncode == 1
    assert "pip failed" in failed.stderr
    assert clone.calls() == BUILD[:2]

    (clone.fake / "pip-fails").unlink()
    assert clone.set_up().returncode == 0
    assert clone.calls() == BUILD


def test_a_lock_that_is_older_than_the_project_is_refused(clone: Clone) -> None:
    clone.tell("conflict")
    failed = clone.set_up()
    assert failed.returncode == 1
    assert "x wants y" in failed.stderr
    assert "scripts/lib/lock.sh" in failed.stderr


def test_of_two_runs_at_once_one_makes_the_venv_and_the_other_waits(clone: Clone) -> None:
    clone.tell("slow")
    command = [*SET_UP[:-1], f"{SET_UP[-1]}; cat .venv/stamp-project"]
    runs = [
        subprocess.Popen(command, cwd=clone.folder, env=clone.environment({}), stdout=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [run.communicate(timeout=30)[0] for run in runs]

    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1] != b""
    assert clone.calls() == BUILD


def test_the_venv_is_not_made_again_under_a_run_that_uses_it(clone: Clone) -> None:
    clone.set_up()
    clone.calls()
    user = subprocess.Popen(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            "source scripts/lib/setup.sh; set_up; echo ready; read -r; ls .venv/bin/python",
        ],
        cwd=clone.folder,
        env=clone.environment({}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "ready\n"
    clone.run("sh", "-c", "echo x >>requirements.lock")
    other = subprocess.Popen(SET_UP, cwd=clone.folder, env=clone.environment({}), stderr=subprocess.PIPE, text=True)
    assert other.stderr is not None
    assert "waiting for the runs that use .venv to end" in other.stderr.readline()
    assert clone.calls() == []

    assert user.communicate("go on\n", timeout=30)[0] == ".venv/bin/python\n"
    other.communicate(timeout=30)
    assert other.returncode == 0
    assert clone.calls() == BUILD


# ---- system packages ----


@pytest.mark.parametrize("when", ["build", "required", "optional"])
def test_root_gets_what_is_missing_from_apt(clone: Clone, when: str) -> None:
    need(clone, when)
    assert clone.set_up().returncode == 0
    assert clone.calls() == ["apt-get fiddle", *BUILD]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        pytest.param("build", 1, id="build"),
        pytest.param("required", 1, id="required"),
        pytest.param("optional", 0, id="optional"),
    ],
)
@pytest.mark.parametrize("hindrance", ["uid", "apt-fails", "offline"])
def test_what_cannot_be_installed_is_listed_before_anything_is_built(
    clone: Clone, when: str, expected: int, hindrance: str
) -> None:
    clone.tell(hindrance, "1000")
    need(clone, when)

    run = clone.set_up()

    assert run.returncode == expected
    assert "  fiddle: fiddling in time" in run.stderr
    assert "apt install fiddle" in run.stderr
    assert [call for call in clone.calls() if not call.startswith("apt-get")] == ([] if expected else BUILD)


def test_a_required_package_that_went_away_is_noticed_when_the_venv_is_current(clone: Clone) -> None:
    clone.set_up()
    clone.calls()
    need(clone, "required")

    assert clone.set_up().returncode == 0
    assert clone.calls() == ["apt-get fiddle"]


def test_an_optional_package_that_cannot_be_had_does_not_slow_every_run(clone: Clone) -> None:
    clone.tell("apt-fails")
    need(clone, "optional")
    clone.set_up()
    clone.calls()

    assert clone.set_up().stderr == ""
    assert clone.calls() == []


def test_what_one_distribution_does_not_have_does_not_keep_the_rest_away(clone: Clone) -> None:
    clone.tell("unknown", "viola")
    need(clone, "optional", "viola")
    need(clone, "build")

    run = clone.set_up()

    assert run.returncode == 0
    assert "as root: apt install viola\n" in run.stderr
    assert clone.calls() == ["apt-get fiddle", *BUILD]


def test_nothing_is_said_to_be_installed_where_there_is_nothing_to_install(clone: Clone) -> None:
    clone.tell("unknown", "viola")
    need(clone, "optional", "viola")

    run = clone.set_up()

    assert run.returncode == 0
    assert "installing" not in run.stderr
    assert "as root: apt install viola\n" in run.stderr
    assert clone.calls() == BUILD


def test_only_the_test_command_installs_what_only_tests_need(clone: Clone) -> None:
    need(clone, "tests")
    clone.set_up()
    assert clone.calls() == BUILD

    clone.run("scripts/test", "-k", "some")
    assert clone.calls() == ["apt-get fiddle", *CHECKS]


def test_what_only_tests_need_is_asked_for_once_and_again_when_the_list_changes(clone: Clone) -> None:
    clone.tell("apt-fails")
    need(clone, "tests")
    first = clone.run("scripts/test")
    assert first.returncode == 5
    assert "  fiddle: fiddling in time" in first.stderr
    clone.calls()

    assert clone.run("scripts/test", "-k", "some").stderr == ""
    assert clone.calls() == CHECKS

    (clone.fake / "apt-fails").unlink()
    need(clone, "tests", "viola")
    clone.run("scripts/test", "-k", "some")
    assert clone.calls() == ["apt-get fiddle viola", *CHECKS]


def test_squid_does_not_become_a_service_of_the_machine(clone: Clone) -> None:
    executable(clone.fake / "bin/update-rc.d", TOOL)
    need(clone, "tests", "squid")
    clone.run("scripts/test", "-k", "some")
    assert clone.calls() == ["apt-get squid", "update-rc.d squid disable", *BUILD, *CHECKS]


# ---- the commands ----

CHECKS = ["ruff check", "ruff format --check", "mypy --strict", "python -m pytest -n auto --dist worksteal -k some"]


@pytest.mark.parametrize(
    ("failing", "code", "expected"),
    [
        pytest.param("ruff-fails", 1, CHECKS[:1], id="linter"),
        pytest.param("mypy-fails", 1, CHECKS[:3], id="type checker"),
        pytest.param("none", 5, CHECKS, id="pytest, nothing collected"),
    ],
)
def test_the_test_command_fails_with_the_first_check_that_fails(
    clone: Clone, failing: str, code: int, expected: list[str]
) -> None:
    clone.set_up()
    clone.calls()
    clone.tell(failing)

    assert clone.run("scripts/test", "-k", "some").returncode == code
    assert clone.calls() == expected


def test_nothing_is_coloured_in_ci(clone: Clone) -> None:
    clone.run("scripts/test", CI="true", FORCE_COLOR="1", MYPY_FORCE_COLOR="1", TERM="xterm-256color")

    environment = dict(
        line.split("=", 1) for line in (clone.fake / "environment").read_text().splitlines() if "=" in line
    )

    assert (environment["NO_COLOR"], environment["PY_COLORS"], environment["TERM"]) == ("1", "0", "dumb")
    assert {"FORCE_COLOR", "MYPY_FORCE_COLOR"} & set(environment) == set()


def test_the_demo_gets_its_arguments(clone: Clone) -> None:
    clone.set_up()
    clone.calls()
    assert clone.run("scripts/demo", "--datapath", "two words").returncode == 0
    assert clone.calls() == ["python scripts/demo_main.py --datapath two words"]


@pytest.mark.parametrize("arguments", [[], ["trot"]], ids=["none", "unknown"])
def test_a_benchmark_that_is_not_there_gets_the_names_of_those_that_are(clone: Clone, arguments: list[str]) -> None:
    (clone.folder / "scripts/bench_walk.py").touch()
    run = clone.run("scripts/bench", *arguments)
    assert run.returncode == 2
    assert "  walk\n" in run.stderr
    assert clone.calls() == []


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_who_asks_for_help_with_benchmarks_gets_it(clone: Clone, asked: str) -> None:
    (clone.folder / "scripts/bench_walk.py").touch()
    run = clone.run("scripts/bench", asked)
    assert (run.returncode, run.stderr) == (0, "")
    assert "  walk\n" in run.stdout
    assert clone.calls() == []


def test_a_benchmark_gets_its_arguments(clone: Clone) -> None:
    (clone.folder / "scripts/bench_walk.py").touch()
    clone.set_up()
    clone.calls()
    assert clone.run("scripts/bench", "walk", "--rounds", "3").returncode == 0
    assert clone.calls() == ["python scripts/bench_walk.py --rounds 3"]


def test_without_a_user_namespace_rootless_says_why_not(clone: Clone) -> None:
    executable(clone.fake / "bin/unshare", "#!/bin/sh\necho 'unshare failed: no' >&2\nexit 1\n")
    run = clone.run("scripts/rootless", "true")
    assert run.returncode == 1
    assert "unshare failed: no" in run.stderr
    assert "run the command as root" in run.stderr


def test_ci_runs_the_test_command_and_nothing_else() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ['exec scripts/test "$@"']
    assert os.access(ROOT / ".ci/run", os.X_OK)
