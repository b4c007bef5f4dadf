"""Archives from strangers: whatever was done to one, it is taken out as it was packed, or refused, and nothing else is
written."""

import copy
import hashlib
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

import stoker
from stoker.sharing.archive import pack, unpack
from tests.archive.making import Member, entry, manifest_of, members, put_together, trained, with_manifest, write_recipe


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampering")
    return pack(trained(write_recipe(folder / "src"), folder / "run", epochs=1)).path


@pytest.fixture(scope="module")
def content(archive: Path) -> list[Member]:
    return members(archive)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(path: Path) -> stoker.UserError:
    """The refusal to take it out; nothing is left anywhere."""
    around = path.parent
    before = tree(around)
    with pytest.raises(stoker.UserError) as caught:
        unpack(path, around / "in" / "out")
    assert tree(around) == before
    assert [p for p in (around / "in").glob("*")] == []
    return caught.value


def test_untouched(archive: Path, content: list[Member], tmp_path: Path) -> None:
    expected = {info.filename: data for info, data in content if info.filename != "manifest.json"}
    for path in (archive, put_together(tmp_path / "again.zip", with_manifest(content, manifest_of(content)))):
        folder = unpack(path, tmp_path / path.stem)
        found = tree(folder)
        assert {
            name: data for name, data in found.items() if not name.startswith(("checkpoints/l", "checkpoints/b"))
        } == expected


def test_a_flipped_byte_in_each_member(archive: Path, content: list[Member], tmp_path: Path) -> None:
    whole = archive.read_bytes()
    for info, data in content:
        begin = info.header_offset + 30 + len(info.filename.encode())
        assert whole[begin : begin + len(data)] == data
        changed = bytearray(whole)
        changed[begin + len(data) // 2] ^= 0x10
        path = tmp_path / "x.zip"
        path.write_bytes(changed)
        refusal(path)


def test_a_flipped_byte_with_its_crc_put_right(content: list[Member], tmp_path: Path) -> None:
    for at, (info, data) in enumerate(content):
        if info.filename != "manifest.json" and data:
            changed = bytearray(data)
            changed[len(data) // 2] ^= 0x10
            entries = [(i, bytes(changed) if n == at else d) for n, (i, d) in enumerate(content)]
            error = refusal(put_together(tmp_path / "x.zip", entries))
            assert "checksum" in error.why and info.filename in error.why


NAMES = [
    "../evil",
    "../../evil",
    "source/../../evil",
    "/tmp/evil-of-stoker",
    "C:/evil",
    "..\\evil",
    "source\\..\\..\\evil",
    ".lock",
    "source/.hidden.py",
    "source//x.py",
    "./run.json",
    "source/",
    "a\nb",
    "source/\u202eyp.exe",
    "extra.txt",
    "source/extra.py",
    "checkpoints/latest",
    "checkpoints/step-00000001-epoch-1/model.safetensors",
    "run.json/x",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("listed", [False, True])
def test_names_that_are_not_the_runs(content: list[Member], tmp_path: Path, name: str, listed: bool) -> None:
    manifest = manifest_of(content)
    if listed:
        manifest["files"][name] = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    entries = [*with_manifest(content, manifest), (entry(name), b"evil")]
    assert refusal(put_together(tmp_path / "x.zip", entries)).remedy
    assert not Path("/tmp/evil-of-stoker").exists()


@pytest.mark.parametrize("mode", [0o120777, 0o040755, 0o010644, 0o020644], ids=["link", "folder", "pipe", "device"])
def test_members_that_are_not_files(content: list[Member], tmp_path: Path, mode: int) -> None:
    """A link under a listed name, and with the listed content."""
    entries = [(entry(i.filename, mode) if i.filename == "recipe.py" else i, d) for i, d in content]
    assert "not a plain file" in refusal(put_together(tmp_path / "x.zip", entries)).why
    target = b"/etc/passwd"
    manifest = manifest_of(content)
    manifest["files"]["recipe.py"] = {"bytes": len(target), "sha256": hashlib.sha256(target).hexdigest()}
    entries = with_manifest(content, manifest)
    entries = [(entry(i.filename, mode), target) if i.filename == "recipe.py" else (i, d) for i, d in entries]
    refusal(put_together(tmp_path / "x.zip", entries))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_missing_and_empty(content: list[Member], tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    assert "twice" in refusal(put_together(path, [*content, content[0]])).why
    for at in range(len(content)):
        refusal(put_together(path, content[:at] + content[at + 1 :]))
    refusal(put_together(path, []))
    for at, (info, _) in enumerate(content):
        manifest = manifest_of(content)
        if info.filename != "manifest.json":  # gone from both
            del manifest["files"][info.filename]
            refusal(put_together(path, with_manifest(content[:at] + content[at + 1 :], manifest)))


def test_compressed_members_are_refused(content: list[Member], tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for info, data in content:
            bomb.writestr(info.filename, data)
    assert "compressed" in refusal(path).why
    manifest = manifest_of(content)
    manifest["files"]["events.jsonl"]["bytes"] = 1 << 26
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for info, data in with_manifest(content, manifest):
            bomb.writestr(info.filename, bytes(1 << 26) if info.filename == "events.jsonl" else data)
    assert "compressed" in refusal(path).why


@pytest.mark.parametrize("claimed", [0, 1, 1 << 31, (1 << 32) - 2])
def test_sizes_that_are_not_so(archive: Path, content: list[Member], tmp_path: Path, claimed: int) -> None:
    """In the zip's own directory, of the events: compressed and uncompressed alike."""
    data = bytearray(archive.read_bytes())
    at = data.rindex(b"events.jsonl", 0, data.rindex(b"PK\x05\x06")) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 20 : at + 28] = struct.pack("<II", claimed, claimed)
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    refusal(path)
    manifest = manifest_of(content)
    manifest["files"]["events.jsonl"]["bytes"] = claimed
    refusal(put_together(path, with_manifest(content, manifest)))


def test_overlapping_members_are_refused(archive: Path, tmp_path: Path) -> None:
    """Many names in the directory for the same bytes: a bomb without compression."""
    data = archive.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    size, offset = struct.unpack("<II", data[end + 12 : end + 20])
    directory = data[offset : offset + size]
    at = directory.index(b"state.safetensors")
    begin = directory.rindex(b"PK\x01\x02", 0, at)
    one = directory[begin : directory.find(b"PK\x01\x02", at)]
    many = b"".join(one.replace(b"state.safe", b"sta%02d.safe" % i) for i in range(40))
    count = struct.unpack("<H", data[end + 10 : end + 12])[0] + 40
    tail = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, size + len(many), offset, 0)
    (tmp_path / "x.zip").write_bytes(data[:offset] + directory + many + tail)
    refusal(tmp_path / "x.zip")


def test_what_is_no_zip(archive: Path, tmp_path: Path) -> None:
    data, path = archive.read_bytes(), tmp_path / "x.zip"
    nested = put_together(tmp_path / "nested.zip", [(entry("a.zip"), data)])
    refusal(nested)
    for text in (b"", b"PK", b"hello" * 100, data[: len(data) // 2], data[:-1], data[:-30], data[1000:], data[-22:]):
        path.write_bytes(text)
        refusal(path)
    for other in (tmp_path, tmp_path / "none.zip"):
        with pytest.raises(stoker.UserError, match=r"not a file|no file"):
            unpack(other, tmp_path / "out")


MANIFESTS: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    None,
    [],
    {},
    {"format": 2, "files": {}, "links": {}},
    {"format": 1, "files": [], "links": {}},
    {"format": 1, "files": {"run.json": 3}, "links": {"latest": None, "best": None}},
]
CHANGES: list[tuple[list[str], Any]] = [
    (["links"], None),
    (["links", "latest"], "../../.."),
    (["links", "latest"], "latest"),
    (["links", "latest"], 7),
    (["links", "latest"], None),
    (["links", "other"], None),
    (["links", "best"], ["x"]),
    (["files", "run.json"], None),
    (["files", "run.json", "bytes"], "many"),
    (["files", "run.json", "bytes"], -1),
    (["files", "run.json", "bytes"], 1e400),
    (["files", "run.json", "sha256"], None),
    (["files", "run.json", "sha256"], "00"),
    (["format"], "1"),
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: str(m)[:20])
def test_manifests_that_are_none(content: list[Member], tmp_path: Path, manifest: Any) -> None:
    refusal(put_together(tmp_path / "x.zip", with_manifest(content, manifest)))


def changed(manifest: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(manifest)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=str)
def test_manifests_that_were_altered(content: list[Member], tmp_path: Path, path: list[str], value: Any) -> None:
    refusal(put_together(tmp_path / "x.zip", with_manifest(content, changed(manifest_of(content), path, value))))


RUNS: list[tuple[list[str], Any]] = [
    (["recipe"], []),
    (["recipe", "function"], None),
    (["recipe", "function"], 5),
    (["recipe", "arguments"], [1]),
    (["recipe", "file"], 7),
    (["seed"], "x"),
    (["options"], None),
    (["limits", "epochs"], "many"),
    (["limits", "epochs"], 50),
    (["limits", "evil"], 1),
    (["modules"], ["../../x.py"]),
    (["modules"], 3),
    (["modules"], []),
    (["plan"], None),
]


@pytest.mark.parametrize(("path", "value"), RUNS, ids=str)
def test_a_run_that_was_altered_with_its_manifest(
    content: list[Member], tmp_path: Path, path: list[str], value: Any
) -> None:
    """Checksums that are right, of content that is not a run's."""
    recorded = next(json.loads(data) for info, data in content if info.filename == "run.json")
    text = json.dumps(changed(recorded, path, value)).encode()
    manifest = manifest_of(content)
    manifest["files"]["run.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    entries = [(i, text if i.filename == "run.json" else d) for i, d in with_manifest(content, manifest)]
    refusal(put_together(tmp_path / "x.zip", entries))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few random bytes changed, cut out, put in, or copied; half of the time near the directory at the end."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(result)) if draw.random() < 0.5 else len(result) - 1 - draw.randrange(1200)
        length = draw.choice((1, 2, 4, 30))
        kind = draw.randrange(5)
        if kind == 0:
            result[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            result[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = draw.choice((b"\x00", b"\xff")) * length
        else:
            other = draw.randrange(len(result))
            result[at : at + length] = result[other : other + length]
    return bytes(result)


def test_two_hundred_mutations(archive: Path, content: list[Member], tmp_path: Path) -> None:
    draw, data, path = random.Random(7), archive.read_bytes(), tmp_path / "box" / "x.zip"
    path.parent.mkdir()
    expected = {info.filename: text for info, text in content if info.filename != "manifest.json"}
    whole = 0
    for number in range(200):
        path.write_bytes(mutated(data, draw))
        out = tmp_path / "box" / f"out-{number}"
        try:
            found = tree(unpack(path, out))
        except stoker.UserError as error:
            assert str(path) in error.what
            assert not out.exists()
        else:  # it hit what carries nothing: a date, the system's name
            whole += 1
            assert expected.items() <= found.items()
    assert whole < 100
    assert {p.name.split("-")[0] for p in (tmp_path / "box").iterdir()} <= {"x.zip", "out"}
    assert [p.name for p in tmp_path.iterdir()] == ["box"]
