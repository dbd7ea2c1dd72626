"""Groups of cgroup v2, against made-up files: this repository's machines offer no such folder."""

from pathlib import Path

from sdpo_jax.environments.sandbox import cgroups

LIMITS = {"memory_mb": 100, "processes": 4}


def made_up(root: Path, own: str, controllers: str) -> str:
    process = root / "process"
    process.mkdir()
    (process / "mountinfo").write_text(
        "24 1 0:22 / /proc rw - proc proc rw\n"
        f"35 24 0:30 / {root} rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    (process / "cgroup").write_text(f"4:memory:/old\n0::/{own}\n")
    for folder in (root, root / own):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.procs").touch()
        (folder / "cgroup.subtree_control").write_text(controllers if folder == root else "")
    return str(process)


def test_a_prepared_folder_is_found_and_no_other(tmp_path: Path) -> None:
    process = made_up(tmp_path, "leaf", "cpu memory pids")
    assert cgroups.prepared(process) == str(tmp_path)
    (tmp_path / "cgroup.subtree_control").write_text("pids")
    assert cgroups.prepared(process) == ""
    assert cgroups.prepared(str(tmp_path / "missing")) == ""


def test_nothing_above_the_mount_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "mount"
    root.mkdir()
    process = made_up(root, "", "")
    (tmp_path / "cgroup.subtree_control").write_text("memory pids")
    (tmp_path / "cgroup.procs").touch()
    assert cgroups.prepared(process) == ""


def test_a_group_sets_its_limits_and_takes_processes(tmp_path: Path) -> None:
    group = cgroups.Group(str(tmp_path), "box")
    group.limit(LIMITS)
    group.add([17])
    read = {path.name: path.read_text() for path in (tmp_path / "box").iterdir()}
    assert read["memory.max"] == str((100 + 256) << 20)
    assert (read["pids.max"], read["cgroup.procs"]) == ("20", "17")
    group.close()
    assert (tmp_path / "box" / "cgroup.kill").read_text() == "1"


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    for parent in ("", str(tmp_path / "missing")):
        group = cgroups.Group(parent, "box")
        group.limit(LIMITS)
        group.add([1])
        group.close()
    assert not list(tmp_path.iterdir())
