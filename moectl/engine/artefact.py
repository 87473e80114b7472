"""Weights that other stages consume: a `.pth` file under the document's name and a `.json` sidecar.

The file holds tensors and plain types only, so `torch.load(weights_only=True)` reads it. The
sidecar says how to rebuild the model and carries the checksum.
"""

import io
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.engine.errors import UserError
from moectl.engine.files import read_bytes, read_json, sha256, write_bytes, write_json


@dataclass(frozen=True)
class Artefact:
    """A weights file that was read and checked."""

    path: Path
    payload: dict[str, Any]
    facts: dict[str, Any]
    """The sidecar; empty for a foreign file without one."""
    sha256: str


def save(path: Path, payload: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights and sidecar and return the sidecar.

    Args:
        path: the weights file.
        payload: what the file holds: `state_dict` and other tensors and plain types.
        facts: how to rebuild the model, classes, scores and other plain values.
    """
    import torch

    buffer = io.BytesIO()  # through memory: the bytes do not depend on the file's name
    torch.save(_canonical(dict(payload)), buffer)
    data = buffer.getvalue()
    sidecar = {**facts, "file": path.name, "bytes": len(data), "sha256": sha256(data)}
    write_bytes(path, data)
    write_json(path.with_name(f"{path.name}.json"), sidecar)
    return sidecar


def _canonical(value: Any) -> Any:
    """Bring tensors to the CPU and make equal strings one object: equal contents, equal bytes."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Mapping):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_canonical(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def load(path: Path) -> Artefact:
    """Read a weights file without running code from it, and check it against its sidecar.

    Raises:
        UserError: if it is missing, damaged, or holds more than tensors and plain types.
    """
    data = read_bytes(path)
    facts = _sidecar(path)
    digest = sha256(data)
    if facts and facts.get("sha256") != digest:
        raise UserError(f"{path}: does not match the checksum in {path.name}.json")
    payload = safe_load(data, str(path))
    if not isinstance(payload, dict):
        raise UserError(
            f"{path}: holds a {type(payload).__name__}, expected a dictionary with weights"
        )
    return Artefact(path, payload, facts, digest)


def safe_load(
    data: bytes,
    where: str,
    *,
    allowed: Sequence[Any] = (),
    hint: str = "save its state_dict alone with torch.save and use that file",
) -> Any:
    """Read what torch.save wrote, tensors and plain types only.

    Args:
        data: the file.
        where: its name in errors.
        allowed: classes and functions that it may name besides; these do run.
        hint: what to do about a file that names others.

    Raises:
        UserError: naming `where`, if it holds anything else or is damaged.
    """
    from pickle import UnpicklingError  # the name of the refusal; nothing is unpickled

    import torch

    if data[:2] == b"PK" and not zipfile.is_zipfile(io.BytesIO(data)):
        raise UserError(f"{where}: not a weights file (cut off)", "copy or download it again")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"{where}: holds more than tensors and plain types, and is not read for safety", hint
        ) from None
    except Exception as error:  # on damaged bytes an unpickler raises anything
        known = isinstance(error, RuntimeError) and str(error).strip()
        reason = "damaged, or another kind of file"
        reason = str(error).strip().partition("\n")[0] if known else reason
        raise UserError(f"{where}: not a weights file ({reason[:160]})") from None


def trusting_load(data: bytes, where: str) -> Any:
    """Read what torch.save wrote, running whatever code it asks for.

    Raises:
        UserError: naming `where`, if that fails.
    """
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:  # its code may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where}: cannot be read ({reason[:160]})") from None


def _sidecar(path: Path) -> dict[str, Any]:
    sidecar = path.with_name(f"{path.name}.json")
    if not sidecar.exists():
        return {}
    facts = read_json(sidecar)
    if not isinstance(facts, dict) or "sha256" not in facts:
        raise UserError(f"{sidecar}: has no checksum of {path.name}")
    return facts
