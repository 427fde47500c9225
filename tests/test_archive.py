"""Archives: good ones unpack as asked, evil ones of each kind are refused before anything is written."""

import io
import random
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from skipdit.registry import archive
from skipdit.registry.archive import Limits, Member, extract, extract_all, members_of
from skipdit.registry.status import ByHand, Failed, Mismatch, NoSpace


def make_zip(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, body in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = mode << 16
            file.writestr(info, body)
    return path


def make_tar(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(body) if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(body))
    return path


MAKERS = pytest.mark.parametrize("make", [make_zip, make_tar])
GOOD = {"models/raft-small.pth": b"small", "models/raft-things.pth": b"things", "models/readme.txt": b"no"}


def refused(path: Path, what: str) -> None:
    """Refused by every way in, and nothing is written."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(Failed, match=what):
        members_of(path)
    with pytest.raises(Failed, match=what):
        extract_all(path, path.parent / "out")
    with pytest.raises(Failed, match=what):
        extract(path, {"x": path.parent / "out" / "x"}, lambda name, file: None)
    assert sorted(path.parent.rglob("*")) == before


@MAKERS
def test_members_are_chosen_and_renamed(make, tmp_path):
    path = make(tmp_path / "a", GOOD)
    seen = []
    extract(
        path,
        {
            "models/raft-small.pth": tmp_path / "out" / "tiny.pt",
            "models/raft-things.pth": tmp_path / "out" / "t.pt",
        },
        lambda name, file: seen.append((name, file.read_bytes())),
    )
    assert sorted(seen) == [("models/raft-small.pth", b"small"), ("models/raft-things.pth", b"things")]
    assert {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()} == {
        "tiny.pt": b"small",
        "t.pt": b"things",
    }


@MAKERS
def test_all_or_matching_members_with_or_without_their_folders(make, tmp_path):
    path = make(tmp_path / "a", GOOD)
    assert len(extract_all(path, tmp_path / "all")) == 3
    assert (tmp_path / "all/models/raft-small.pth").read_bytes() == b"small"
    got = extract_all(path, tmp_path / "flat", patterns=("*.pth",), flatten=True)
    assert sorted(got, key=str) == [Member("raft-small.pth", 5), Member("raft-things.pth", 6)]
    assert sorted(item.name for item in (tmp_path / "flat").iterdir()) == [
        "raft-small.pth",
        "raft-things.pth",
    ]


@MAKERS
def test_what_the_caller_refuses_is_not_put_in_place(make, tmp_path):
    def refuse(name: str, file: Path) -> None:
        raise Mismatch("wrong")

    path = make(tmp_path / "a", GOOD)
    with pytest.raises(Mismatch):
        extract(path, {"models/raft-small.pth": tmp_path / "out" / "x"}, refuse)
    assert list((tmp_path / "out").iterdir()) == []


@MAKERS
def test_a_member_that_is_not_there_is_named(make, tmp_path):
    with pytest.raises(Failed, match="no member 'models/raft-huge.pth'"):
        extract(make(tmp_path / "a", GOOD), {"models/raft-huge.pth": tmp_path / "x"}, lambda name, file: None)


@MAKERS
@pytest.mark.parametrize("name", ["/etc/cron.d/evil", "C:/evil", "C:evil"])
def test_absolute_paths_are_refused(make, name, tmp_path):
    refused(make(tmp_path / "a", {"good": b"", name: b"evil"}), "absolute path")


@MAKERS
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a\\..\\..\\evil"])
def test_paths_that_climb_out_are_refused(make, name, tmp_path):
    refused(make(tmp_path / "a", {name: b"evil"}), "could leave the folder")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_links_in_a_tar_are_refused(kind, tmp_path):
    refused(make_tar(tmp_path / "a", {"x": b""}, kind, "/etc/passwd"), "is a link")


def test_links_in_a_zip_are_refused(tmp_path):
    refused(make_zip(tmp_path / "a", {"x": b"/etc/passwd"}, stat.S_IFLNK | 0o777), "is a link")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=["char", "block", "fifo"])
def test_devices_and_pipes_in_a_tar_are_refused(kind, tmp_path):
    refused(make_tar(tmp_path / "a", {"x": b""}, kind), "device or pipe")


def test_devices_in_a_zip_are_refused(tmp_path):
    refused(make_zip(tmp_path / "a", {"x": b""}, stat.S_IFCHR | 0o666), "device or pipe")


@MAKERS
@pytest.mark.parametrize("pair", [("a/X.pt", "a/x.pt"), ("a/e\u0301", "a/\u00e9"), ("a/x", "a/./x")])
def test_names_that_are_one_on_some_file_systems_are_refused(make, pair, tmp_path):
    refused(make(tmp_path / "a", {pair[0]: b"1", pair[1]: b"2"}), "would be one file")


@MAKERS
def test_one_name_twice_after_flattening_is_refused(make, tmp_path):
    path = make(tmp_path / "a", {"a/x.pt": b"1", "b/X.pt": b"2"})
    with pytest.raises(Failed, match="after flattening"):
        extract_all(path, tmp_path / "out", flatten=True)
    assert not (tmp_path / "out").exists()
    assert len(extract_all(path, tmp_path / "out")) == 2


@MAKERS
def test_bombs_are_refused_by_ratio(make, tmp_path):
    refused(make(tmp_path / "a", {"zeros": bytes(80 << 20)}), "grows more than 200 times")


@MAKERS
def test_bombs_are_refused_by_size_and_number(make, tmp_path):
    path = make(tmp_path / "a", {f"{number}": random.Random(number).randbytes(1000) for number in range(20)})
    assert len(members_of(path, Limits(total=20_000, members=20))) == 20
    with pytest.raises(Failed, match="more than 19999 bytes"):
        members_of(path, Limits(total=19_999))
    with pytest.raises(Failed, match="refused"):
        members_of(path, Limits(members=19))


def test_a_zip_that_lies_about_a_size_writes_no_more_than_announced(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"x": bytes(100_000)})
    data = path.read_bytes()
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        assert struct.unpack_from("<I", data, at) == (100_000,)
        data = data[:at] + struct.pack("<I", 10) + data[at + 4 :]
    path.write_bytes(data)
    with pytest.raises((Failed, Mismatch)):
        extract_all(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_encrypted_zip_is_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"x": b"secret"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(data))
    refused(path, "encrypted")


@MAKERS
def test_a_truncated_archive_is_told(make, tmp_path):
    path = make(tmp_path / "a", {"x": random.Random(0).randbytes(50_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(Failed, match="cannot be read as an archive"):
        extract_all(path, tmp_path / "out")
    assert not any(item.is_file() for item in tmp_path.rglob("out/**/*"))


def test_no_room_is_told_before_unpacking(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", GOOD)
    (tmp_path / "out" / ".unpacking-a.zip").mkdir(parents=True)  # left by a killed call
    usage = archive.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(NoSpace, match="unpacking needs 13 bytes, 10 are free"):
        extract_all(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_rar_and_7z_name_their_tools(tmp_path):
    (tmp_path / "UCF101.rar").write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(100))
    with pytest.raises(ByHand, match="unrar, 7z or bsdtar"):
        extract_all(tmp_path / "UCF101.rar", tmp_path / "out")
    (tmp_path / "a.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(ByHand, match="p7zip-full"):
        extract_all(tmp_path / "a.7z", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_volumes_of_a_zip_name_the_tool_and_nothing_is_unpacked(tmp_path):
    """By the names beside it, and by the end record of the last volume alone."""
    whole = make_zip(tmp_path / "set.zip", {"x": b"1"}).read_bytes()
    (tmp_path / "set.z01").write_bytes(whole)
    for name in ("set.zip", "set.z01"):
        with pytest.raises(ByHand, match=r"7z x -o\S+ \S+set\.zip"):
            extract_all(tmp_path / name, tmp_path / "out")
    at = whole.rindex(b"PK\x05\x06") + 4
    (tmp_path / "last.zip").write_bytes(whole[:at] + b"\x04\x00" + whole[at + 2 :])
    with pytest.raises(ByHand, match="one of several volumes"):
        extract_all(tmp_path / "last.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
