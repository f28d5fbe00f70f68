"""A real video file as frames of a few pixels, by PyAV, which is optional."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOST_FRAMES = 20_000


def load_film(path: Path, *, side: int, most: int = MOST_FRAMES) -> NDArray[np.float32]:
    """The first frames of a video (n side side), grey, from 0 to 1, each averaged down to so few pixels.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: no video that can be decoded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no video file {path}.")
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise ImportError(f"decoding {path} needs PyAV, which is not installed: pip install av.") from None
    frames: list[NDArray[np.float32]] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                grey = frame.reformat(width=side, height=side, format="gray", interpolation="AREA")
                frames.append((grey.to_ndarray() / 255).astype(np.float32))
                if len(frames) == most:
                    break
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no video that PyAV can decode ({error}).") from None
    if not frames:
        raise ValueError(f"{path} has no frame.")
    return np.stack(frames)
