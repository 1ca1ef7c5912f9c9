"""Real bash hands a program exactly the words, the environment and the folders that the plan holds."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import changed, host_plan, job_plan, plan, process, train_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.runner.launch.folder import Remote
from flagscale.runner.plan.job import HostPlan
from flagscale.runner.plan.site import Site
from flagscale.runner.render.argv import render_argv
from flagscale.runner.render.script import render_script

STUB = """\
#!{python}
import json, os, sys
with open({out!r}, "w") as out:
    json.dump({{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}, out)
"""
NASTY = (
    *("", " ", "-", "--", "-n", "--a=b", "'", '"', "\\", "\n", "$(touch oops)", "`touch oops`", "${HOME}", "$$", "a b"),
    *("*", "~", "!x", "#", ";", "&", "|", "\t", "\x7f", "é", "日本", "\u2028", "{a,b}", "\\\n", "'\"'\"'", "=", "%s"),
)
text = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12),
    st.lists(st.sampled_from(NASTY), max_size=3).map("".join),
)
file_names = text.map(lambda name: name.replace("/", "_")).filter(lambda name: name not in ("", ".", ".."))
variables = st.from_regex(r"X_[A-Za-z0-9_]{0,8}", fullmatch=True)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Sandbox:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "told.json"
        self.bin = root / "bin"
        self.bin.mkdir()
        stub = self.bin / "stub"
        stub.write_text(STUB.format(python=sys.executable, out=str(self.out)))
        stub.chmod(0o755)
        for name in ("torchrun", "python", "vllm"):
            (self.bin / name).symlink_to(stub)

    def told(self, host: HostPlan) -> Any:
        """What the host's first process was given, when a real bash ran its script."""
        self.out.unlink(missing_ok=True)
        script = self.root / "script.sh"
        script.write_bytes(render_script(job_plan(host), host, host.processes[0]).encode())
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(script)], env=env, cwd=self.root, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert not (self.root / "oops").exists()
        return json.loads(self.out.read_text())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


@quick
@given(words=st.lists(text, max_size=6), env=st.dictionaries(variables, text, max_size=5))
def test_words_and_environment_arrive_as_they_are(sandbox: Sandbox, words: list[str], env: dict[str, str]) -> None:
    item = process("stub", *words, cwd=str(sandbox.root), env=tuple(env.items()))
    seen = sandbox.told(host_plan(item))
    assert seen["argv"] == words
    assert {name: value for name, value in seen["env"].items() if name.startswith("X_")} == env


@quick
@given(names=st.lists(file_names.filter(lambda name: len(name.encode()) < 200), min_size=2, max_size=3, unique=True))
def test_folders_are_made_entered_and_put_on_the_path(sandbox: Sandbox, names: list[str]) -> None:
    cwd = sandbox.root / "made" / names[0]
    cwd.mkdir(parents=True, exist_ok=True)
    made = sandbox.root / "made" / "deep" / "/".join(names[1:])
    paths = tuple(f"/p/{name}" for name in names if ":" not in name)
    host = host_plan(
        process(
            "stub", cwd=str(cwd), path_dirs=paths, bin_dirs=tuple(f"/b/{name}" for name in names if ":" not in name)
        ),
        make_dirs=(str(made),),
    )
    seen = sandbox.told(host)
    assert seen["cwd"] == str(cwd)
    assert made.is_dir()
    assert seen["env"].get("PYTHONPATH", "") == ":".join(paths)
    assert seen["env"]["PATH"].startswith("".join(f"/b/{path[3:]}:" for path in paths))


@quick
@given(data_path=text, exp_name=text, folder=file_names, greeting=text)
def test_a_whole_configuration_arrives(
    sandbox: Sandbox, data_path: str, exp_name: str, folder: str, greeting: str
) -> None:
    tree = changed(train_tree(), {
        "experiment.exp_name": exp_name, "experiment.exp_dir": f"out/{folder[:60]}",
        "experiment.envs": {"X_G": greeting},
        "train.data.tokenizer.tokenizer_model": data_path,
    })  # fmt: skip
    job = plan(tree, sandbox.root, Site(str(sandbox.root), str(sandbox.bin), {}))
    seen = sandbox.told(job.hosts[0])
    assert seen["argv"] == list(render_argv(job.hosts[0].processes[0])[1:])
    assert seen["env"]["X_G"] == greeting
    assert Path(job.log_dir, "details").is_dir()
    wanted = [data_path, f"--tokenizer-model={data_path}"]
    assert [word for word in seen["argv"] if word in wanted]


CONTAINER = Remote("host_0_a", "a", None, None, "python3", container="box")
ENTER = """#!/bin/bash
[ "$1 $2 $3" = "exec -i box" ] || exit 9
exec "${@:4}"
"""


@quick
@given(words=st.lists(text, max_size=4))
def test_words_enter_a_container_as_they_are(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """As a login shell of the host gets them: quoted once, whatever stands before them."""
    folder = tmp_path_factory.getbasetemp() / "docker"
    folder.mkdir(exist_ok=True)
    program = folder / "docker"
    program.write_text(ENTER)
    program.chmod(0o755)
    shown = [sys.executable, "-I", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    line = shlex.join(CONTAINER.enter([*shown, *words]))
    env = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == words
    assert replace(CONTAINER, container=None).enter(words) == words
