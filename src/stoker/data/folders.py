"""Image folders: ROOT/CLASS/**/*.jpg, one folder a class.

JPEGs are decoded by torchvision into uint8 tensors, on which v2 transforms are fastest (measured on one core, 227 px
photos, decode + Resize + RandomResizedCrop + flip + ToDtype: 0.8 ms a photo, against 1.6 ms with PIL images
throughout and 1.0 ms with PIL decoding; the pixels are the same; `tv_tensors.Image` adds 3 %). PIL reads what is no
JPEG, what is broken, and all where torchvision has no decoder: since 0.29 it warns that it will lose its own.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from stoker.data.order import Indices
from stoker.errors import UserError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_JPEG = b"\xff\xd8\xff"
_RGB = 3  # torchvision.io.ImageReadMode.RGB


def images(
    root: str | os.PathLike[str],
    transform: Callable[[Any], Any] | None = None,
    *,
    size: int | None = None,
    classes: Sequence[str] | None = None,
) -> "Images":
    """Open a folder of images with one folder a class, whose name is the class.

    Only names are read here: a file that is empty or broken is told of when it is read. Hidden files and folders,
    files of other kinds, and files beside the class folders are passed over; links to folders are followed.

    Args:
        root: the folder of class folders; images may lie in folders within them.
        transform: any torchvision v2 transform or function of one image: a uint8 tensor [3, H, W] in RGB, upright (v2
            takes a tensor for an image; `v2.ToPILImage()` goes before functions that want PIL's). Default: shorter
            side resized to `size`, centre cropped: float32 [3, size, size] in [0, 1].
        size: of the default's result, in pixels; 224 where not given.
        classes: names in the order of the labels, the train set's for a val set (`classes=train.classes`), which then
            need not have all of them. Default: the folders' names, sorted.

    Raises:
        UserError: there is no such folder, it is not laid out so, or it has a class that `classes` has not.
    """
    if transform is not None and not callable(transform):
        raise UserError(f"transform= is {transform!r}, which is not a function of an image")
    if transform is not None and size is not None:
        raise UserError(
            "images got transform= and size=",
            why="size= belongs to the default transform",
            remedy="put v2.Resize(size) into the transform",
        )
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"size= is {size!r}, expected a number of pixels")
    folder = os.fspath(root)
    found = _class_folders(folder)
    if classes is None:
        _check_found(folder, found)
    names = found if classes is None else _checked(classes, found, folder)
    paths, labels = _listed(folder, found, names, may_be_empty=classes is not None)
    return Images(folder, paths, labels, names, transform or _default(size or 224))


class Paths:
    """Many paths in one buffer: a million `str` would be copied page by page into every worker."""

    def __init__(self, names: list[bytes]) -> None:
        self._buffer = b"".join(names)
        self._ends = np.cumsum([0, *(len(name) for name in names)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self._buffer[self._ends[row] : self._ends[row + 1]])


class Images(Dataset[tuple[Any, int]]):
    """Images and their labels, sorted by class, then by path; see `images`.

    `transform` is what is applied last to each image, and may be replaced.
    """

    def __init__(
        self,
        root: str,
        paths: Paths,
        labels: npt.NDArray[np.int32],
        classes: list[str],
        transform: Callable[[Any], Any],
        rows: Indices | None = None,
    ) -> None:
        self.root, self.classes, self.transform = root, classes, transform
        self._paths, self._labels = paths, labels
        self._rows = np.arange(len(paths), dtype=np.int64) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"images({self.root!r}): {len(self)} images, {len(self.classes)} classes"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read a sample: (what the transform made of the image, label)."""
        row = self._rows[index]
        image = self._decoded(index)
        try:
            return self.transform(image), int(self._labels[row])
        except Exception as error:
            error.add_note(
                f"in the transform of {self.file_of(index)} (sample {index}), which was given a uint8 "
                f"tensor {list(image.shape)}"
                + "; v2.ToPILImage() before it makes that a PIL image"
                * ("PIL" in str(error))
            )
            raise

    @property
    def targets(self) -> Indices:
        """Labels [n]."""
        return self._labels[self._rows].astype(np.int64)

    @property
    def samples(self) -> "Samples":
        """(path, label) of every sample, made when looked at."""
        return Samples(self)

    def label_of(self, index: int) -> int:
        """Label of a sample, without reading its file."""
        return int(self._labels[self._rows[index]])

    def file_of(self, index: int) -> str:
        """Path of a sample's file."""
        return os.path.join(self.root, self._paths[self._rows[index]])

    def subset(self, indices: Indices) -> "Images":
        """Return these samples, in this order."""
        rows = self._rows[np.asarray(indices)]
        return Images(self.root, self._paths, self._labels, self.classes, self.transform, rows)

    def _decoded(self, index: int) -> torch.Tensor:
        file = self.file_of(index)
        try:
            return decoded(np.fromfile(file, dtype=np.uint8))
        except OSError as error:
            what = f"{file} (sample {index}) cannot be read: {error.strerror or error}"
            raise UserError(what, remedy="mend the file or its permissions, or delete it") from error
        except _NotAnImage as error:
            raise UserError(
                f"{file} (sample {index}) {error.found}",
                why=f"expected an image: {', '.join(s[1:] for s in SUFFIXES)}",
                remedy=error.remedy,
            ) from error


class Samples(Sequence[tuple[str, int]]):
    """(path, label) of every sample of `Images`."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._images.file_of(index), self._images.label_of(index)


# ---------------------------------------------------------------- decoding


class _NotAnImage(Exception):
    def __init__(
        self,
        found: str,
        remedy: str = 'copy it again from its source, or delete it; Loader(on_error="skip") leaves such files out',
    ) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


def decoded(data: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Decode a file's bytes to uint8 [3, H, W] in RGB, turned upright as its EXIF data says.

    Grey, palette and CMYK images become RGB, transparency is left out, 16 bits are cut to their upper 8.
    """
    decode_jpeg = _jpeg_decoder()
    if not len(data):
        raise _NotAnImage("is empty (0 bytes)")
    if decode_jpeg is not None and data[:3].tobytes() == _JPEG:
        try:
            return decode_jpeg(torch.from_numpy(data), _RGB, True)  # True: as EXIF says
        except RuntimeError:
            pass  # cut short, or of a rare kind: PIL knows
    return torch.from_numpy(_by_pil(data.tobytes())).permute(2, 0, 1)


@cache
def _jpeg_decoder() -> Callable[..., torch.Tensor] | None:
    """Torchvision's operator, where it has one."""
    try:
        import torchvision.io  # noqa: F401  (registers it)
    except ImportError as error:
        raise UserError("images need torchvision", remedy="pip install 'stoker[vision]'") from error
    return getattr(torch.ops.image, "decode_jpeg", None)


def _by_pil(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode to uint8 [H, W, 3]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
                grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)  # convert("RGB") would clip at 255
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise _NotAnImage(
                    f"has pixels of mode {image.mode}, 32 bits of unknown range",
                    "save it with 8 or 16 bits a channel, or read it in a data set of your own",
                )
            return np.array(image.convert("RGB"))
    except _NotAnImage:
        raise
    except UnidentifiedImageError as error:
        raise _NotAnImage(f"begins with {data[:12]!r}, as no image does ({len(data):,} bytes)") from error
    except Exception as error:  # what a broken file makes a decoder raise is of every type
        raise _NotAnImage(f"is broken: {error} ({len(data):,} bytes)") from error


def _default(size: int) -> Callable[[Any], Any]:
    _jpeg_decoder()
    from torchvision.transforms import v2

    steps = [v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(steps)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- folders


def _class_folders(root: str) -> list[str]:
    """Names of the folders in `root`, sorted."""
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except FileNotFoundError:
        parent = Path(root).parent
        names = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
        where = "" if names or parent.is_dir() else f": nor is there {parent}"
        raise UserError(
            f"there is no folder {root}{where}{nearest(Path(root).name, names)}",
            why=f"looked in {Path.cwd()}" if not os.path.isabs(root) else "",
            remedy="give the folder that holds one folder of images a class",
        ) from None
    except NotADirectoryError:
        raise UserError(
            f"{root} is a file", remedy="unpack it, and give the folder that holds one folder of images a class"
        ) from None
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read: {error.strerror}") from error


def _check_found(root: str, found: list[str]) -> None:
    if not found:
        count = sum(name.lower().endswith(SUFFIXES) for name in os.listdir(root))
        raise UserError(
            f"{root} has no class folders" + f": {count} images lie directly in it" * (count > 0),
            why="an image's class is the name of its folder",
            remedy=f"move them to {root}/CLASS/, one folder a class",
        )
    if all(name.lower() in _SPLITS for name in found):
        raise UserError(
            f"the folders in {root} are splits, not classes: {', '.join(found)}",
            remedy="open each: " + ", ".join(f'images("{os.path.join(root, name)}")' for name in found[:2]),
        )
    if len(found) == 1:
        raise UserError(
            f"{root} has one class folder, {found[0]!r}: there is nothing to tell apart",
            remedy="give the folder above the class folders, with two of them or more; a val or test set takes "
            "classes=train.classes",
        )


def _checked(classes: Sequence[str], found: list[str], root: str) -> list[str]:
    names = [classes] if isinstance(classes, str) else list(classes)
    if isinstance(classes, str) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"classes= is {classes!r}, expected the names of the classes", remedy="classes=train.classes")
    if len(set(names)) < len(names):
        double = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"classes= names {double!r} twice")
    unknown = [name for name in found if name not in set(names)]
    if unknown:
        named = ", ".join(f"{name!r}{nearest(name, names)}" for name in unknown[:3])
        raise UserError(
            f"{root} has {len(unknown)} folder{'s' * (len(unknown) > 1)} that classes= does not name: {named}",
            why=f"classes= names {len(names)}: {', '.join(names[:6])}{', ...' * (len(names) > 6)}",
            remedy="rename or move the folder, or add the class to the train set",
        )
    if not found:
        raise UserError(
            f"{root} has no class folders", remedy=f"expected folders named {', '.join(names[:6])}, of images"
        )
    return names


def _listed(
    root: str, found: list[str], classes: list[str], *, may_be_empty: bool
) -> tuple[Paths, npt.NDArray[np.int32]]:
    """Every image's path and label, sorted by class folder, then by path."""
    names: list[bytes] = []
    labels: list[npt.NDArray[np.int32]] = []
    for name in found:
        inside = sorted(_walk(os.path.join(root, name)))
        if not inside and not may_be_empty:
            raise UserError(
                f"the class folder {os.path.join(root, name)} has no images",
                why=f"images end in {' '.join(SUFFIXES)}",
                remedy="put images into it, or delete it",
            )
        names += [os.fsencode(f"{name}/{path}") for path in inside]
        labels.append(np.full(len(inside), classes.index(name), dtype=np.int32))
    if not names:
        raise UserError(f"{root} has no images", why=f"images end in {' '.join(SUFFIXES)}")
    return Paths(names), np.concatenate(labels)


def _walk(folder: str) -> Iterator[str]:
    """Paths of the images in a folder and in those within it, each folder once however many links lead to it."""
    waiting, seen = [(folder, "")], set()
    for path, prefix in waiting:
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as opened:
                entries = sorted((e for e in opened if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise UserError(f"the folder {path} cannot be read: {error.strerror}") from error
        for entry in entries:
            if _is_folder(entry):
                waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink() and not os.path.exists(entry.path):  # a link that leads nowhere, or to itself
        raise UserError(
            f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist",
            remedy="mend the link or delete it",
        )
    return entry.is_dir()
