"""Models from a path or a name, refused in one line when they cannot be scored, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eaptk.architecture import find_architecture
from eaptk.errors import EaptkError
from eaptk.files import is_meant_as_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def quiet_transformers() -> None:
    """Standard error is for eaptk's own bar and its one line of error."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_config(name: str | os.PathLike[str]) -> Any:
    """The Hugging Face config of a model that can be scored.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        EaptkError: there is no model, or one whose edges cannot be scored; no weights have been read by then.
    """
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise EaptkError(
            f"{path} is no model: it has no config.json; give the folder that `save_pretrained` wrote"
        )
    if path.is_file() or (not path.is_dir() and is_meant_as_path(name)):
        raise EaptkError(f"{path} is no model: no such folder; give a folder with config.json and weights")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # of many kinds: broken JSON, unknown type, no network
        found = f"{name} is no model that can be loaded"
        if not path.is_dir():
            found = f"there is no folder {name} here, and no model of that name came from the hub"
        raise EaptkError(f"{found}: {_first_line(error)}") from error
    refuse_unsupported(config, str(name))
    return config


def refuse_unsupported(config: Any, name: str) -> None:
    """Refuse models without causal edges, and quantised ones.

    Raises:
        EaptkError: the type has no architecture entry, or the weights are quantised: gradients would have to
            flow through packed integers, and scores of heads read the projections' weights.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = settings.get("quant_method")
        raise EaptkError(
            f"{name} is quantised ({method}), and the backward pass of quantised weights is not supported; "
            f"use the unquantised checkpoint"
        )
    find_architecture(config)


def load_model(
    name: str | os.PathLike[str],
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
) -> Any:
    """A causal LM in evaluation mode.

    Args:
        name: a folder, or a name on the hub.
        dtype: a key of `DTYPES`; None: the checkpoint's own.
        device: None: ``cuda`` if there is one, else ``cpu``.
        attention: ``"sdpa"`` or ``"eager"``; None: what transformers prefers.

    Raises:
        EaptkError: as `load_config`; weights are missing, broken or of another shape; no such device.
    """
    from transformers import AutoModelForCausalLM

    if dtype is not None and dtype not in DTYPES:
        raise EaptkError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    config = load_config(name)
    where = _device(device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if dtype is None else DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds: missing or broken files, shapes, an unknown attention
        raise EaptkError(f"cannot load the weights of {name}: {_first_line(error)}") from error
    # transformers fills such weights with random numbers.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EaptkError(
            f"the checkpoint {name} lacks {len(missing)} weights of a {config.model_type} language model, "
            f"{missing[0]} for one; save the whole model again"
        )
    return model.to(where).eval()


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer beside a model; None if there is none.

    Raises:
        EaptkError: its files are broken.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # For a folder without any, transformers would make up an empty one.
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in _TOKENIZER_FILES):
        return None
    try:
        # A checkpoint that asks for the generic class means tokenizer.json to the letter. AutoTokenizer would
        # for some model types (qwen2) put their own rules in its place, and text would become other tokens.
        generic = get_tokenizer_config(name).get("tokenizer_class") in (
            "TokenizersBackend",
            "PreTrainedTokenizerFast",
        )
        return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(name)
    except Exception as error:  # of many kinds, all about the files
        raise EaptkError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error


def weights_fingerprint(model: nn.Module) -> str:
    """``sha256:…`` over name, dtype, shape and bytes of every parameter."""

    def digest(item: tuple[str, Tensor]) -> str:
        name, parameter = item
        data: Any = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{name} {parameter.dtype} {tuple(parameter.shape)} {hashlib.sha256(data).hexdigest()}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
        return _sha256("\n".join(pool.map(digest, sorted(model.named_parameters()))))


def config_fingerprint(config: Any) -> str:
    """``sha256:…`` over what the config says about the computation: equal weights can be run differently."""
    varying = ("dtype", "torch_dtype", "transformers_version", "architectures", "use_cache")
    content = {k: v for k, v in config.to_dict().items() if k not in varying and not k.startswith("_")}
    return _sha256(json.dumps(content, sort_keys=True, default=str))


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """``sha256:…`` over vocabulary and rules; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _sha256(json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True))
    rules = json.loads(backend.to_str())
    # Calls with padding or truncation leave these behind; eaptk uses neither.
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return _sha256(json.dumps(rules, sort_keys=True))


def _sha256(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _device(device: str | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or torch built without it
        raise EaptkError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
