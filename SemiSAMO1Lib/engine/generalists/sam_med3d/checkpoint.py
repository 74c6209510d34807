"""The published weights: where they lie, how they are read safely, how they are fetched."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import pickle
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Card

NAME = "sam_med3d_turbo.pth"

#: Environment variable that names the file or its folder.
VARIABLE = "SEMISAMO1_CHECKPOINT"

CARD = Card(
    licence="Apache-2.0",
    size_bytes=402_135_119,
    sha256=("899a46d0", "cdd3c"),
    url="https://huggingface.co/blueyo0/SAM-Med3D/resolve/main/sam_med3d_turbo.pth",
)

#: Prefixes that wrappers put before every parameter's name.
WRAPPERS = ("module.", "_orig_mod.")

#: Bytes read at once.
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint is not there or cannot be used: what was expected, what was found, what to do."""


def cache_folder() -> Path:
    """Where downloaded weights lie on this computer."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "semisamo1"


def places(given: str | None = None) -> list[Path]:
    """Where the checkpoint is looked for: the configured file, else the environment variable's, else the cache folder.

    A file that was named is never replaced by another one silently.
    """
    path = Path(given or os.environ.get(VARIABLE) or cache_folder()).expanduser()
    folder = path.is_dir() or (path.suffix == "" and not path.is_file())
    return [path / NAME if folder else path]


def find(given: str | None = None) -> Path:
    """The checkpoint's file. Raises CheckpointError that says where it may be put."""
    looked = places(given)
    for path in looked:
        if path.is_file():
            return path
    raise CheckpointError(
        f"the checkpoint {NAME} was not found; looked at {', '.join(map(str, looked))}. Get it with "
        f"`semisamo1 checkpoint fetch`, or download {CARD.url} on another computer and put it at "
        f"{looked[0]}. Without it use --generalist registration or --generalist "
        "mind, and a learner other than semisam."
    )


def sha256(path: Path) -> str:
    """Hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_published(digest: str) -> bool:
    """True when a hash agrees with what is known of the published file's."""
    first, last = CARD.sha256
    return digest.startswith(first) and digest.endswith(last)


def read_weights(path: Path, published: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a checkpoint by name, float32, and notes on what was adapted. No code of the file is ever run.

    Args:
        path: the file.
        published: it should be the published one of SAM-Med3D; False: weights of any network.

    Raises:
        CheckpointError: not a checkpoint, truncated, or one that holds program code.
    """
    try:
        _must_be_of_torch(path)
        content = _mapped(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds pickled program code or other objects than tensors, which are never loaded here "
            f"({_refused(error)}). Expected: tensors only, as in the published {NAME}. If, and only if, you trust "
            "where the file comes from, convert it once: "
            "python -c \"import torch; c = torch.load('IN.pth', map_location='cpu', weights_only=False); "
            "torch.save({'model_state_dict': c['model_state_dict']}, 'OUT.pth')\""
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        text = f"{path} cannot be read: it is truncated or no checkpoint ({size:,} bytes found"
        if published:
            text += f", the published file has {CARD.size_bytes:,}). Fetch it again: semisamo1 checkpoint fetch"
        else:
            text += "). Copy it again, or take the weights of another round"
        raise CheckpointError(f"{text} ({_first_line(error)})") from error
    if isinstance(content, Mapping) and isinstance(content.get("model_state_dict"), Mapping):
        content = content["model_state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(one, Tensor) for one in content.values()):
        raise CheckpointError(f"{path} holds no state dict: expected tensors by name, or them under 'model_state_dict'")
    notes = []
    weights: dict[str, Tensor] = dict(content)
    while weights and (prefix := _wrapper(weights)):
        weights = {name.removeprefix(prefix): one for name, one in weights.items()}
        notes.append(f"{path.name}: the prefix {prefix!r} was taken off every name")
    if any(one.dtype in (torch.float16, torch.bfloat16) for one in weights.values()):
        notes.append(f"{path.name}: half precision, converted to float32; the published file is float32")
    return {name: one.float() if one.is_floating_point() else one for name, one in weights.items()}, notes


def _wrapper(names: Iterable[str]) -> str:
    """The wrapper's prefix that all names share, or nothing."""
    return next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in names)), "")


def load(model: nn.Module, weights: Mapping[str, Tensor], path: Path, part: str = "") -> None:
    """Load weights strictly; see `require`.

    Args:
        model: receives them.
        weights: by name.
        path: for messages.
        part: load only the names below this prefix, e.g. 'image_encoder.'.
    """
    mine = {name.removeprefix(part): one for name, one in weights.items() if name.startswith(part)}
    require(model, mine, path)
    model.load_state_dict(mine, assign=True)  # nothing is copied: the weights stay mapped from the file


def require(model: nn.Module, mine: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless weights are a model's; what is missing, unexpected or of another shape is listed."""
    own = model.state_dict()
    missing = [name for name in own if name not in mine]
    unexpected = [name for name in mine if name not in own]
    shapes = [
        f"{name} {tuple(mine[name].shape)} instead of {tuple(one.shape)}"
        for name, one in own.items()
        if name in mine and mine[name].shape != one.shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{path} belongs to another architecture than SAM-Med3D (vit_b_ori, {NAME}). "
            f"Missing: {missing or 'none'}. Unexpected: {unexpected or 'none'}. Other shapes: {shapes or 'none'}. "
            "Fetch the published file: semisamo1 checkpoint fetch"
        )


def _mapped(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # a file of torch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _must_be_of_torch(path: Path) -> None:
    """Raises ValueError for a file that cannot have been written by torch.save, e.g. a web page saved in its place."""
    with open(path, "rb") as stream:
        begin = stream.read(4)
    if begin != b"PK\x03\x04" and not begin.startswith(b"\x80"):
        raise ValueError(f"it begins with {begin!r}, which torch.save never writes")


def _refused(error: Exception) -> str:
    """What exactly torch refused to load."""
    found = re.search(r"WeightsUnpickler error: (.*? GLOBAL \S+|.{1,100})", str(error))
    return found[1] if found else _first_line(error)


def fetch(
    target: Path, url: str = CARD.url, tell: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Path, str]:
    """Download the checkpoint; a download that was cut short goes on where it stopped.

    Args:
        target: where the file goes.
        url: where it comes from.
        tell: gets bytes done and bytes in all.

    Returns:
        the file and its hash.

    Raises:
        CheckpointError: no network, or what came is not the published file (it is kept beside as .unverified).
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            resumed = answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
            done = have if resumed else 0
            with open(part, "ab" if resumed else "wb") as stream:
                while chunk := answer.read(_CHUNK):
                    stream.write(chunk)
                    done += len(chunk)
                    tell(done, total)
        if total and done < total:
            raise CheckpointError(
                f"the download of {url} ended after {done:,} of {total:,} bytes; run it again to go on"
            )
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to fetch
            raise CheckpointError(_by_hand(url, target, f"HTTP {error.code} {error.reason}")) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise CheckpointError(_by_hand(url, target, str(error))) from error
    digest = sha256(part)
    if not is_published(digest):
        kept = target.with_name(target.name + ".unverified")
        os.replace(part, kept)
        first, last = CARD.sha256
        raise CheckpointError(
            f"what came from {url} is not the published file: sha256 {digest}, expected {first}…{last}. It was kept as "
            f"{kept}; to use it all the same, rename it to {target.name}."
        )
    os.replace(part, target)
    return target, digest


def _by_hand(url: str, target: Path, reason: str) -> str:
    return (
        f"{url} cannot be reached ({reason}). Download it on a computer with a network and put it at {target} "
        f"({CARD.size_bytes:,} bytes), or name its place with {VARIABLE} or --checkpoint."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
