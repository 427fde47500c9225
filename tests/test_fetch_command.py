"""`skipdit download` end to end against an imitation of a hub on the loopback address."""

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import pytest
import yaml
from http_server import Resource, serving

from skipdit.cli import main
from skipdit.registry import packages
from skipdit.registry.records import Records
from skipdit.registry.schema import PypiSource
from skipdit.registry.status import Failed, Mismatch

COMMIT = "a" * 40
SKIP = b"skip weights" * 1000
VAE = {"vae/config.json": b"{}", "vae/diffusion_pytorch_model.bin": b"vae" * 500, "t2v.pt": b"not wanted"}


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", "hub-secret")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def own(tmp_path: Path, *entries: dict) -> list[str]:
    """Words that pass a registry of these entries."""
    common = {"function": "a test", "sets": ["complete"]}
    content = {"system": "Mine", "entries": [{**common, **entry} for entry in entries]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    return ["--registry", str(tmp_path / "mine.yaml")]


def entry(name: str, path: str, source: dict, **fields) -> dict:
    return {"id": f"mine/{name}", "path": path, "source": source, **fields}


def download(root: Path, *words: str) -> int:
    return main(["download", "--root", str(root), "--retries", "2", "--timeout", "5", *words])


def files_below(folder: Path) -> list[str]:
    return sorted(
        str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file() and ".skipdit" not in item.parts
    )


# -- the hub


def test_a_folder_of_a_repository_without_the_rest_of_it(server, root, capsys):
    server.add_hub_repo("maxin-cn/Latte", VAE)
    assert download(root, "skip-dit/vae") == 0
    assert files_below(root) == [
        "pretrained/Latte/vae/config.json",
        "pretrained/Latte/vae/diffusion_pytorch_model.bin",
    ]
    record = Records(root).get("skip-dit/vae")
    assert record.revision == COMMIT
    assert {item.path: item.sha256 for item in record.files} == {
        "pretrained/Latte/vae/config.json": sha256(b"{}"),
        "pretrained/Latte/vae/diffusion_pytorch_model.bin": sha256(VAE["vae/diffusion_pytorch_model.bin"]),
    }
    server.requests.clear()
    assert download(root, "skip-dit/vae") == 0
    assert download(root, "--verify", "--", "skip-dit/vae") == 0
    assert server.requests == []
    (root / "pretrained/Latte/vae/config.json").write_bytes(b"[]")
    assert download(root, "--verify=size", "skip-dit/vae") == 0
    assert download(root, "--verify=hash", "skip-dit/vae") == 3
    (root / "pretrained/Latte/vae/config.json").unlink()
    assert download(root, "--verify", "--", "skip-dit/vae") == 5


def test_a_branch_is_pinned_by_the_first_fetch(server, root):
    server.add_hub_repo("maxin-cn/Latte", VAE)
    assert download(root, "skip-dit/vae") == 0
    newer = {**VAE, "vae/config.json": b'{"new": 1}'}
    old = {path: resource for path, resource in server.resources.items() if COMMIT in path}
    server.add_hub_repo("maxin-cn/Latte", newer, commit="b" * 40)
    server.resources.update(old)
    (root / "pretrained/Latte/vae/config.json").unlink()
    assert download(root, "skip-dit/vae") == 0
    assert (root / "pretrained/Latte/vae/config.json").read_bytes() == b"{}"


def test_files_in_git_are_checked_by_their_blob_id(server, root, tmp_path, capsys):
    server.add_hub_repo("me/small", {"a.json": b"{}"}, lfs=False)
    words = own(tmp_path, entry("small", "small/", {"kind": "hf_hub", "repo": "me/small"}))
    server.resources[f"/me/small/resolve/{COMMIT}/a.json"].body = b"[]"
    assert download(root, *words) == 3
    assert "git_sha1" in capsys.readouterr().err
    assert files_below(root) == ["small/a.json.bad"]


def test_what_hub_and_registry_disagree_on_is_not_fetched(server, root, tmp_path, capsys):
    server.add_hub_repo("me/model", {"w.pt": SKIP})
    source = {"kind": "hf_hub", "repo": "me/model", "file": "w.pt"}
    assert download(root, *own(tmp_path, entry("w", "w.pt", source, sha256="0" * 64))) == 3
    assert "the registry says sha256 000" in capsys.readouterr().err
    assert server.asked(f"/me/model/resolve/{COMMIT}/w.pt") == []


def test_a_wrong_hash_ends_in_status_3_and_bad(server, root, tmp_path, capsys):
    server.resources["/w.pt"] = Resource(SKIP)
    source = {"kind": "url", "url": f"{server.url}/w.pt"}
    assert download(root, *own(tmp_path, entry("w", "pretrained/w.pt", source, md5="0" * 32))) == 3
    assert files_below(root) == ["pretrained/w.pt.bad"]
    assert "w.pt.bad" in capsys.readouterr().err


def test_the_token_goes_to_the_hub_alone(server, root, tmp_path):
    with serving() as elsewhere:
        server.add_hub_repo("me/model", {"w.pt": SKIP})
        elsewhere.resources["/cdn"] = Resource(SKIP)
        elsewhere.resources["/other.pt"] = Resource(b"other")
        server.resources[f"/me/model/resolve/{COMMIT}/w.pt"].redirect = f"{elsewhere.url}/cdn"
        words = own(
            tmp_path,
            entry("w", "w.pt", {"kind": "hf_hub", "repo": "me/model", "file": "w.pt"}),
            entry("other", "other.pt", {"kind": "url", "url": f"{elsewhere.url}/other.pt"}),
        )
        assert download(root, *words) == 0
        assert all(
            {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer hub-secret"
            for _, _, headers in server.requests
        )
        assert len(server.requests) == 2
        assert {path for _, path, _ in elsewhere.requests} == {"/cdn", "/other.pt"}
        assert not any("authorization" in map(str.lower, headers) for _, _, headers in elsewhere.requests)


def test_a_mirror_of_the_hub_gets_no_token(server, root, tmp_path):
    with serving() as mirror:
        mirror.add_hub_repo("maxin-cn/Latte", VAE)
        assert download(root, "--mirror", mirror.url, "skip-dit/vae") == 0
        assert server.requests == []
        assert len(mirror.requests) == 3
        assert not any("authorization" in map(str.lower, headers) for _, _, headers in mirror.requests)


def test_a_busy_hub_is_asked_again(server, root):
    server.add_hub_repo("maxin-cn/Latte", VAE)
    server.resources["/api/models/maxin-cn/Latte/revision/main"].answers = [(429, {"Retry-After": "0"})]
    assert download(root, "skip-dit/vae") == 0


def test_a_mirror_of_the_registry_is_taken_when_the_source_is_gone(server, root, tmp_path):
    server.add_hub_repo("new/home", {"w.pt": SKIP})
    source = {"kind": "hf_hub", "repo": "old/home", "file": "w.pt"}
    words = own(tmp_path, entry("w", "w.pt", {**source, "mirrors": [{**source, "repo": "new/home"}]}))
    assert download(root, *words) == 0
    assert (root / "w.pt").read_bytes() == SKIP
    server.resources["/second.pt"] = Resource(SKIP)
    first = {"kind": "url", "url": f"{server.url}/first.pt"}
    second = {"kind": "url", "url": f"{server.url}/second.pt"}
    assert download(root, *own(tmp_path, entry("v", "v.pt", {**first, "mirrors": [second]}))) == 0
    assert (root / "v.pt").read_bytes() == SKIP


def test_the_cache_of_the_hub_is_filled_as_its_library_reads_it(server, root, tmp_path):
    from huggingface_hub import snapshot_download

    files = {"model_index.json": b"{}", "unet/model.bin": SKIP, "zs2_576w/copy.bin": b"copy"}
    server.add_hub_repo("cerspense/zeroscope_v2_576w", files)
    assert download(root, "next-gpt/zeroscope") == 0
    found = Path(snapshot_download("cerspense/zeroscope_v2_576w", cache_dir=tmp_path / "hub", local_files_only=True))
    assert files_below(found) == ["model_index.json", "unet/model.bin"]
    assert (found / "unet/model.bin").read_bytes() == SKIP
    assert files_below(root) == []
    server.requests.clear()
    assert download(root, "next-gpt/zeroscope") == 0
    assert server.requests == []


def test_one_repository_for_two_places_is_fetched_once(server, root, tmp_path):
    server.add_hub_repo("me/model", {"w.pt": SKIP})
    source = {"kind": "hf_hub", "repo": "me/model", "file": "w.pt"}
    assert download(root, *own(tmp_path, entry("a", "a/w.pt", source), entry("b", "b/other.pt", source))) == 0
    assert (root / "a/w.pt").read_bytes() == (root / "b/other.pt").read_bytes() == SKIP
    assert len(server.asked(f"/me/model/resolve/{COMMIT}/w.pt")) == 1


def test_two_different_files_for_one_path_are_refused_before_any_work(server, root, tmp_path, capsys):
    server.resources["/a.pt"], server.resources["/b.pt"] = Resource(b"a"), Resource(b"b")
    words = own(
        tmp_path,
        entry("a", "models/README.md", {"kind": "url", "url": f"{server.url}/a.pt"}),
        entry("b", "models/readme.md", {"kind": "url", "url": f"{server.url}/b.pt"}),
    )
    assert download(root, *words) == 2
    assert "mine/b and mine/a would both write" in capsys.readouterr().err
    assert [method for method, _, _ in server.requests] == ["HEAD", "HEAD"]


# -- the plan


def test_the_plan_shows_bytes_licences_and_room_and_fetches_nothing(server, root, capsys):
    server.add_hub_repo("maxin-cn/Latte", VAE)
    assert download(root, "--dry-run", "skip-dit/vae", "skip-dit/ucf101-skip") == 0
    out = capsys.readouterr().out
    assert "3 downloads, 2.77 GB" in out
    assert "MIT (Stable Diffusion VAE): skip-dit/vae" in out
    assert f"Room: 2.77 GB needed in {root}" in out
    assert files_below(root) == []


def test_the_result_as_json(server, root, capsys):
    server.add_hub_repo("maxin-cn/Latte", VAE)
    assert download(root, "--json", "skip-dit/vae", "next-gpt/vicuna") == 6
    result = json.loads(capsys.readouterr().out)
    assert sorted(item["bytes"] for item in result["fetched"]["skip-dit/vae"]) == [2, 1500]
    assert result["errors"]["next-gpt/vicuna"]["status"] == 6


def test_too_little_room_is_told_before_any_work(server, root, tmp_path, capsys):
    server.add_hub_repo("me/model", {"w.pt": SKIP})
    path = f"/api/models/me/model/revision/{COMMIT[:-1]}b"
    info = json.loads(server.resources["/api/models/me/model/revision/main"].body)
    info["siblings"][0]["lfs"]["size"] = info["siblings"][0]["size"] = 10**16
    server.resources[path] = server.resources["/api/models/me/model/revision/main"] = Resource(
        json.dumps(info).encode(), content_type="application/json"
    )
    source = {"kind": "hf_hub", "repo": "me/model", "file": "w.pt"}
    assert download(root, *own(tmp_path, entry("w", "w.pt", source))) == 4
    assert "10000000000000000 bytes are needed" in capsys.readouterr().err
    assert files_below(root) == []


def test_a_failure_does_not_stop_the_others(server, root, tmp_path, capsys):
    server.resources["/good.pt"] = Resource(SKIP)
    words = own(
        tmp_path,
        entry("bad", "bad.pt", {"kind": "url", "url": f"{server.url}/nothing.pt"}),
        entry("good", "good.pt", {"kind": "url", "url": f"{server.url}/good.pt"}),
    )
    assert download(root, *words) == 1
    assert files_below(root) == ["good.pt"]
    out = capsys.readouterr()
    assert f"sha256 {sha256(SKIP)} recorded" in out.out
    assert "HTTP 404" in out.err


def test_a_first_fetch_records_the_hash_that_later_ones_must_meet(server, root, tmp_path, capsys):
    server.resources["/w.pt"] = Resource(SKIP)
    words = own(tmp_path, entry("w", "w.pt", {"kind": "url", "url": f"{server.url}/w.pt"}))
    assert download(root, *words) == 0
    (root / "w.pt").unlink()
    server.resources["/w.pt"] = Resource(b"something else", etag='"two"')
    assert download(root, *words) == 3
    said = capsys.readouterr()
    assert "14 bytes, 12000 were expected" in said.err
    assert "to accept another file, remove" in said.out
    assert files_below(root) == []
    server.resources["/w.pt"] = Resource(SKIP[::-1], etag='"three"')
    assert download(root, *words) == 3
    assert f"instead of {sha256(SKIP)}" in capsys.readouterr().err
    assert files_below(root) == ["w.pt.bad"]


# -- archives


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, body in members.items():
            file.writestr(name, body)
    return buffer.getvalue()


def test_five_entries_of_one_archive_fetch_it_once(server, root):
    """The real entries of RAFT, the loopback server in the place of Dropbox; the hashes cannot agree."""
    names = ("chairs", "kitti", "sintel", "small", "things")
    members = {f"models/raft-{name}.pth": name.encode() for name in names}
    server.resources["/s/4j4z58wuv8o0mfz/models.zip"] = Resource(zipped(members))
    assert download(root, "--mirror", f"https://www.dropbox.com={server.url}", "sam-pt/raft/*") == 3
    asked = [path for method, path, _ in server.requests if method == "GET"]
    assert asked == ["/s/4j4z58wuv8o0mfz/models.zip?dl=1"]
    assert not list((root / "models/raft_ckpts").glob("*.pth"))


def test_members_are_checked_renamed_and_the_archive_removed(server, root, tmp_path):
    server.resources["/models.zip"] = Resource(zipped({"models/a.pth": b"aa", "models/b.pth": b"bb", "x": b"x"}))
    archive = {
        "kind": "archive",
        "archive": {"kind": "url", "url": f"{server.url}/models.zip"},
        "format": "zip",
    }
    words = own(
        tmp_path,
        entry("a", "m/first.pt", {**archive, "member": "models/a.pth"}, md5=hashlib.md5(b"aa").hexdigest()),
        entry("b", "m/b.pth", {**archive, "member": "models/b.pth"}),
        entry("all", "flat/", {**archive, "members": ["*.pth"], "flatten": True}),
    )
    assert download(root, *words) == 0
    assert files_below(root) == ["flat/a.pth", "flat/b.pth", "m/b.pth", "m/first.pt"]
    asked = [method for method, _, _ in server.requests]
    assert asked.count("GET") == 2  # once for each folder
    server.requests.clear()
    assert download(root, *words[:2], "mine/a", "mine/b") == 0
    assert server.requests == []


def test_an_evil_archive_ends_in_status_1_and_nothing_is_unpacked(server, root, tmp_path, capsys):
    server.resources["/evil.zip"] = Resource(zipped({"good": b"1", "../../evil": b"2"}))
    source = {"kind": "archive", "archive": {"kind": "url", "url": f"{server.url}/evil.zip"}, "format": "zip"}
    assert download(root, *own(tmp_path, entry("evil", "data/", source))) == 1
    assert "could leave the folder" in capsys.readouterr().err
    assert files_below(root) == ["data/evil.zip.bad"]
    assert not (tmp_path / "evil").exists()


def test_a_broken_archive_is_fetched_again_by_the_next_call(server, root, tmp_path, capsys):
    good = zipped({"a.jpg": b"a" * 5000})
    source = {"kind": "archive", "archive": {"kind": "url", "url": f"{server.url}/a.zip"}, "format": "zip"}
    words = own(tmp_path, entry("set", "data/", source, counts={"*.jpg": 1}))
    server.resources["/a.zip"] = Resource(good[:3000])
    assert download(root, *words) == 1
    assert "cannot be read as an archive" in capsys.readouterr().err
    server.resources["/a.zip"] = Resource(good, etag='"two"')
    assert download(root, *words) == 0
    assert files_below(root) == ["data/a.jpg", "data/a.zip.bad"]


def test_data_sets_are_unpacked_and_their_layout_checked(server, root, monkeypatch, capsys):
    frames = {f"sky_train/v/v_1/v_frames_{number:08}.jpg": b"jpg" for number in range(1000)}
    archive = zipped(frames)
    server.add_hub_repo("maxin-cn/SkyTimelapse", {"sky_timelapse.zip": archive}, kind="datasets")
    assert download(root, "data/skytimelapse") == 0
    assert len(files_below(root / "data/skytimelapse")) == 1000
    assert download(root, "--verify", "--", "data/skytimelapse") == 0
    server.add_hub_repo("maxin-cn/FaceForensics", {"FaceForensics.zip": zipped({"a.mp4": b"1"})}, kind="datasets")
    assert download(root, "data/faceforensics") == 1
    assert "1 files match **/*.*, at least 500 were expected" in capsys.readouterr().err


def test_volumes_and_rar_are_left_packed_with_the_tool_named(server, root, capsys):
    volumes = {f"taichi-256-part.{end}": end.encode() for end in ("z01", "z02", "zip")}
    server.add_hub_repo("maxin-cn/Taichi-HD", volumes, kind="datasets")
    server.resources["/data/UCF101/UCF101.rar"] = Resource(b"Rar!\x1a\x07\x01\x00")
    mirror = f"https://www.crcv.ucf.edu={server.url}"
    assert download(root, "--mirror", mirror, "data/taichi-hd", "data/ucf101") == 6
    assert files_below(root) == ["data/taichi-hd/" + name for name in volumes] + ["data/ucf101/UCF101.rar"]
    said = capsys.readouterr().err
    assert f"7z x -o{root}/data/taichi-hd {root}/data/taichi-hd/taichi-256-part.zip" in said
    assert "unrar" in said


# -- other sources


def test_google_drive_goes_through_gdown_and_is_checked(root, tmp_path, monkeypatch, capsys):
    """gdown cannot be pointed elsewhere than Google: a stand-in writes what it would, the rest is real."""
    calls = []

    def fake(id: str, output: str, quiet: bool, resume: bool) -> str:
        calls.append(id)
        Path(output).write_bytes(SKIP if id == "good" else b"<!DOCTYPE html> quota")
        return output

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=fake))
    good = entry("good", "good.npy", {"kind": "google_drive", "file_id": "good"}, sha256=sha256(SKIP))
    page = entry("page", "page.npy", {"kind": "google_drive", "file_id": "page"})
    assert download(root, *own(tmp_path, good, page)) == 1
    assert sorted(calls) == ["good", "page"]
    assert files_below(root) == ["good.npy"]
    assert "a web page" in capsys.readouterr().err


def test_modelscope_lists_and_the_own_client_fetches(server, root, tmp_path, monkeypatch, capsys):
    """With the real package, where it is installed; equal files of two repositories are fetched once."""
    pytest.importorskip("modelscope", reason="the modelscope extra is not installed")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    shared = b"clip" * 1000
    for repo, name in (("iic/HiGen", "higen.pth"), ("iic/tf-t2v", "tft2v.pth")):
        files = {name: SKIP + name.encode(), "open_clip.bin": shared, "README.md": repo.encode()}
        rows = [
            {"Path": path, "Type": "blob", "Size": len(body), "Sha256": sha256(body)} for path, body in files.items()
        ]
        listing = {"Code": 200, "Success": True, "Message": "", "Data": {"Files": rows}}
        server.resources[f"/api/v1/models/{repo}/repo/files"] = Resource(
            json.dumps(listing).encode(), content_type="application/json"
        )
        server.resources[f"/api/v1/models/{repo}/repo"] = Resource(on_query=files)
    assert download(root, "vgen/higen", "vgen/tf-t2v") == 0, capsys.readouterr().err
    assert files_below(root) == ["models/higen.pth", "models/open_clip.bin", "models/tft2v.pth"]
    fetched = [path for _, path, _ in server.requests if "FilePath" in path]
    assert len(fetched) == 3


@pytest.mark.parametrize(
    "module, words",
    [
        ("gdown", ["sam-pt/tapnet/open_source_ckpt/checkpoint_wo_optstate.npy"]),
        ("modelscope", ["vgen/higen"]),
    ],
)
def test_an_extra_that_is_not_installed_is_named(server, root, monkeypatch, capsys, module, words):
    for name in [name for name in sys.modules if name.split(".")[0].startswith(module)] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    assert download(root, *words) == 6
    assert f"pip install {module}" in capsys.readouterr().err


def make_sdist(folder: Path) -> Path:
    path = folder / "weights_of_mine-1.0.tar.gz"
    texts = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "weights-of-mine"\nversion = "1.0"\n',
        "PKG-INFO": "Metadata-Version: 2.1\nName: weights-of-mine\nVersion: 1.0\n",
        "backend.py": "import pathlib\n"
        "METADATA = 'Metadata-Version: 2.1\\nName: weights-of-mine\\nVersion: 1.0\\n'\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    info = pathlib.Path(folder, 'weights_of_mine-1.0.dist-info')\n    info.mkdir()\n"
        "    (info / 'METADATA').write_text(METADATA)\n"
        "    return info.name\n"
        "def build_wheel(*args, **kwargs):\n    raise NotImplementedError\n",
        "weights.ckpt": SKIP.decode(),
    }
    with tarfile.open(path, "w:gz") as file:
        for name, text in texts.items():
            info = tarfile.TarInfo(f"weights_of_mine-1.0/{name}")
            info.size = len(text)
            file.addfile(info, io.BytesIO(text.encode()))
    return path


def test_a_package_file_comes_through_pip_with_its_hash_checked(root, tmp_path, monkeypatch):
    """Real pip, a folder in the index's place."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = make_sdist(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    fields = {"package": "weights-of-mine", "version": "1.0", "member": "weights_of_mine-1.0/weights.ckpt"}
    right = {"kind": "pypi", **fields, "sha256": sha256(path.read_bytes())}
    assert download(root, *own(tmp_path, entry("p", "w.ckpt", right, sha256=sha256(SKIP)))) == 0
    assert (root / "w.ckpt").read_bytes() == SKIP
    assert files_below(root) == ["w.ckpt"]
    with pytest.raises(Mismatch, match="another sha256"):
        packages.with_package(PypiSource(**fields, sha256="0" * 64), root, lambda file: None)
    with pytest.raises(Failed, match="no-such-package-of-mine==1.0"):
        missing = {**fields, "package": "no-such-package-of-mine"}
        packages.with_package(PypiSource(**missing, sha256="0" * 64), root, lambda file: None)


def test_the_script_takes_the_checkout_as_root(tmp_path):
    script = Path(__file__).parents[1] / "pretrained" / "download_ckpts.py"
    command = [sys.executable, str(script), "--list", "skip-dit/ucf101-skip"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, check=True)
    assert done.stdout.splitlines()[0] == f"Root: {script.parents[1]}"


# -- several calls, and calls that end early


def start(root: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "skipdit", "download", "--root", str(root), *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=root,
        preexec_fn=listens,
    )


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def gets(server) -> int:
    return sum(method == "GET" and path == "/w.pt" for method, path, _ in server.requests)


@pytest.mark.parametrize("known", [False, True], ids=["hash unknown", "hash known"])
def test_two_commands_at_once_fetch_once_and_both_succeed(server, root, tmp_path, known):
    server.resources["/w.pt"] = Resource(SKIP, trickle=(500, 0.1))
    fields = {"sha256": sha256(SKIP)} if known else {}
    words = own(tmp_path, entry("w", "w.pt", {"kind": "url", "url": f"{server.url}/w.pt"}, **fields))
    first = start(root, *words)
    wait_for(lambda: gets(server))
    second = start(root, *words)
    texts = [first.communicate(), second.communicate()]
    assert [first.returncode, second.returncode] == [0, 0], texts
    assert "another call is fetching it" in texts[1][1]
    assert gets(server) == 1
    assert (root / "w.pt").read_bytes() == SKIP
    assert files_below(root) == ["w.pt"]


def test_ctrl_c_keeps_the_part_and_the_next_call_goes_on(server, root, tmp_path):
    server.resources["/w.pt"] = Resource(SKIP, trickle=(500, 0.1))
    words = own(tmp_path, entry("w", "w.pt", {"kind": "url", "url": f"{server.url}/w.pt"}))
    process = start(root, *words)
    part = root / ".w.pt.part"
    wait_for(lambda: part.exists() and part.stat().st_size >= 1000)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert files_below(root) == [".w.pt.part", ".w.pt.part.json"]
    server.resources["/w.pt"].trickle = None
    server.requests.clear()
    assert download(root, *words) == 0
    assert int(server.asked("/w.pt")[1]["Range"][6:-1]) >= 1000
    assert (root / "w.pt").read_bytes() == SKIP
