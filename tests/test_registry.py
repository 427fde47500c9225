"""The shipped registry against the documented list; messages; choosing; the tree; the state on disk."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml

from skipdit.cli import main
from skipdit.errors import UserError
from skipdit.registry.catalogue import load_catalogue
from skipdit.registry.records import FileRecord, Record, Records
from skipdit.registry.report import short_size, tree_lines, words
from skipdit.registry.schema import DropboxSource, UrlSource, parse_size
from skipdit.registry.sources import Resolver
from skipdit.registry.state import check

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SKIPDIT_SHARED", ROOT.parent / "shared"))
OURS = {"metrics/i3d-kinetics-400", "metrics/inception-v3"}
DOUBTED = "skip-dit/ffs-skip"  # its hash in the reference is that of an earlier upload


@pytest.fixture(scope="module")
def catalogue():
    return load_catalogue()


@pytest.fixture(scope="module")
def by_id(catalogue):
    return {entry.id: entry for entry in catalogue.entries}


def write(registry: Path, **fields) -> Path:
    """A registry file of one entry, some of whose fields are replaced (None: left out)."""
    entry = {
        "id": "mine/model",
        "function": "a test",
        "path": "pretrained/model.pt",
        "sets": ["complete"],
        "source": {"kind": "url", "url": "https://weights.invalid/model.pt"},
    } | fields
    entry = {name: value for name, value in entry.items() if value is not None}
    registry.write_text(yaml.safe_dump({"system": "Mine", "entries": [entry]}))
    return registry


# -- the shipped files -----------------------------------------------------------------------------


def test_all_entries_of_the_documentation_are_there(by_id):
    path = SHARED / "reference" / "checkpoints.yaml"
    if not path.is_file():
        pytest.skip(f"the list of documented checkpoints is not there: {path}")
    reference = yaml.safe_load(path.read_text())["checkpoints"]
    assert len(reference) == 81
    assert set(by_id) == {row["id"] for row in reference} | OURS
    for row in reference:
        entry = by_id[row["id"]]
        assert entry.path == {"(hub cache)": "hub-cache"}.get(row["path"], row["path"])
        assert entry.md5 == row.get("md5")
        assert entry.function == row["function"]
        assert entry.documented == row.get("documented", True)
        assert entry.size == row.get("size")
        if entry.id != DOUBTED:
            assert (entry.sha256, entry.bytes) == (row.get("sha256"), row.get("size_bytes"))
        if row.get("kind_of") != "dataset":
            assert list(entry.sets) == row["sets"]
            assert entry.system == row["system"]
        revision = row["source"].get("revision")
        assert revision is None or entry.source.revision == revision


def test_one_file_a_system(catalogue):
    counts = {system.system: len(system.entries) for system in catalogue.systems}
    assert counts == {"Skip-DiT": 21, "datasets": 4, "SAM-PT": 25, "Vitron": 22, "NExT-GPT": 5, "VGen": 6}


def test_every_entry_has_a_licence_note(by_id):
    assert [entry.id for entry in by_id.values() if not entry.licence] == []


def test_the_guides_wrong_links_are_mended(by_id):
    sky = by_id["skip-dit/skytimelapse-skip"]
    assert (sky.source.file, sky.documented_url.rsplit("/", 1)[1]) == (
        "skytimelapse-skip.pt",
        "skylapse-skip.pt",
    )
    assert by_id["data/skytimelapse"].source.archive.repo == "maxin-cn/SkyTimelapse"
    assert by_id["skip-dit/latte-skip-t2v"].source.file == "Latte-skip.pt"
    assert by_id["skip-dit/dit-xl-2-skip"].source.file == "DiT-XL-2-skip.pt"
    assert by_id["sam-pt/samhq/sam_hq_vit_t.pth"].source.file == "sam_hq_vit_tiny.pth"


def test_a_hash_in_the_file_name_agrees(by_id):
    for name in ("b_01ec64", "l_0b3195", "h_4b8939"):
        assert by_id[f"sam-pt/sam/sam_vit_{name}.pth"].md5.startswith(name[2:])


def test_no_argument_is_what_class_to_video_needs(catalogue):
    assert [entry.id for entry in catalogue.select()] == ["skip-dit/ucf101-skip", "skip-dit/vae"]
    vae = catalogue.select()[1]
    assert (vae.source.repo, vae.source.subfolder, vae.path) == (
        "maxin-cn/Latte",
        "vae",
        "pretrained/Latte/vae/",
    )


def test_choosing_by_system_set_and_pattern(catalogue):
    def ids(*arguments, **options):
        return [entry.id for entry in catalogue.select(*arguments, **options)]

    assert len(ids(["sam-pt/raft/*"])) == 5
    assert ids(["skip-dit/dit-xl-2-skip", "skip-dit/ucf101-skip"]) == [
        "skip-dit/ucf101-skip",
        "skip-dit/dit-xl-2-skip",
    ]
    assert ids(system="sam-pt") == [
        "sam-pt/samhq/sam_hq_vit_h.pth",
        "sam-pt/cotracker/cotracker_stride_4_wind_8.pth",
    ]
    assert len(ids(system="SAM-PT", set_name="complete")) == 25
    assert len(ids(system="datasets")) == 4
    assert len(ids(system="NExT-GPT")) == 5
    assert len(ids(set_name="complete")) == 5
    assert len(ids(set_name="class-to-image")) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ids": ["skip-dit/ucf101-skp"]}, "did you mean 'skip-dit/ucf101-skip'"),
        ({"system": "SAMPT"}, "did you mean 'SAM-PT'"),
        ({"set_name": "minimum"}, "did you mean 'minimal'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(catalogue, arguments, message):
    with pytest.raises(UserError, match=message):
        catalogue.select(**arguments)


# -- the schema ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shaa256": "0" * 64}, "entry mine/model: unknown field 'shaa256': did you mean 'sha256'"),
        ({"function": None}, "the field 'function' is missing"),
        ({"sha256": "XYZ"}, "sha256 is 64 lower-case hex digits"),
        ({"md5": 12}, "str is needed, not 12"),
        ({"path": "../up.pt"}, "must stay below the root"),
        ({"path": "/etc/up.pt"}, "must stay below the root"),
        ({"path": "folder/"}, "path must be that file"),
        ({"sets": []}, "sets is empty"),
        ({"sets": "complete"}, "a list is needed"),
        ({"size": "big"}, "is no size"),
        ({"source": {"kind": "torrent"}}, "unknown kind 'torrent'"),
        ({"source": {"kind": "url", "url": "ftp://x/y"}}, "http or https"),
        (
            {"source": {"kind": "url", "url": "https://huggingface.co/a/b/blob/main/x.pt"}},
            "a /blob/ link of the hub is a web page",
        ),
        ({"source": {"kind": "hf_hub", "repo": "a/b"}}, "path must end in '/'"),
        ({"source": {"kind": "hf_hub", "repo": "just-a-name", "file": "x"}}, "owner/name"),
        ({"id": "skip-dit/vae"}, "already used in"),
        ({"id": "no spaces"}, "an id is words"),
    ],
)
def test_a_mistake_in_a_registry_file_is_named(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        load_catalogue([write(tmp_path / "mine.yaml", **fields)])
    assert "mine.yaml" in str(caught.value)


def test_an_entry_of_ones_own_is_chosen_alone(tmp_path):
    catalogue = load_catalogue([write(tmp_path / "mine.yaml")])
    assert [entry.id for entry in catalogue.select()] == ["mine/model"]
    assert [entry.id for entry in catalogue.select(["skip-dit/vae"])] == ["skip-dit/vae"]


@pytest.mark.parametrize("text", ["not: [closed", "just words", "system: X"])
def test_a_file_that_is_no_registry_is_told(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml is no"):
        load_catalogue([tmp_path / "mine.yaml"])


def test_dropbox_links_get_dl_1_and_keep_their_key(by_id):
    link = Resolver.link(by_id["sam-pt/pips_plus_plus/reference_model/model-000200000.pth"].source.archive)
    assert link.endswith("/reference_model.tar.gz?rlkey=56ebq4g5dk01kyq8kuismev14&dl=1")
    assert Resolver.link(DropboxSource(url="https://www.dropbox.com/s/a/b.pt?dl=0")).endswith("b.pt?dl=1")
    assert Resolver.link(UrlSource(url="https://x.invalid/b.pt?dl=0")) == "https://x.invalid/b.pt?dl=0"


# -- sizes and the tree ----------------------------------------------------------------------------


def test_sizes():
    assert parse_size("2.77G", "si") == 2_770_000_000
    assert parse_size("2.4G") == round(2.4 * 2**30)
    assert parse_size("~107G+", "si") == 107_000_000_000
    assert parse_size("big") is None
    assert [short_size(size) for size in (512, 92 << 20, round(9.97 * 2**30), 1000 << 20)] == [
        "512",
        "92M",
        "10G",
        "1000M",
    ]
    assert words(2_771_053_040) == "2.77 GB"


def test_the_tree_of_the_minimal_set_is_the_guides(catalogue):
    """But for the folder reference_model, which the guide's own list of hashes contradicts."""
    system = next(system for system in catalogue.systems if system.system == "SAM-PT")
    assert tree_lines(system, catalogue.select(system="SAM-PT"))[1:-1] == [
        "[2.5G]  models",
        "├── [ 92M]  cotracker_ckpts",
        "│   └── [ 92M]  cotracker_stride_4_wind_8.pth",
        "└── [2.4G]  samhq_ckpts",
        "    └── [2.4G]  sam_hq_vit_h.pth",
    ]


def test_the_complete_tree_has_the_guides_folder_sizes(catalogue):
    system = next(system for system in catalogue.systems if system.system == "SAM-PT")
    lines = tree_lines(system, list(system.entries))
    for line in ("[ 84M]  raft_ckpts", "[3.9G]  sam_ckpts", "[4.0G]  samhq_ckpts", "[ 97M]  superglue_ckpts"):
        assert f"├── {line}" in lines
    assert lines[-1] == "# the guide says: minimal 2.5G, complete 9.3G"


# -- what is on disk -------------------------------------------------------------------------------


def entry_of(tmp_path: Path, **fields):
    return load_catalogue([write(tmp_path / "mine.yaml", **fields)]).select()[0]


def test_a_file_is_missing_there_or_damaged(tmp_path):
    body = b"weights"
    entry = entry_of(tmp_path, bytes=7, sha256=hashlib.sha256(body).hexdigest())
    records, path = Records(tmp_path), tmp_path / "pretrained" / "model.pt"

    def state(level: str = "size") -> str:
        return check(entry, tmp_path, records, level).name

    assert state() == "missing"
    path.parent.mkdir()
    path.write_bytes(body)
    assert (state(), state("hash")) == ("there", "there")
    path.write_bytes(b"weightz")
    assert (state(), state("hash")) == ("there", "damaged")
    path.write_bytes(b"weight")
    assert state() == "damaged"


@pytest.mark.parametrize("body", [b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_page_a_pointer_or_nothing_is_damage(tmp_path, body):
    entry = entry_of(tmp_path)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "model.pt").write_bytes(body)
    assert check(entry, tmp_path, Records(tmp_path)).name == "damaged"


def test_a_recorded_hash_is_the_measure_of_an_entry_without_one(tmp_path):
    entry, records = entry_of(tmp_path), Records(tmp_path)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "model.pt").write_bytes(b"other")
    assert check(entry, tmp_path, records, "hash").detail == "no hash is known: not checked"
    first = FileRecord("pretrained/model.pt", 5, hashlib.sha256(b"first").hexdigest())
    records.put(Record("mine/model", "url", files=(first,)))
    assert records.get("mine/model").files == (first,)
    assert check(entry, tmp_path, records).name == "there"
    assert check(entry, tmp_path, records, "hash").name == "damaged"


def test_a_sharded_folder_is_whole_with_every_shard(tmp_path):
    source = {"kind": "hf_hub", "repo": "a/b", "files": ["model.index.json"]}
    entry, folder = entry_of(tmp_path, path="ckpt/", source=source), tmp_path / "ckpt"
    folder.mkdir()
    weight_map = {"a": "m-1-of-2.bin", "b": "m-2-of-2.bin"}
    (folder / "model.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "m-1-of-2.bin").write_bytes(b"1")
    state = check(entry, tmp_path, Records(tmp_path))
    assert (state.name, state.detail) == ("missing", "m-2-of-2.bin is not there")
    (folder / "m-2-of-2.bin").write_bytes(b"2")
    assert check(entry, tmp_path, Records(tmp_path)).name == "there"


def test_the_layout_of_an_unpacked_data_set_is_checked(tmp_path, by_id):
    entry, folder = by_id["data/ucf101"], tmp_path / "data" / "ucf101"
    folder.mkdir(parents=True)
    (folder / "UCF101.rar").write_bytes(b"Rar!")
    state = check(entry, tmp_path, Records(tmp_path))
    assert state.name == "damaged"
    assert state.detail.endswith("at least 13320 were expected (fetched, but still packed)")
    (folder / "Archery").mkdir()
    for number in range(13320):
        os.link(folder / "UCF101.rar", folder / "Archery" / f"v_Archery_g01_c{number}.avi")
    assert check(entry, tmp_path, Records(tmp_path)).name == "there"


# -- the command -----------------------------------------------------------------------------------


def test_list_shows_all_entries_and_fetches_nothing(tmp_path, capsys):
    assert main(["download", "--list", "--root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 83 + 2
    assert lines[-1] == "0 there, 83 missing, 0 damaged"
    assert list(tmp_path.iterdir()) == []


def test_list_as_json(tmp_path, capsys):
    assert main(["download", "--list", "--json", "--root", str(tmp_path), "skip-dit/vae"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["id"], row["state"], row["path"]) == ("skip-dit/vae", "missing", "pretrained/Latte/vae/")


def test_usage_mistakes_end_in_status_2(tmp_path, capsys):
    assert main(["download", "--root", str(tmp_path), "nothing-like-it"]) == 2
    assert "No entry 'nothing-like-it'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["download", "--verify", "skip-dit/vae"])
    assert caught.value.code == 2


def test_manual_entries_say_what_to_do_and_end_in_status_6(tmp_path, capsys):
    assert main(["download", "--root", str(tmp_path), "next-gpt/vicuna"]) == 6
    assert "prepare_vicuna.md" in capsys.readouterr().err


def test_offline_with_something_missing_ends_in_status_5(tmp_path, capsys, monkeypatch):
    assert main(["download", "--offline", "--root", str(tmp_path)]) == 5
    assert "skip-dit/ucf101-skip is missing" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["download", "--root", str(tmp_path)]) == 5
