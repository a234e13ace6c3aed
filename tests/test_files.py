"""Files are whole or absent, whoever writes at the same time and whatever fails on the way."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from streamlr import files
from streamlr.errors import BadFile, OutputExists, PathNotFound
from streamlr.files import check_output, digest, publish, read_json, write_json


def fill(path: Path, folder: bool, text: str = "new") -> None:
    if folder:
        (path / "inner").mkdir(parents=True)
        (path / "zarr.json").write_text("{}")
        (path / "inner" / "file").write_text(text)
    else:
        path.write_text(text)


def content(path: Path) -> str:
    return (path / "inner" / "file").read_text() if path.is_dir() else path.read_text()


FOLDER = pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])


@FOLDER
def test_a_target_appears_when_it_is_complete(tmp_path: Path, folder: bool):
    target = tmp_path / "target"
    with publish(target, folder=folder) as beside:
        assert beside.parent == tmp_path
        fill(beside, folder)
        assert not target.exists()
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


@FOLDER
@pytest.mark.parametrize("existing", [False, True], ids=["free", "taken"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path: Path, folder: bool, existing: bool, error: type[BaseException]):
    target = tmp_path / "target"
    if existing:
        fill(target, folder, "old")

    def interrupted() -> None:
        with publish(target, overwrite=True, folder=folder) as beside:
            fill(beside, folder)
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == ([target] if existing else [])
    assert not existing or content(target) == "old"


@FOLDER
def test_a_target_that_exists_is_kept_unless_it_may_be_replaced(tmp_path: Path, folder: bool):
    target = tmp_path / "target"
    fill(target, folder, "old")
    with pytest.raises(OutputExists, match="overwrite"), publish(target, folder=folder) as beside:
        fill(beside, folder)
    assert content(target) == "old"
    with publish(target, overwrite=True, folder=folder) as beside:
        fill(beside, folder)
        assert content(target) == "old"
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_thing_of_another_kind_is_never_replaced(tmp_path: Path):
    fill(tmp_path / "file", False, "old")
    fill(tmp_path / "store", True, "old")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "diary").write_text("old")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    refused = [("file", True, "is a file"), ("store", False, "is a zarr store"), ("precious", True, "other files")]
    refused += [
        ("precious", False, "other files"),
        ("empty", False, "folder"),
        ("pipe", False, "neither"),
        ("pipe", True, "neither"),
    ]
    for name, folder, what in refused:
        with pytest.raises(OutputExists, match=what), publish(tmp_path / name, overwrite=True, folder=folder):
            pytest.fail("checked before the writing")
    assert sorted(tmp_path.rglob("*")) == before
    with publish(tmp_path / "empty", overwrite=True, folder=True) as beside:
        fill(beside, True)
    assert content(tmp_path / "empty") == "new"


@pytest.mark.parametrize("mark", ["zarr.json", ".zgroup", ".zarray"])
def test_every_zarr_store_may_be_replaced(tmp_path: Path, mark: str):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / mark).write_text("{}")
    with publish(tmp_path / "store", overwrite=True, folder=True) as beside:
        fill(beside, True)
    assert content(tmp_path / "store") == "new"


@FOLDER
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, folder: bool, dangling: bool):
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "link", tmp_path / "there" / "real"
    link.symlink_to(real)
    if not dangling:
        fill(real, folder, "old")
    with pytest.raises(OutputExists), publish(link, folder=folder):
        pytest.fail("checked before the writing")
    with publish(link, overwrite=True, folder=folder) as beside:
        fill(beside, folder)
    assert link.is_symlink()
    assert content(real) == "new"
    assert list((tmp_path / "there").iterdir()) == [real]


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_replacement_that_is_interrupted_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, done: bool
):
    target, renamed, rename = tmp_path / "target", [], os.rename
    fill(target, True, "old")

    def interrupted(source: Path, destination: Path) -> None:
        renamed.append(source)
        if len(renamed) != at or done:
            rename(source, destination)
        if len(renamed) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), publish(target, overwrite=True, folder=True) as beside:
        fill(beside, True)
    assert content(target) == ("new" if at == 2 and done else "old")
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path):
    target = tmp_path / "target"

    def late() -> None:
        with publish(target) as beside:
            fill(beside, False)
            target.write_text("theirs")

    with pytest.raises(OutputExists):
        late()
    assert target.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


@FOLDER
@pytest.mark.parametrize("links", [False, True], ids=["no links", "links"])
def test_what_is_written_between_the_check_and_the_naming_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, links: bool
):
    target, check = tmp_path / "target", files.check_output

    def then_another_writes(*arguments: Any, **options: Any) -> None:
        check(*arguments, **options)
        if [path for path in tmp_path.iterdir() if path.name.startswith(".target.partial")]:
            fill(target, folder, "theirs")

    def no_link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files, "check_output", then_another_writes)
    if not links:
        monkeypatch.setattr(files.os, "link", no_link)
    with pytest.raises(OutputExists, match="meanwhile"), publish(target, folder=folder) as beside:
        fill(beside, folder)
    assert content(target) == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_files_are_written_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_link(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files.os, "link", no_link)
    with publish(tmp_path / "target") as beside:
        fill(beside, False)
    assert content(tmp_path / "target") == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


@FOLDER
@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
def test_of_several_that_publish_at_once_one_is_there_whole(tmp_path: Path, folder: bool, overwrite: bool):
    target = tmp_path / "target"
    start, failed = threading.Barrier(8), []

    def one(number: int) -> None:
        start.wait()
        try:
            with publish(target, overwrite=overwrite, folder=folder) as beside:
                fill(beside, folder, str(number) * 1000)
        except OutputExists:
            failed.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = content(target)
    assert text == text[0] * 1000
    assert len(failed) < 8 if overwrite else len(failed) == 7
    assert int(text[0]) not in failed
    assert list(tmp_path.iterdir()) == [target]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, events = tmp_path / "target", []
    fsync, link = os.fsync, os.link

    def noting_fsync(descriptor: int) -> None:
        events.append("flushed")
        fsync(descriptor)

    def noting_link(source: Any, destination: Any) -> None:
        events.append("named")
        link(source, destination)

    monkeypatch.setattr(files.os, "fsync", noting_fsync)
    monkeypatch.setattr(files.os, "link", noting_link)
    with publish(target) as beside:
        fill(beside, False)
    assert events == ["flushed", "named", "flushed"]  # the file, its name, the folder that holds the name


def test_a_failing_rename_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "target"
    fill(target, False, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"), publish(target, overwrite=True) as beside:
        fill(beside, False)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_outputs_are_checked_before_any_work(tmp_path: Path):
    with pytest.raises(PathNotFound, match="create it first"):
        check_output(tmp_path / "no" / "target", overwrite=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists):
        check_output(tmp_path / "dangling", overwrite=False)
    check_output(tmp_path / "free", overwrite=False)
    assert issubclass(OutputExists, FileExistsError)
    assert issubclass(PathNotFound, FileNotFoundError)


def test_a_digest_depends_on_content_alone():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    # sha256 of '{"a":1}', as sha256sum gives it
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert digest(0.1) != digest(0.1 + 2**-56)
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "value.json"
    write_json(path, "test kind", 3, {"number": 0.1, "text": "ä", "list": [1, None]}, overwrite=False)
    return path


def test_what_was_written_is_read(written: Path):
    assert read_json(written, "test kind", 3) == {
        "format": "test kind",
        "version": 3,
        "number": 0.1,
        "text": "ä",
        "list": [1, None],
    }
    assert read_json(written, "test kind", 4)["version"] == 3
    with pytest.raises(OutputExists):
        write_json(written, "test kind", 3, {}, overwrite=False)


def test_every_truncation_is_noticed(written: Path):
    whole = written.read_bytes()
    for length in range(len(whole) - 2):
        written.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            read_json(written, "test kind", 3)


def test_every_flipped_bit_is_noticed(written: Path):
    whole = written.read_bytes()
    original = read_json(written, "test kind", 3)
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            written.write_bytes(damaged)
            try:
                assert read_json(written, "test kind", 3) == original  # white space between values carries nothing
            except BadFile:
                continue


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a test kind file"),
        ("[1, 2]", "not a test kind file"),
        ("null", "not a test kind file"),
        ('{"format": "other", "version": 1}', "its format is not 'test kind'"),
        ('{"format": "test kind", "version": 4}', "format version 4; this release reads up to 3"),
        ('{"format": "test kind", "version": "3"}', "format version 3"),
        ('{"format": "test kind"}', "format version None"),
        ('{"format": "test kind", "version": 3}', "digest differs"),
        ('{"format": "test kind", "version": 3, "number": NaN, "digest": "0"}', "not finite"),
        ('{"format": "test kind", "version": 3, "number": Infinity}', "not finite"),
        ("[" * 100_000, "not a test kind file"),
    ],
)
def test_what_is_not_such_a_file_is_refused(tmp_path: Path, text: str, why: str):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(BadFile, match=why):
        read_json(path, "test kind", 3)


def test_other_bytes_are_refused(tmp_path: Path):
    path = tmp_path / "bad.json"
    for content in (b"\x80\x04\x95", b"\xff\xfe", b"PK\x03\x04", os.urandom(100)):
        path.write_bytes(content)
        with pytest.raises(BadFile):
            read_json(path, "test kind", 3)
    with pytest.raises(PathNotFound):
        read_json(tmp_path / "none.json", "test kind", 3)
    with pytest.raises(PathNotFound):
        read_json(tmp_path, "test kind", 3)


def test_a_huge_file_is_refused_unread(tmp_path: Path):
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(BadFile, match="more than any"):
        read_json(path, "test kind", 3)


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", "test kind", 3, {"number": float("nan")}, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_digest_of_json_is_that_of_its_values(written: Path):
    # another layout of the same values is the same file
    body = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps(body))
    assert read_json(written, "test kind", 3)["number"] == 0.1
