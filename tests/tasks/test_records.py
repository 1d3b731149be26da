from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import records
from tasks.config import REPOSITORY
from tasks.errors import UserError
from tasks.records import (
    Measurement,
    Provenance,
    Record,
    append_records,
    read_records,
    records_path,
    sha256_of,
)

RECORD = Record(
    experiment="adasplash/fake", scale="smoke", system="a", metric="val_loss", value=3.25, unit="nats/token",
    params={"n": 8, "label": "ä\n\u2028"}, seed=0, config_sha256="c", source_sha256="s",
    env={"gpu": None, "driver": None, "torch": "0", "triton": None, "python": "3"}, created="2026-01-01T00:00:00+00:00",
    stats={"n": 2, "min": 3.0, "max": 3.5, "std": 0.25}, git_commit="abc-dirty",
)  # fmt: skip
JOB = Provenance("adasplash/fake", "smoke", "a", 0, "c", "s")


@pytest.fixture
def path(tmp_path) -> Path:
    return records_path(tmp_path, "adasplash/fake", "smoke")


# What a record is


def test_a_line_has_the_keys_of_the_schema(path):
    append_records(path, [RECORD])
    content = path.read_text()
    assert content.endswith("}\n") and content.count("\n") == 1
    line = json.loads(content)
    assert set(line) == {"experiment", "scale", "system", "metric", "value", "unit", "params", "stats", "seed",
                         "config_sha256", "source_sha256", "git_commit", "env", "created", "status"}  # fmt: skip
    assert set(line["env"]) == {"gpu", "driver", "torch", "triton", "python"}


def test_what_was_written_is_read(path):
    failed = replace(RECORD, value=None, status="oom", seed=None, stats=None, git_commit=None)
    append_records(path, [RECORD, failed])
    append_records(path, [])
    append_records(path, [RECORD])
    assert read_records(path) == [RECORD, failed, RECORD]


def test_records_lie_where_the_experiment_says(tmp_path):
    assert records_path(tmp_path, "adasplash/table4", "lab") == tmp_path / "records/adasplash/table4/lab.jsonl"
    with pytest.raises(UserError, match="scale: got 'huge', allowed are smoke, lab, paper"):
        records_path(tmp_path, "adasplash/table4", "huge")


@pytest.mark.parametrize(("value", "status", "message"), [
    (None, "ok", "has value None with status 'ok'"),
    (1.0, "failed", "has value 1.0 with status 'failed'"),
    (1.0, "great", "status: got 'great', allowed are ok, oom, failed, not_applicable"),
    (float("nan"), "ok", "val_loss is nan, allowed is a finite number"),
    (float("inf"), "ok", "val_loss is inf, allowed is a finite number"),
])  # fmt: skip
def test_a_measurement_that_contradicts_itself_is_refused(value, status, message):
    with pytest.raises(ValueError, match=message):
        Measurement("val_loss", value, "nats/token", status=status)


def test_the_real_environment_has_the_keys_of_the_schema():
    found = records.environment()
    assert set(found) == set(RECORD.env)
    assert found["torch"] and found["python"] and json.dumps(found)


def test_a_measurement_is_stamped_with_where_it_comes_from(machine, monkeypatch):
    machine["gpu"] = "Some GPU"
    monkeypatch.setattr(records, "git_commit", lambda: "abc")
    first, second = JOB.records([Measurement("val_loss", 3.0, "nats/token", {"n": 8}),
                                 Measurement("peak_gb", None, "GB", status="oom")])  # fmt: skip
    assert (first.experiment, first.scale, first.system, first.seed) == ("adasplash/fake", "smoke", "a", 0)
    assert (first.config_sha256, first.source_sha256, first.git_commit) == ("c", "s", "abc")
    assert (first.env["gpu"], first.params, first.status) == ("Some GPU", {"n": 8}, "ok")
    assert (second.value, second.status, second.created) == (None, "oom", first.created)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.created)


# Appending: all or nothing


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    append_records(path, [RECORD])
    before = path.read_bytes()
    write = os.write

    def fill(handle, data):
        write(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "write", fill)
        with pytest.raises(UserError, match=r"smoke\.jsonl: records not written, .* No space left on device"):
            append_records(path, [RECORD, RECORD])
    assert path.read_bytes() == before
    append_records(path, [RECORD])
    assert len(read_records(path)) == 2


def test_a_short_write_leaves_the_file_as_it_was(path, monkeypatch):
    append_records(path, [RECORD])
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(records.os, "write", lambda handle, data: write(handle, data[: len(data) - 3]))
    with pytest.raises(UserError, match="records not written"):
        append_records(path, [RECORD, RECORD])
    assert path.read_bytes() == before


def test_a_failing_disk_leaves_the_file_as_it_was(path, monkeypatch):
    append_records(path, [RECORD])
    before = path.read_bytes()

    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(records.os, "fsync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        append_records(path, [RECORD])
    assert path.read_bytes() == before


def test_a_file_system_without_locks_is_named(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(records.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"smoke\.jsonl: records not written, .* No locks available"):
        append_records(path, [RECORD])
    assert path.read_bytes() == b""


@pytest.mark.parametrize("wrong", [
    replace(RECORD, value=float("nan")), replace(RECORD, stats={"std": float("inf")}),
    replace(RECORD, params={"x": float("nan")}), replace(RECORD, params={"x": object()}),
])  # fmt: skip
def test_what_json_cannot_hold_is_refused_and_nothing_written(path, wrong):
    with pytest.raises((ValueError, TypeError)):
        append_records(path, [RECORD, wrong])
    assert not path.exists()
    append_records(path, [RECORD])
    with pytest.raises((ValueError, TypeError)):
        append_records(path, [RECORD, wrong])
    assert read_records(path) == [RECORD]


@pytest.mark.parametrize("torn", [b'{"experiment": "adas', b"\0\0\0", b"x" * 10000])
def test_a_torn_last_line_is_left_out_and_cut_by_the_next_append(path, torn):
    append_records(path, [RECORD, RECORD])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_records(path) == [RECORD, RECORD]
    assert path.read_bytes() == whole + torn
    append_records(path, [RECORD])
    assert path.read_bytes() == whole + whole[: len(whole) // 2]


def test_a_file_of_one_torn_line_is_no_records(path):
    path.parent.mkdir(parents=True)
    path.write_text('{"experi')
    assert read_records(path) == []
    append_records(path, [RECORD])
    assert read_records(path) == [RECORD]


def test_a_folder_that_may_not_be_written_is_named(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(records.os, "open", refuse)
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be written: Read-only file system")):
        append_records(path, [RECORD])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere, so that no folder refuses it")
def test_a_read_only_folder_is_named(path):
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        append_records(path, [RECORD])


def test_a_file_in_place_of_the_folder_is_named(path):
    path.parents[1].mkdir(parents=True)
    path.parent.touch()
    with pytest.raises(UserError, match=r"smoke\.jsonl: cannot be written"):
        append_records(path, [RECORD])


APPENDER = """
import sys
from dataclasses import replace
from pathlib import Path
from tasks.records import append_records
from tests_record import RECORD
name = sys.argv[2]
sys.stdin.readline()
for batch in range(20):
    append_records(Path(sys.argv[1]), [replace(RECORD, system=name, value=batch, params={"i": i, "long": name * 5000})
                                       for i in range(3)])
"""


def test_processes_that_append_at_once_interleave_whole_batches(path, tmp_path):
    (tmp_path / "tests_record.py").write_text(f"from tasks.records import Record\nRECORD = {RECORD!r}\n")
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", APPENDER, str(path)]
    children = [subprocess.Popen([*command, name], stdin=subprocess.PIPE, env=environment) for name in "abc"]
    for child in children:
        child.stdin.write(b"go\n")
        child.stdin.close()
    assert [child.wait(60) for child in children] == [0, 0, 0]
    written = [(r.system, r.value, r.params["i"]) for r in read_records(path)]
    batches = [written[i : i + 3] for i in range(0, len(written), 3)]
    assert all(batch == [(batch[0][0], batch[0][1], i) for i in range(3)] for batch in batches)
    for name in "abc":
        assert [batch[0][1] for batch in batches if batch[0][0] == name] == list(range(20))


# Reading


def test_no_file_is_no_records(path):
    assert read_records(path) == []


@pytest.mark.parametrize("line", [
    "{", "", "[]", "3", "{}", '{"experiment": "x"}', "NaN",
    json.dumps({**RECORD.__dict__, "colour": "red"}),
    json.dumps({**RECORD.__dict__, "value": float("nan")}),
])  # fmt: skip
def test_a_corrupt_line_is_named_by_file_and_number(path, line):
    append_records(path, [RECORD, RECORD])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:2: not a record: ")) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_a_record_file_that_cannot_be_read_is_named(path):
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{path}: cannot be read"):
        read_records(path)
    path.rmdir()
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=rf"{path}: cannot be read"):
        read_records(path)


# Provenance


def test_a_record_matches_its_own_job(machine):
    assert JOB.matches(RECORD)


@pytest.mark.parametrize("change", [
    {"experiment": "adasplash/other"}, {"scale": "lab"}, {"system": "b"}, {"seed": 1}, {"seed": None},
    {"config_sha256": "d"}, {"source_sha256": "t"}, {"env": {"gpu": "Some GPU"}},
])  # fmt: skip
def test_a_record_of_another_job_does_not_match(machine, change):
    assert not JOB.matches(replace(RECORD, **change))


def test_another_gpu_does_not_match(machine):
    machine["gpu"] = "GPU A"
    record = replace(RECORD, env={**RECORD.env, "gpu": "GPU A"})
    assert JOB.matches(record)
    machine["gpu"] = "GPU B"
    assert not JOB.matches(record)


def test_equal_settings_hash_equally_whatever_their_order():
    assert sha256_of({"a": 1, "b": [1, 2]}) == sha256_of({"b": [1, 2], "a": 1})
    assert sha256_of({"a": 1, "b": [1, 2]}) != sha256_of({"a": 1, "b": [2, 1]})
    assert sha256_of({"a": 1}) != sha256_of({"a": 1.5})


def commit_of(root: Path) -> str | None:
    records.git_commit.cache_clear()
    try:
        return records.git_commit(root)
    finally:
        records.git_commit.cache_clear()


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("kernels/k/a.py", "tasks/b.py", "configs/c.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_the_commit_says_whether_files_differ_from_it(checkout, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # of a git hook that runs the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    assert commit_of(checkout) is None  # no git repository
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(checkout), *command], check=True)
    clean = commit_of(checkout)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (checkout / "README.md").write_text("no code")
    assert commit_of(checkout) == clean
    (checkout / "tasks/new.py").touch()
    assert commit_of(checkout) == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit_of(checkout) is None  # no git
