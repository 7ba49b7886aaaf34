"""What a manifest says of a run: the facts by which a resume knows that it goes on with the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import eaptk
from eaptk.batch import Sample
from eaptk.errors import EaptkError
from eaptk.layout import command_line
from eaptk.loading import config_fingerprint, weights_fingerprint
from eaptk.losses import LossFunction
from eaptk.weights import device_of


def model_facts(model: Any) -> dict[str, Any]:
    """Of a loaded model: its weights, how they are run, and on what."""
    return {
        "id": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "type": model.config.model_type,
        "weights": weights_fingerprint(model),
        "config": config_fingerprint(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": device_of(model).type,
    }


def dataset_fingerprint(samples: Sequence[Sample]) -> str:
    """``sha256:…`` over all that is said of the samples."""
    digest = hashlib.sha256()
    for s in samples:
        fields = [s.id, s.group, s.prompt_ids, s.answer_ids, s.corrupt_ids, s.foil_ids, dict(s.extra)]
        digest.update(json.dumps(fields, default=str).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def loss_name(loss: str | LossFunction) -> str:
    """The loss as the manifest records it: a function of one's own with a fingerprint of its code."""
    if not callable(loss):
        return loss
    # A lambda shares its name with others; a closure, a method or an object hides values its code does not show.
    if not isinstance(loss, FunctionType) or "<" in loss.__qualname__ or loss.__closure__:
        raise EaptkError(
            f"the loss {getattr(loss, '__qualname__', type(loss).__qualname__)} has no name and code of its own "
            f"that a resume could know it by; give a named function of a module"
        )
    code = _code_facts((loss.__code__, loss.__defaults__, tuple((loss.__kwdefaults__ or {}).items())))
    return f"{loss.__module__}.{loss.__qualname__} sha256:{hashlib.sha256(code.encode()).hexdigest()}"


def _code_facts(value: Any) -> str:
    """What a function computes, as text that is the same in every process."""
    if isinstance(value, CodeType):
        return _code_facts((value.co_code, value.co_names, value.co_consts))
    if isinstance(value, tuple):
        return f"({', '.join(map(_code_facts, value))})"
    if isinstance(value, frozenset):  # ordered by hashes, which vary
        return f"{{{', '.join(sorted(map(_code_facts, value)))}}}"
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...)))
    return repr(value) if plain else type(value).__qualname__  # others show their address


def versions() -> dict[str, str]:
    """Of the packages that scores depend on."""
    import torch
    import transformers

    return {
        "eaptk": eaptk.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def provenance(dataset: Any) -> dict[str, str]:
    """Who, when and where: recorded, but no matter to a resume."""
    return {
        "command": command_line(),
        "data": str(dataset) if isinstance(dataset, (str, Path)) else type(dataset).__name__,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
