from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tasks.data import files
from tasks.data.files import AtomicFile, read_jsonl, read_text, write_atomically
from tasks.errors import DataError


def test_text_is_read_without_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(path, "key") == "one\ntwo\nthree\n"


def test_bytes_that_are_no_utf8_are_located(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("fine\nalso fïne\n".encode() + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"^data.local: .*a\.txt:3: not UTF-8 text \(byte 0xe9\)"):
        read_text(path, "data.local")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl:3: broken JSON"),
        (b"[1, 2]", r"a\.jsonl:3: holds list, each line must be a JSON object"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:3: no column text; present are body, id"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: not UTF-8 text"),
        (b'{"text": "half \\ud83d"}', r"a\.jsonl:3: holds half of a surrogate pair"),
    ],
)
def test_a_broken_line_of_json_is_located(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "whole \\ud83d\\ude00"}\n\n' + line + b"\n")
    rows = read_jsonl(path, "data.local", ["text"])
    assert next(rows) == {"text": "whole \N{GRINNING FACE}"}
    with pytest.raises(DataError, match=rf"^data.local: .*{message}"):
        list(rows)


def test_missing_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^key: .*none.txt cannot be read: No such file"):
        read_text(tmp_path / "none.txt", "key")
    with pytest.raises(DataError, match="^key: .*none.jsonl cannot be read: No such file"):
        list(read_jsonl(tmp_path / "none.jsonl", "key"))


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"old", "key")
    with pytest.raises(KeyboardInterrupt), AtomicFile(path, "key") as handle:
        handle.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["write", "flush"])
def test_a_full_disk_leaves_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(DataError, match=r"^cache_dir: .*a\.bin not written: no space left on the disk of "),
        AtomicFile(tmp_path / "a.bin", "cache_dir") as handle,
    ):
        if step == "flush":
            monkeypatch.setattr(files.os, "fsync", full)
        handle.write(b"12345")
        if step == "write":
            handle._handle.close()  # what is written next meets the file below
            handle._handle = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            handle.write(b"12345")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"^cache_dir: .*a\.bin not written: (Not a directory|File exists)"):
        write_atomically(tmp_path / "file" / "a.bin", b"", "cache_dir")


def test_a_killed_writer_leaves_no_file_and_is_cleaned_up_after(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from tasks.data.files import AtomicFile
        with AtomicFile(Path(sys.argv[1]), "key") as handle:
            handle.write(b"half" * 100_000)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "a.bin"
    root = Path(files.__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(os.listdir(tmp_path)) == 1, "the killed process leaves its temporary file"
    foreign = tmp_path / ".a.bin.another-host.1.tmp"
    foreign.write_bytes(b"")
    write_atomically(path, b"whole", "key")
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "a.bin"]
