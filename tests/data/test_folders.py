"""Image folders: what is found, how it is decoded, and what is said of folders and files that are not sound."""

import copy
import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from stoker.data.folders import Images, Paths, decoded, images
from stoker.data.splitting import split
from stoker.errors import UserError

RAW = v2.Identity()


def photo(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A smooth picture, brighter to the right and to the bottom."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def coded(image: Image.Image, kind: str, **options: Any) -> Any:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8).copy()


@pytest.fixture
def flowers(tmp_path: Path, shared_data: Path) -> Path:
    """Three real photos of each of two classes, one of them in a folder within."""
    root = tmp_path / "flowers"
    for name in ("daisy", "tulips"):
        (root / name / "more").mkdir(parents=True)
        for i, file in enumerate(sorted((shared_data / "flowers700/train" / name).iterdir())[:3]):
            shutil.copy(file, root / name / ("more/b.jpeg" if i == 2 else f"{'ac'[i]}.JPG"))
    return root


def paths(data: Images) -> list[str]:
    return [os.path.relpath(data.file_of(i), data.root) for i in range(len(data))]


def refused(call: Callable[[], Any], *parts: str) -> UserError:
    """Return the UserError that a call raises, all of whose parts are in its message."""
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    return caught.value


# ------------------------------------------------------------------ what is found


def test_the_real_photos_agree_with_torchvisions_own_folder(shared_data: Path) -> None:
    root = shared_data / "flowers700/val"
    ours, theirs = images(root, RAW), ImageFolder(str(root))
    assert ours.classes == theirs.classes
    assert list(ours.samples) == theirs.samples
    assert ours.targets.tolist() == theirs.targets
    for i in (0, 57, 199):
        image, label = ours[i]
        assert type(image) is torch.Tensor
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(theirs[i][0]))
        assert (label, type(label)) == (theirs[i][1], int)


def test_order_labels_and_suffixes(flowers: Path) -> None:
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db", "jpg"):
        (flowers / "daisy" / name).write_text("x")
    (flowers / ".ipynb_checkpoints").mkdir()
    (flowers / "readme.md").write_text("x")
    data = images(flowers, RAW)
    expected = ["daisy/a.JPG", "daisy/c.JPG", "daisy/more/b.jpeg", "tulips/a.JPG", "tulips/c.JPG", "tulips/more/b.jpeg"]
    assert paths(data) == expected
    assert data.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.targets.dtype == np.int64
    assert data.samples[1:3] == [(str(flowers / path), 0) for path in expected[1:3]]
    assert "6 images, 2 classes" in repr(data)


def test_the_labels_of_val_are_those_of_train(flowers: Path, tmp_path: Path) -> None:
    train = images(flowers)
    val = tmp_path / "val"
    shutil.copytree(flowers / "tulips", val / "tulips")
    assert images(val, classes=train.classes).targets.tolist() == [1, 1, 1]
    (val / "daisy").mkdir()
    assert images(val, classes=train.classes).targets.tolist() == [1, 1, 1]
    assert images(flowers, classes=["tulips", "daisy"]).targets.tolist() == [1, 1, 1, 0, 0, 0]
    assert images(flowers, classes=["tulips", "rose", "daisy"]).classes == ["tulips", "rose", "daisy"]


def test_names_of_any_script_and_bytes(tmp_path: Path) -> None:
    for folder in ("Gänseblümchen", "百合 花", "a'b\"c\n"):
        (tmp_path / folder).mkdir()
        photo().save(tmp_path / folder / "ß €.png")
    with open(os.fsencode(tmp_path / "百合 花") + b"/\xff\xfe.png", "wb") as file:
        photo().save(file, "PNG")
    data = images(tmp_path, size=8)
    assert data.classes == sorted(["Gänseblümchen", "百合 花", "a'b\"c\n"])
    assert len(data) == 4
    assert all(data[i][0].shape == (3, 8, 8) for i in range(4))


def test_links_are_followed_once_and_not_in_circles(flowers: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(str(flowers / "tulips"), str(elsewhere))
    (flowers / "tulips").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "more" / "up").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "again").symlink_to(elsewhere / "more", target_is_directory=True)
    (elsewhere / "z.jpg").symlink_to(elsewhere / "a.JPG")
    assert len(images(flowers)) == 7
    (elsewhere / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    refused(lambda: images(flowers), "lost.jpg is a link to", "nowhere.jpg", "mend the link")
    (elsewhere / "lost.jpg").unlink()
    (elsewhere / "self").symlink_to(elsewhere / "self")
    refused(lambda: images(flowers), "self is a link to")


def test_a_million_paths_are_a_handful_of_objects() -> None:
    names = [b"class/%07d.jpg" % i for i in range(10_000)]
    kept = Paths(names)
    assert len(kept) == 10_000
    assert kept[0] == "class/0000000.jpg"
    assert kept[9_999] == "class/0009999.jpg"
    assert all(isinstance(value, bytes | np.ndarray) for value in vars(kept).values())
    data = Images("r", kept, np.zeros(10_000, np.int32), ["class"], RAW)
    assert all(isinstance(v, str | Paths | np.ndarray | list | torch.nn.Module) for v in vars(data).values())
    assert sum(sys.getsizeof(v) for v in vars(kept).values()) < 26 * 10_000


def test_subsets_and_splits(flowers: Path) -> None:
    data = images(flowers, size=16)
    part = data.subset(np.array([4, 0]))
    assert paths(part) == ["tulips/c.JPG", "daisy/a.JPG"]
    assert part.targets.tolist() == [1, 0]
    assert torch.equal(part[0][0], data[4][0])
    assert paths(part.subset(np.array([1]))) == ["daisy/a.JPG"]
    train, val = split(data, 2, stratify=True)
    assert type(train) is type(val) is Images
    assert val.targets.tolist() == [0, 1]
    assert sorted(paths(train) + paths(val)) == paths(data)
    with pytest.raises(IndexError):
        data[6]
    assert [label for _, label in data] == [0, 0, 0, 1, 1, 1]


def test_it_travels_to_a_worker(flowers: Path) -> None:
    data = images(flowers, size=16)
    assert torch.equal(pickle.loads(pickle.dumps(data))[5][0], data[5][0])


# ------------------------------------------------------------------ how it is decoded


def test_the_default_is_a_cropped_square_between_0_and_1(flowers: Path) -> None:
    (flowers / "daisy" / "wide.png").unlink(missing_ok=True)
    photo(400, 100).save(flowers / "daisy" / "wide.png")
    data = images(flowers, size=64)
    image, _ = data[paths(data).index("daisy/wide.png")]
    assert type(image) is torch.Tensor
    assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
    assert 0 <= image.min() < image.max() <= 1
    assert 0.4 < image[0].mean() < 0.6  # the middle, where red is half
    assert image[0].std() < 0.1
    assert images(flowers)[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photos_are_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = coded(photo(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decoded(data).permute(1, 2, 0).numpy(), expected)
    assert decoded(data).shape == ((3, 30, 40) if orientation < 5 else (3, 40, 30))


KINDS = [
    ("JPEG", "RGB", 12),
    ("JPEG", "L", 12),
    ("JPEG", "CMYK", 12),
    ("PNG", "RGB", 0),
    ("PNG", "L", 0),
    ("PNG", "LA", 0),
    ("PNG", "P", 60),
    ("PNG", "1", 255),
    ("PNG", "RGBA", 0),
    ("BMP", "RGB", 0),
    ("GIF", "P", 60),
    ("WEBP", "RGB", 40),
    ("TIFF", "CMYK", 1),
    ("TIFF", "RGB", 0),
    ("PPM", "RGB", 0),
]


@pytest.mark.parametrize(("kind", "mode", "within"), KINDS)
def test_every_kind_of_image_becomes_rgb(kind: str, mode: str, within: int) -> None:
    image = decoded(coded(photo(mode=mode), kind))
    assert type(image) is torch.Tensor
    assert (image.shape, image.dtype) == ((3, 30, 40), torch.uint8)
    grey = mode in ("L", "LA", "1")
    expected = np.asarray(photo(mode="L").convert("RGB") if grey else photo())
    assert abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= within


def test_16_bits_keep_their_upper_8() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF", "PPM"):
        image = decoded(coded(Image.fromarray(values), kind))
        assert np.array_equal(image[0].numpy(), values >> 8)
        assert np.array_equal(image[2].numpy(), values >> 8)


def test_a_palette_with_transparency_and_an_animation() -> None:
    palette = photo(mode="P")
    assert decoded(coded(palette, "PNG", transparency=bytes(range(256)))).shape == (3, 30, 40)
    frames = coded(palette, "GIF", save_all=True, append_images=[photo(40, 30, "L")])
    assert decoded(frames).shape == (3, 30, 40)


def test_a_transform_is_given_a_uint8_image_and_may_be_replaced(flowers: Path) -> None:
    seen: list[Any] = []
    data = images(flowers, lambda image: seen.append(image) or 7)
    assert data[0] == (7, 0)
    assert type(seen[0]) is torch.Tensor
    assert seen[0].dtype == torch.uint8
    other = copy.copy(data)
    other.transform = v2.Compose([v2.Resize(10), v2.RandomCrop(8), v2.ToDtype(torch.float32, scale=True)])
    assert other[0][0].shape == (3, 8, 8)
    assert other.subset(np.arange(2)).transform is other.transform
    assert data[1] == (7, 0)


# ------------------------------------------------------------------ folders that are not sound


def test_no_such_folder(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: images(flowers.parent / "flower"), "there is no folder", "did you mean flowers?", "remedy")
    refused(lambda: images(flowers / "x" / "y"), f"nor is there {flowers / 'x'}")
    monkeypatch.chdir(flowers)
    refused(lambda: images("train"), "there is no folder train", f"looked in {flowers}")
    refused(lambda: images(flowers / "daisy/a.JPG"), "a.JPG is a file", "unpack")


def test_no_class_folders(flowers: Path, tmp_path: Path) -> None:
    refused(lambda: images(flowers / "daisy" / "more"), "1 images lie directly in it", "one folder a class")
    (tmp_path / "empty").mkdir()
    error = refused(lambda: images(tmp_path / "empty"), "has no class folders")
    assert "directly" not in str(error)
    refused(lambda: images(tmp_path / "empty", classes=["a", "b"]), "expected folders named a, b")


def test_one_class_or_one_without_images(flowers: Path) -> None:
    (flowers / "roses").mkdir()
    (flowers / "roses" / "a.heic").write_text("x")
    refused(lambda: images(flowers), "class folder", "roses has no images", ".jpeg", "delete it")
    for name in ("roses", "tulips"):
        shutil.rmtree(flowers / name)
    refused(lambda: images(flowers), "one class folder, 'daisy'", "nothing to tell apart", "classes=train.classes")
    for file in flowers.rglob("*.*"):
        file.unlink()
    refused(lambda: images(flowers, classes=["daisy", "tulips"]), "has no images")


def test_splits_are_not_classes(tmp_path: Path, flowers: Path) -> None:
    for name in ("train", "val"):
        shutil.copytree(flowers, tmp_path / "all" / name)
    refused(lambda: images(tmp_path / "all"), "are splits, not classes: train, val", f'images("{tmp_path}/all/train")')


def test_classes_that_do_not_fit(flowers: Path) -> None:
    refused(lambda: images(flowers, classes=["daisy", "tulip"]), "1 folder that", "'tulips' (did you mean tulip?)")
    refused(lambda: images(flowers, classes=["rose"]), "2 folders", "'daisy'", "'tulips'", "add the class to the train")
    refused(lambda: images(flowers, classes=["daisy", "tulips", "daisy"]), "names 'daisy' twice")
    for wrong in ("daisy", [], [0, 1]):
        refused(lambda wrong=wrong: images(flowers, classes=wrong), "expected the names", "classes=train.classes")


def test_arguments_that_contradict(flowers: Path) -> None:
    refused(lambda: images(flowers, RAW, size=64), "transform= and size=", "v2.Resize")
    for wrong in (0, -1, 2.5, True, "224"):
        refused(lambda wrong=wrong: images(flowers, size=wrong), f"size= is {wrong!r}", "pixels")
    refused(lambda: images(flowers, "resize"), "'resize', which is not a function")


# ------------------------------------------------------------------ files that are not sound


def broken(flowers: Path, content: bytes | None, name: str = "c.JPG") -> tuple[Images, Path]:
    file = flowers / "tulips" / name
    if content is not None:
        file.write_bytes(content)
    return images(flowers), file


def test_an_empty_file(flowers: Path) -> None:
    data, file = broken(flowers, b"")
    refused(lambda: data[4], f"{file} (sample 4) is empty (0 bytes)", "expected an image: jpg,", "remedy")
    assert data[3][1] == data[5][1] == 1


@pytest.mark.parametrize("kept", [0.02, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["real", "progressive", "png"])
def test_a_file_cut_short_is_refused(flowers: Path, kept: float, kind: str) -> None:
    content = (flowers / "tulips" / "c.JPG").read_bytes()
    if kind != "real":
        options: dict[str, Any] = {"format": "PNG"} if kind == "png" else {"format": "JPEG", "progressive": True}
        out = io.BytesIO()
        Image.open(io.BytesIO(content)).save(out, **options)
        content = out.getvalue()
    data, file = broken(flowers, content[: int(len(content) * kept)])
    refused(lambda: data[4], f"{file} (sample 4) ", "bytes)", "copy it again")


def test_a_file_cut_short_by_two_bytes(flowers: Path) -> None:
    data, _ = broken(flowers, (flowers / "tulips" / "c.JPG").read_bytes()[:-2])
    refused(lambda: data[4], "is broken", "truncated")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"hello, this is a text\n", "begins with b'hello, this '"),
        (b"<!DOCTYPE html><html>404", "begins with b'<!DOCTYPE ht'"),
        (b"\xff\xd8\xff" + b"\0" * 500, "(sample 4) "),
        (b"\0", "begins with"),
    ],
)
def test_what_is_no_image(flowers: Path, content: bytes, found: str) -> None:
    data, file = broken(flowers, content)
    refused(lambda: data[4], str(file), found, "expected an image")


def test_an_image_of_another_kind_than_its_name_says_is_read(flowers: Path) -> None:
    data, _ = broken(flowers, coded(photo(), "PNG").tobytes())
    assert data[4][0].shape == (3, 224, 224)


def test_pixels_of_unknown_range(flowers: Path) -> None:
    data, _ = broken(flowers, coded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF").tobytes(), "d.tif")
    refused(lambda: data[5], "d.tif (sample 5) has pixels of mode F", "8 or 16 bits")


def test_a_file_that_may_not_be_read_or_is_gone(flowers: Path) -> None:
    data, file = broken(flowers, None)
    file.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        refused(lambda: data[4], f"{file} (sample 4) cannot be read: Permission denied", "permissions")
    finally:
        os.seteuid(user)
    file.unlink()
    refused(lambda: data[4], "cannot be read: No such file")


def test_a_transform_that_raises_keeps_its_exception(flowers: Path) -> None:
    def fails(image: Any) -> Any:
        raise KeyError("colour")

    data = images(flowers, fails)
    with pytest.raises(KeyError, match="colour") as caught:
        data[4]
    assert caught.value.__notes__[0].startswith(f"in the transform of {flowers}/tulips/c.JPG (sample 4), ")
    wants_pil = images(flowers, transforms.ToTensor())
    with pytest.raises(TypeError) as error:
        wants_pil[0]
    assert "uint8 tensor [3, " in error.value.__notes__[0]
    assert "v2.ToPILImage() before it" in error.value.__notes__[0]
    wants_pil.transform = v2.Compose([v2.ToPILImage(), transforms.ToTensor()])
    assert torch.equal(wants_pil[0][0], decoded(np.fromfile(wants_pil.file_of(0), np.uint8)) / 255)
