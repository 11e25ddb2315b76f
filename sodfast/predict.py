"""Pictures to saliency maps: `Predictor` for Python, `predict_files` for folders."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, overload

import numpy as np
import torch
from torch import nn

from .data.grey import read_depth
from .jobs import Failure, Job, describe, find_jobs
from .parallel import chunks, ordered_map, share_threads
from .pictures import Picture, pixels_at_once, read_picture
from .preprocess import check_preprocessing, to_input, to_map
from .pretrained import DEFAULT, from_pretrained
from .render import FORMATS, TYPES, encode, needs_picture, render
from .weights import atomic_write

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Failure", "Job", "Predictor", "find_jobs", "predict_files"]

DepthLike = str | os.PathLike[str] | np.ndarray | None
PictureLike = Union[str, os.PathLike[str], "Image.Image", np.ndarray]

_MOST_THREADS = 1024  # of more, OpenMP's stacks alone can end the process
_READ_AHEAD = 64 << 20  # bytes; larger files are read by the decoder itself


class Predictor:
    """A network ready for pictures.

    >>> predictor = Predictor()                    # the default weights, which ship
    >>> saliency = predictor("photo.jpg")          # (H, W) uint8, the photo's own size
    >>> first, second = predictor(["a.jpg", "b.jpg"])

    weights: a name or a path (see `sodfast.from_pretrained`), or a model from
    `sodfast.create_model` or `sodfast.load` (it is copied, fused, and left as it was). size:
    side of the square that the network sees, or (height, width); None takes what the weights
    were trained for. threads: sets torch's number of CPU threads, for the whole process; None
    leaves it. A list of pictures is shared among them. batch: how many pictures of a list go
    through the network at once; on a CPU 1 is fastest, and the maps are the same. max_pixels:
    see `sodfast.pictures.read_image`. disparity: larger values in files of depth maps are nearer;
    False: they are distances. See `sodfast.data.grey.read_depth`. cuda_graph: where the model is on
    a CUDA device, replay whole batches as one CUDA graph (see `sodfast.cuda_graph`); the maps are
    the same without. Other inputs, as the rest of a list, run kernel by kernel.

    Raises FileNotFoundError or ValueError for weights that cannot be read, and ValueError for
    a size that is no multiple of what the network needs (the nearest sizes are named).
    Calls from several threads at once are allowed.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | nn.Module = DEFAULT,
        size: int | tuple[int, int] | None = None,
        threads: int | None = None,
        batch: int = 1,
        max_pixels: int | None = None,
        disparity: bool = True,
        cuda_graph: bool = True,
    ) -> None:
        from .cuda_graph import GraphedNetwork
        from .fuse import fuse

        for name, value in (("threads", threads), ("batch", batch), ("max_pixels", max_pixels)):
            if value is not None and not _is_count(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if threads is not None and threads > _MOST_THREADS:
            raise ValueError(f"threads must be at most {_MOST_THREADS}, got {threads}")
        model = weights if isinstance(weights, nn.Module) else from_pretrained(weights)
        self.name = str(getattr(model, "name", type(model).__name__))
        if not hasattr(model, "preprocessing"):
            raise ValueError(
                f"weights is a {type(model).__name__} without preprocessing: models of "
                "sodfast.create_model have it"
            )
        self.preprocessing = check_preprocessing(model.preprocessing)
        self.size = _check_size(size, self.preprocessing, getattr(model, "size_multiple", 16))
        self.batch = batch
        self.max_pixels = max_pixels
        self.disparity = disparity
        self.network = fuse(model)
        self.device = _device_of(self.network)
        graphed = cuda_graph and self.device.type == "cuda"
        self.graphed = GraphedNetwork(self.network) if graphed else None
        if threads is not None:
            torch.set_num_threads(threads)

    @property
    def channels(self) -> int:
        """What the network takes: 3, or 4 where every picture needs a depth map."""
        return len(self.preprocessing["mean"])

    def describe(self) -> str:
        """Network, size, device, backend and threads, in a few words for people."""
        from .ops import _backend

        backend = _backend.choose("goctconv", torch.empty(0, device=self.device))
        if backend == "cpu" and _backend._C is not None:
            backend += f" ({_backend._C.cpu_isa()})"
        threads = torch.get_num_threads()
        return (
            f"{self.name}, {self.size[0]} x {self.size[1]}, device {self.device}, "
            f"backend {backend}{' in a CUDA graph' if self.graphed else ''}, "
            f"{threads} {'thread' if threads == 1 else 'threads'}"
        )

    def prepare(
        self, picture: PictureLike, depth: DepthLike = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Decodes and normalises: the input (1, channels, h, w) float32 and the picture's (H, W).

        See `sodfast.pictures.read_image` for what is read, and for the errors; for depth a call.
        """
        rgb = read_picture(picture, self.max_pixels).rgb
        if isinstance(depth, (str, os.PathLike)):
            depth = read_depth(depth, self.disparity)
        return to_input(rgb, self.preprocessing, self.size, depth), (rgb.shape[0], rgb.shape[1])

    def run(self, network_input: torch.Tensor) -> torch.Tensor:
        """The network alone: (B, channels, h, w) float32 to logits (B, 1, h, w)."""
        # One shape alone is captured: what varies would be captured again and again.
        whole = tuple(network_input.shape) == (self.batch, self.channels, *self.size)
        with torch.inference_mode():
            x = network_input.to(self.device)
            if self.graphed is None or not whole:
                return self.network(x)
            try:
                return self.graphed(x)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}\nThis was in a CUDA graph: Predictor(…, cuda_graph=False), or "
                    "--no-cuda-graph, runs the network without one"
                ) from error

    @overload
    def __call__(self, picture: PictureLike, depth: DepthLike = None) -> np.ndarray: ...

    @overload
    def __call__(
        self, picture: list[Any] | tuple[Any, ...], depth: Sequence[DepthLike] | None = None
    ) -> list[np.ndarray]: ...

    def __call__(self, picture: Any, depth: Any = None) -> np.ndarray | list[np.ndarray]:
        """The saliency map of one picture, (H, W) uint8: 0 background … 255 salient.

        picture: a path, a PIL image, or an array ((H, W[, C]) uint8, uint16, bool, or floats
        in 0 … 1). EXIF orientation is applied, so the map is upright. Of a list or tuple of
        pictures, a list of maps in the same order; an error in one picture is raised.
        depth: the depth map of each, for a network that takes it: a path, or an array (h, w)
        uint8, 0 far … 255 near, of the picture's proportions. ValueError where it is missing.
        """
        if not isinstance(picture, (list, tuple)):
            network_input, size = self.prepare(picture, depth)
            return to_map(self.run(network_input), size)
        depths = [None] * len(picture) if depth is None else depth
        if len(depths) != len(picture):
            raise ValueError(f"depth must be {len(picture)} maps, one per picture: {len(depths)}")

        def work(chunk: list[tuple[PictureLike, DepthLike]]) -> list[np.ndarray]:
            prepared = [self.prepare(*item) for item in chunk]
            logits = self.run(torch.cat([network_input for network_input, _ in prepared]))
            return [to_map(one[None], size) for one, (_, size) in zip(logits, prepared)]

        batches = list(chunks(list(zip(picture, depths)), self.batch))
        workers, inner = share_threads(torch.get_num_threads(), len(batches))
        with contextlib.closing(ordered_map(work, batches, workers, inner)) as results:
            return [saliency for result in results for saliency in result]


def _device_of(network: nn.Module) -> torch.device:
    tensors = [*network.parameters(), *network.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _is_count(value: Any) -> bool:
    try:
        return operator.index(value) >= 1 and not isinstance(value, bool)
    except TypeError:
        return False


def _check_size(
    size: int | tuple[int, int] | None, preprocessing: dict, multiple: int
) -> tuple[int, int]:
    if size is None:
        size = (preprocessing["size"][0], preprocessing["size"][1])
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(map(_is_count, sides)):
        raise ValueError(f"size must be one or two positive whole numbers of pixels, got {size!r}")
    height, width = map(int, sides)
    for value in (height, width):
        if value % multiple:
            below = value // multiple * multiple
            nearest = [n for n in (below, below + multiple) if n > 0]
            raise ValueError(
                f"size must be a multiple of {multiple}, got {value}; "
                f"the nearest are {' and '.join(map(str, nearest))}"
                if len(nearest) > 1
                else f"size must be a multiple of {multiple}, got {value}; "
                f"the nearest is {nearest[0]}"
            )
    return height, width


def predict_files(
    predictor: Predictor,
    jobs: Sequence[Job],
    progress: Callable[[], object] | None = None,
    kind: str = "mask",
    file_format: str = "png",
    remark: Callable[[str], object] | None = None,
    refined: bool | None = None,
) -> list[Failure]:
    """Makes the file of every job; returns the jobs that failed, in the order of `jobs`.

    kind: one of `sodfast.render.TYPES`; file_format: one of `sodfast.render.FORMATS`; refined:
    whether maps' edges are moved onto the pictures', see `sodfast.render.render`. As many
    pictures are in work at once as torch has threads, and one more is being read or written
    meanwhile; the files are the same for any number of threads and any predictor.batch.

    A picture that cannot be read or mapped does not stop the others. Each file is written
    under a temporary name and renamed. progress is called after every job, remark with a
    sentence about each that was done although its depth map is constant. Raises ValueError for
    an unknown kind or format, and OSError when a file cannot be written: the next one could not
    be either.
    """
    for name, value, known in (("kind", kind, TYPES), ("file_format", file_format, FORMATS)):
        if value not in known:
            raise ValueError(f"{name} must be {', '.join(known)}, got {value!r}")
    batches = list(chunks(jobs, predictor.batch))
    workers, inner = share_threads(torch.get_num_threads(), len(batches))
    cores = threading.BoundedSemaphore(workers)
    stopping = threading.Event()

    def work(batch: list[Job]) -> list[tuple[Failure | None, str | None]]:
        files = _Files(predictor, kind, file_format, refined)
        for job in batch:
            if not stopping.is_set():
                files.read(job)
        with cores:
            files.compute()
        for job in batch:
            if not stopping.is_set():
                files.write(job)
        return [(files.failures.get(job), files.remarks.get(job)) for job in batch]

    failures: list[Failure] = []
    # One worker more than compute: it waits for the disk while they do.
    results = ordered_map(work, batches, workers + 1, inner)
    try:
        for result in results:
            for failure, odd in result:
                if failure is not None:
                    failures.append(failure)
                elif odd is not None and remark is not None:
                    remark(odd)
                if progress is not None:
                    progress()
    finally:
        stopping.set()
        results.close()
    return failures


class _Files:
    """A batch of pictures on its way from files to files; what fails drops out."""

    def __init__(
        self, predictor: Predictor, kind: str, file_format: str, refined: bool | None
    ) -> None:
        self.predictor, self.kind, self.file_format = predictor, kind, file_format
        self.refined = refined
        self.sources: dict[Job, Path | BytesIO] = {}
        self.done: dict[Job, bytes] = {}
        self.failures: dict[Job, Failure] = {}
        self.remarks: dict[Job, str] = {}

    @contextlib.contextmanager
    def _for(self, *jobs: Job) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a damaged file provokes: it is one file
            self.failures.update({job: Failure(job.source, describe(error)) for job in jobs})

    def read(self, job: Job) -> None:
        with self._for(job):
            status = job.source.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("is not a file")
            small = status.st_size <= _READ_AHEAD
            self.sources[job] = BytesIO(job.source.read_bytes()) if small else job.source

    def compute(self) -> None:
        predictor = self.predictor
        pictures: dict[Job, Picture | None] = {}
        inputs: dict[Job, torch.Tensor] = {}
        sizes: dict[Job, tuple[int, int]] = {}
        for job, source in self.sources.items():
            with self._for(job):
                picture = read_picture(source, predictor.max_pixels)
                depth = None
                if job.depth is not None:
                    depth = read_depth(job.depth, predictor.disparity)
                    if not np.ptp(depth):
                        self.remarks[job] = (
                            f"{job.source}: the depth map {job.depth} is constant "
                            f"({depth.flat[0]} of 255) and says nothing"
                        )
                inputs[job] = to_input(picture.rgb, predictor.preprocessing, predictor.size, depth)
                sizes[job] = picture.rgb.shape[0], picture.rgb.shape[1]
                # Else no more of the picture is needed than its size.
                needed = needs_picture(self.kind, self.refined)
                pictures[job] = picture if needed else None
                del picture
        self.sources.clear()
        if not inputs:
            return
        with self._for(*inputs):
            logits = predictor.run(torch.cat(list(inputs.values())))
            for job, one in zip(inputs, logits):
                with self._for(job), pixels_at_once(sizes[job][0] * sizes[job][1]):
                    self.done[job] = make_file(
                        pictures.pop(job),
                        to_map(one[None], sizes[job]),
                        self.kind,
                        self.file_format,
                        self.refined,
                    )

    def write(self, job: Job) -> None:
        if job in self.done:
            write_file(self.done.pop(job), job.target)


def make_file(
    picture: Picture | None,
    saliency: np.ndarray,
    kind: str,
    file_format: str,
    refined: bool | None = None,
) -> bytes:
    """What is written for a picture, as bytes; picture may be None where it is not needed."""
    if picture is None:
        return encode(saliency, file_format)
    return encode(render(picture, saliency, kind, refined), file_format, picture.icc_profile)


def write_file(data: bytes, path: str | os.PathLike[str]) -> None:
    """Writes a file whole or not at all; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No fsync: a map is made again in milliseconds, and waiting for the disk takes longer.
    with atomic_write(path, sync=False) as file:
        file.write(data)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes the output folder and proves that files can be made in it, before any work.

    Raises OSError with a sentence that names the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            reason = "it, or something above it, is a file"
        else:
            reason = describe(error)
        raise OSError(f"cannot write to the output folder {folder}: {reason}") from error
