"""A tree for each chip beside upstream's; and what a launch asks of it, writes down of it, and compares."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from factories import load, train_tree

from flagscale import env
from flagscale.cli import doctor
from flagscale.cli import source as source_verb
from flagscale.cli.rerun import check_trees_unchanged
from flagscale.errors import PatchError, SourceError, UserError
from flagscale.patch.chiptree import lay_tree, list_chip_trees, load_layers
from flagscale.patch.export import make_patches, write_series
from flagscale.patch.pins import Pin
from flagscale.patch.series import Header, Series, hash_layers
from flagscale.patch.source import fetch_source, source_status
from flagscale.patch.state import read_state
from flagscale.patch.tree import REGULAR, Content
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch.patches import expect_patches
from flagscale.runner.launch.sources import check_trees, compare_trees, describe_tree, list_trees, query_trees
from flagscale.runner.plan.job import BackendTree, HostPlan, JobPlan, ProcessSpec, decode_plan, encode_plan
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.site import Site

HEADER = Header("a test wants it", "by an edit", "none", "never")
CORE, CLOCK = "megatron/core.py", "megatron/clock.py"
FILES = {CORE: b"DEVICE = 'cuda'\n", CLOCK: b"TICK = 1\n", "megatron/same.py": b"\n"}
CHIP = "Generic_CPU"


def make_pin(folder: Path, files: dict[str, bytes] = FILES) -> Pin:
    """A pin whose archive lies where a fetch looks first, so that nothing is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "toy-1.0.tar.gz"
    with gzip.GzipFile(archive, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"toy-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sha = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Pin("Megatron-LM", "megatron", "", "v1", "toy", "1.0", archive.name, sha, 1, on_path="")


def make_series(hardware: Path, chip: str, name: str, text: bytes, files: dict[str, bytes] = FILES) -> None:
    patches = make_patches({name: Content(REGULAR, files[name])}, {name: Content(REGULAR, text)}, {}, HEADER)
    write_series(
        hardware / chip / "Megatron-LM", Series(f"{chip}/Megatron-LM", "megatron", "1.0", "d", patches=patches)
    )


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    make_series(tmp_path / "hardware", "Common", CLOCK, b"TICK = 2\n")
    make_series(tmp_path / "hardware", CHIP, CORE, b"DEVICE = 'cpu'\n")
    return tmp_path / "hardware"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardware: Path) -> Path:
    """Where the source and the trees lie; the toolkit looks here, and into `hardware`."""
    monkeypatch.setenv(env.SOURCE_DIR, str(tmp_path / "third_party"))
    monkeypatch.setattr(env, "root_dir", lambda: hardware.parent)
    return tmp_path / "third_party" / "Megatron-LM"


def lay(folder: Path, hardware: Path, pin: Pin | None = None, chip: str = CHIP, replace: bool = False) -> Path:
    pin = pin or make_pin(folder)
    lay_tree(pin, folder / "src", chip, load_layers(hardware, pin.name, chip), replace=replace)
    return folder / chip


def test_each_chip_has_a_tree_of_its_own_and_upstream_s_stays_untouched(folder: Path, hardware: Path) -> None:
    pin = make_pin(folder)
    cpu, gpu = lay(folder, hardware, pin), lay(folder, hardware, pin, "NVIDIA")
    assert (cpu / CORE).read_bytes() == b"DEVICE = 'cpu'\n"
    assert (gpu / CORE).read_bytes() == FILES[CORE]
    assert (cpu / CLOCK).read_bytes() == (gpu / CLOCK).read_bytes() == b"TICK = 2\n"
    assert read_state(cpu).series == ("Common/Megatron-LM", "Generic_CPU/Megatron-LM")
    assert source_status(pin, folder / "src").state == "ready"
    assert read_state(folder / "src").kind == "clean"
    (folder / "Generic_CPU.stash").mkdir()
    assert list_chip_trees(folder / "src") == (cpu, gpu)
    assert (cpu / CORE).stat().st_ino != (folder / "src" / CORE).stat().st_ino


def test_laying_again_changes_nothing_and_a_new_patch_set_takes_the_old_one_s_place(
    folder: Path, hardware: Path
) -> None:
    tree = lay(folder, hardware)
    before = read_state(tree)
    mark = (tree / CORE).stat().st_mtime_ns
    assert read_state(lay(folder, hardware)) == before
    assert (tree / CORE).stat().st_mtime_ns == mark
    make_series(hardware, CHIP, CORE, b"DEVICE = 'tpu'\n")
    lay(folder, hardware)
    assert (tree / CORE).read_bytes() == b"DEVICE = 'tpu'\n"
    assert read_state(tree).digest != before.digest


def test_a_new_pin_makes_the_tree_anew_but_not_over_edits(folder: Path, hardware: Path) -> None:
    tree = lay(folder, hardware)
    newer = FILES | {"megatron/same.py": b"new = 1\n"}
    (tree / "megatron" / "same.py").write_bytes(b"mine = 1\n")
    pin = make_pin(folder, newer)
    with pytest.raises(SourceError, match=r"is of another pin, and was changed:\n  megatron/same\.py \(edited\)"):
        lay(folder, hardware, pin)
    assert (tree / "megatron" / "same.py").read_bytes() == b"mine = 1\n"
    lay(folder, hardware, pin, replace=True)
    assert (tree / "megatron" / "same.py").read_bytes() == b"new = 1\n"
    again = FILES | {"megatron/same.py": b"newer = 1\n"}
    lay(folder, hardware, make_pin(folder, again))
    assert (tree / "megatron" / "same.py").read_bytes() == b"newer = 1\n"
    assert read_state(tree).kind == "patched"


def test_a_patch_that_does_not_fit_leaves_no_tree(folder: Path, hardware: Path) -> None:
    make_series(hardware, CHIP, CORE, b"DEVICE = 'cpu'\n", {CORE: b"DEVICE = 'other'\n"})
    with pytest.raises(PatchError, match=r"core\.py"):
        lay(folder, hardware)
    assert sorted(path.name for path in folder.iterdir()) == [".fetch.lock", "src", "toy-1.0.tar.gz"]


# the plan and the launch


def make_plan(tree: BackendTree | None, **fields: str) -> JobPlan:
    process = ProcessSpec("torchrun", ("true",), "/", backend="megatron", tree=tree)
    host = HostPlan(Host("localhost", 1), 0, (process,), **fields)
    return JobPlan("train", "megatron", "e", "/exp", "/exp/logs", (host,))


def test_a_plan_names_the_tree_of_each_host_s_chip() -> None:
    site = Site("/r", None, {"megatron": "/tp/src"}, {"megatron": {CHIP: "/tp/Generic_CPU", "NVIDIA": "/tp/NVIDIA"}})
    plan = plan_config(load(train_tree(experiment__runner__device_type="cpu")), site)
    (process,) = plan.hosts[0].processes
    assert process.tree == BackendTree("/tp/Generic_CPU", "megatron", CHIP)
    assert process.path_dirs == ("/tp/Generic_CPU", "/r")
    assert decode_plan(json.loads(json.dumps(encode_plan(plan)))) == plan
    assert site.find_tree("megatron", "a800") == BackendTree("/tp/NVIDIA", "megatron", "NVIDIA")
    assert site.find_tree("megatron", "mlu") == site.find_tree("megatron", None) == BackendTree("/tp/src", "megatron")
    assert site.find_tree("vllm", "cpu") is None


def test_a_plan_of_an_older_release_has_no_trees() -> None:
    row = encode_plan(make_plan(BackendTree("/tp", "megatron", CHIP)))
    del row["hosts"][0]["processes"][0]["tree"]
    assert list_trees(decode_plan(row)) == ()


def test_a_launch_asks_for_the_patches_of_the_chip_and_names_the_command_that_mends(
    folder: Path, hardware: Path
) -> None:
    plan = make_plan(BackendTree(str(folder / CHIP), "megatron", CHIP))
    expected = expect_patches(plan)
    assert expected == {str(folder / CHIP): hash_layers(load_layers(hardware, "Megatron-LM", CHIP))}
    mend = "`flagscale install --backend megatron --device Generic_CPU`"
    with pytest.raises(UserError, match=f"torchrun on localhost: runs on {CHIP}, and .* is missing: {mend}"):
        check_trees(plan, expected)
    fetch_source(make_pin(folder), folder / "src")
    shutil.copytree(folder / "src", folder / CHIP)
    with pytest.raises(UserError, match=f"is not patched for it: {mend}"):
        check_trees(plan, expected)
    shutil.rmtree(folder / CHIP)
    lay(folder, hardware)
    check_trees(plan, expected)
    make_series(hardware, CHIP, CORE, b"DEVICE = 'tpu'\n")
    with pytest.raises(UserError, match=f"has other patches than hardware/{CHIP} says: {mend}"):
        check_trees(plan, expect_patches(plan))
    (folder / CHIP / ".flagscale-patch" / "state.json").write_text("{")
    with pytest.raises(UserError, match=f"not a record of a patched tree.*{mend[:-1]} --replace`"):
        check_trees(plan, expected)
    with pytest.raises(PatchError, match="not a record of a patched tree"):
        lay(folder, hardware)
    lay(folder, hardware, replace=True)
    check_trees(plan, expect_patches(plan))


def test_what_the_user_s_own_shell_may_bring_is_no_fault(folder: Path) -> None:
    tree = BackendTree(str(folder / CHIP), "megatron", CHIP)
    plan = make_plan(tree, before_start="make the tree")
    check_trees(plan, expect_patches(plan))
    check_trees(make_plan(replace(tree, chip=None)), {})
    check_trees(make_plan(None), {})


def test_a_hand_edit_runs_is_written_down_and_stops_a_rerun(folder: Path, hardware: Path) -> None:
    tree = lay(folder, hardware)
    plan = make_plan(BackendTree(str(tree), "megatron", CHIP))
    then = json.loads(json.dumps(query_trees(plan)))
    assert describe_tree(then[0]).startswith("patched by Common/Megatron-LM, Generic_CPU/Megatron-LM (")
    assert compare_trees(then, query_trees(plan)) == ()
    (tree / CORE).write_bytes(b"DEVICE = 'mine'\n")
    check_trees(plan, expect_patches(plan))
    (change,) = compare_trees(then, query_trees(plan))
    assert change.startswith(f"{tree}: was patched by ")
    assert change.endswith(f"changed: {CORE} (edited)")
    with pytest.raises(UserError, match=r"other sources than it did:(.|\n)*--allow-changed"):
        check_trees_unchanged([change], allowed=False)
    check_trees_unchanged([], allowed=False)


def test_a_changed_source_that_is_allowed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    check_trees_unchanged(["/tp: was a, is b"], allowed=True)
    assert "note: other sources than the run had:\n  /tp: was a, is b\n" in capsys.readouterr().err


def test_every_state_has_words(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(BackendTree(str(tmp_path / "none"), "megatron"))
    assert describe_tree(query_trees(plan)[0]) == "not there"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.py").touch()
    assert describe_tree(query_trees(plan)[0]) == "of unknown origin"
    fetch_source(make_pin(folder), folder / "src")
    plan = make_plan(BackendTree(str(folder / "src"), "megatron"))
    assert describe_tree(query_trees(plan)[0]) == "upstream's files"
    for number in range(7):
        (folder / "src" / f"added_{number}.py").touch()
    assert describe_tree(query_trees(plan)[0]).endswith("added_4.py (added) and 2 more")
    assert len(compare_trees([], query_trees(plan))) == 1
    (folder / "src" / ".flagscale-patch").mkdir()
    (folder / "src" / ".flagscale-patch" / "state.json").write_text("{")
    assert query_trees(plan)[0]["kind"] == "unknown"


# the verbs


def test_the_verbs_tell_of_every_tree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pin = make_pin(folder)
    assert source_verb.fetch(pin, folder / "src", source_verb.find_chips(["cpu"], pin.name), replace=False) == 0
    assert f"patched for {CHIP} in {folder / CHIP}" in capsys.readouterr().out
    assert source_verb.report(pin, folder / "src", as_json=False) == 0
    said = capsys.readouterr().out
    assert f"Megatron-LM: ready; toy 1.0 (v1) in {folder / 'src'}, commit " in said
    assert f"{CHIP}: patched by Common/Megatron-LM, Generic_CPU/Megatron-LM; {folder / CHIP}" in said
    (folder / CHIP / CORE).write_bytes(b"mine\n")
    assert source_verb.report(pin, folder / "src", as_json=True) == 0
    (tree,) = json.loads(capsys.readouterr().out)["trees"]
    assert (tree["kind"], tree["changed"]) == ("drifted", [f"{CORE} (edited)"])
    (finding,) = doctor._chip_trees("Megatron-LM", "megatron")
    assert finding.found == "drifted: Common/Megatron-LM, Generic_CPU/Megatron-LM"
    assert finding.remedy == "flagscale install --backend megatron --device Generic_CPU"


@pytest.mark.usefixtures("folder")
def test_without_a_word_the_chips_of_this_machine_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = SimpleNamespace(chip=SimpleNamespace(name="NVIDIA"))
    monkeypatch.setattr("flagscale.chips.probe.probe_host", lambda: probed)
    assert source_verb.find_chips([], "Megatron-LM") == ("NVIDIA", CHIP)
    assert source_verb.find_chips([], "vllm") == ()
    assert source_verb.find_chips(["A800", "gpu"], "Megatron-LM") == ("NVIDIA",)
    with pytest.raises(UserError, match=r"A1000: no such chip; .*did you mean `A100`"):
        source_verb.find_chips(["A1000"], "Megatron-LM")
