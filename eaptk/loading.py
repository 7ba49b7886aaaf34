"""Models from a path or a name, refused in one line when they cannot be scored, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from eaptk.architecture import find_architecture
from eaptk.errors import EaptkError
from eaptk.files import is_meant_as_path
from eaptk.graph import Graph
from eaptk.shards import refuse_uneven
from eaptk.weights import (
    adapters,
    bare,
    check_backward,
    dtype_of,
    is_sharded,
    packed_projections,
    stored,
    whole,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Kinds of quantised weights, as configs name them, whose backward pass to activations there is, and where.
QUANTISED = {"bitsandbytes": ("cpu", "cuda"), "gptq": ("cuda",), "awq": ("cuda",)}
#: Where each process of a `torchrun` finds its place.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def quiet_transformers() -> None:
    """Standard error is for eaptk's own bar and its one line of error."""
    import logging as python_logging

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for library in ("accelerate", "bitsandbytes"):
        python_logging.getLogger(library).setLevel(python_logging.ERROR)


def load_config(name: str | os.PathLike[str]) -> Any:
    """The Hugging Face config of a model that can be scored; of an adapter, that of its base model.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        EaptkError: there is no model, or one whose edges cannot be scored; no weights have been read by then.
    """
    from transformers import AutoConfig

    path, base = Path(name), base_of(name)
    if base is not None:
        if base_of(base) is not None:
            raise EaptkError(f"the base model of {path}, {base}, is an adapter itself; merge that one first")
        return load_config(base)
    if path.is_dir() and not (path / "config.json").is_file():
        raise EaptkError(
            f"{path} is no model: it has no config.json; give the folder that `save_pretrained` wrote"
        )
    if path.is_file() or (not path.is_dir() and is_meant_as_path(name)):
        raise EaptkError(f"{path} is no model: no such folder; give a folder with config.json and weights")
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=not path.is_dir() and _offline())
    except Exception as error:  # of many kinds: broken JSON, unknown type, no network
        found = f"{name} is no model that can be loaded"
        if not path.is_dir():
            found = f"there is no folder {name} here, and no model of that name came from the hub"
        raise EaptkError(f"{found}: {_first_line(error)}") from error
    refuse_unsupported(config, str(name))
    return config


def base_of(name: str | os.PathLike[str]) -> str | None:
    """The base model of a folder that holds a PEFT adapter and no model of its own; None of any other.

    Raises:
        EaptkError: its adapter_config.json is broken or names none.
    """
    path = Path(name)
    if not (path / _ADAPTER).is_file() or (path / "config.json").is_file():
        return None
    try:
        base = json.loads((path / _ADAPTER).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise EaptkError(f"{path / _ADAPTER} names no base model; set its base_model_name_or_path")
    return base


def refuse_unsupported(config: Any, name: str) -> None:
    """Refuse models without causal edges, and quantised ones through which no gradient flows.

    Raises:
        EaptkError: the type has no architecture entry; or the weights are quantised in a way whose backward pass is
            not known to work, or not on this machine.
    """
    method = _quantisation(config)
    if method is not None and method not in QUANTISED:
        raise EaptkError(
            f"{name} is quantised ({method}), and the backward pass of quantised weights is not supported of that "
            f"kind; use the unquantised checkpoint, or one of {', '.join(QUANTISED)}"
        )
    if method is not None and not torch.cuda.is_available() and "cpu" not in QUANTISED[method]:
        raise EaptkError(
            f"{name} is quantised ({method}), whose backward pass runs on a CUDA card alone; use the unquantised "
            f"checkpoint"
        )
    find_architecture(config)


def load_model(
    name: str | os.PathLike[str],
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    *,
    device_map: str | Mapping[str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    tensor_parallel: bool = False,
) -> Any:
    """A causal LM in evaluation mode.

    Args:
        name: a folder, or a name on the hub. A folder with a PEFT adapter (adapter_config.json) gives its base model
            with the adapter in place, unmerged.
        dtype: a key of `DTYPES`; None: the checkpoint's own.
        device: None: ``cuda`` if there is one, else ``cpu``.
        attention: ``"sdpa"`` or ``"eager"``; None: what transformers prefers.
        device_map: for a model larger than a card: ``"auto"``, or module names to devices, ``"cpu"`` and ``"disk"``
            included (`accelerate`). Layers that wait on the CPU or on disk are brought for each use: of a batch each
            layer's weights travel three times, so this is for when nothing else fits.
        offload_folder: for weights that wait on disk and are not in safetensors files already.
        tensor_parallel: share every layer out over the processes of a `torchrun`, all of them (transformers'
            ``tp_plan="auto"``). Every process makes the same calls then, and has the same scores.

    Raises:
        EaptkError: as `load_config`; weights are missing, broken or of another shape; no such device; a package that
            this takes is not installed; more than one of `device`, `device_map` and `tensor_parallel`.
    """
    from transformers import AutoModelForCausalLM

    if dtype is not None and dtype not in DTYPES:
        raise EaptkError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if (device is not None) + (device_map is not None) + tensor_parallel > 1:
        raise EaptkError(
            "device, device_map and tensor_parallel each say where the model goes; give one of them"
        )
    base = base_of(name)
    config = load_config(name)
    method = _quantisation(config)
    places: dict[str, Any] = {}
    if tensor_parallel:
        _check_parallel(name, config, base, method)
        world = _n_processes()
        refuse_uneven(Graph.from_config(config), world)
        places |= _parallel(world)
    elif device_map is not None:
        places |= {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
        places |= {} if offload_folder is None else {"offload_folder": str(offload_folder)}
    else:
        where = _device(device)
        # Packed weights are made on their device, and do not move.
        places |= {} if method is None else {"device_map": {"": str(where)}}
    if "device_map" in places:
        _need("accelerate", "a model over several devices" if method is None else "a quantised model")
    if method == "bitsandbytes":
        _need("bitsandbytes", "a quantised model")
    source = name if base is None else base
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto" if dtype is None else DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
            local_files_only=not Path(source).is_dir() and _offline(),
            **places,
        )
    except Exception as error:  # of many kinds: missing or broken files, shapes, an unknown attention
        raise EaptkError(f"cannot load the weights of {source}: {_first_line(error)}") from error
    # transformers fills such weights with random numbers.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EaptkError(
            f"the checkpoint {source} lacks {len(missing)} weights of a {config.model_type} language model, "
            f"{missing[0]} for one; save the whole model again"
        )
    if tensor_parallel and world > 1 and not any(is_sharded(parameter) for parameter in model.parameters()):
        raise EaptkError(
            f"this transformers has not shared the weights of {source} out over processes; use a newer one, or "
            f"device_map"
        )
    if not places:
        model = model.to(where)
    if base is not None:
        model = _with_adapter(model, name)
    if method is not None:
        for projection in packed_projections(model):
            check_backward(projection, dtype_of(model))
    return model.eval()


def _with_adapter(model: Any, name: str | os.PathLike[str]) -> Any:
    _need("peft", "a model with an adapter")
    from peft import PeftModel

    waiting = {"cpu", "disk"} & {str(where) for where in getattr(model, "hf_device_map", {}).values()}
    if waiting and len(set(map(str, model.hf_device_map.values()))) > 1:
        raise EaptkError(
            f"the base model of {name} does not fit on its devices, and adapters of weights that wait elsewhere are "
            f"not supported; merge the adapter and save the whole model"
        )
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted: Any = bare(PeftModel.from_pretrained(model, str(name)))
        # It would do as if there were no adapter, or only a part of it.
        missing = [str(each.message) for each in said if "missing adapter keys" in str(each.message)]
        if missing:
            raise EaptkError(f"the adapter {name} is not of its base model: {missing[0][:200]}")
    except EaptkError:
        raise
    except Exception as error:  # of many kinds: missing or broken files, shapes, modules that are not there
        raise EaptkError(f"cannot load the adapter {name}: {_first_line(error)}") from error
    adapted.name_or_path = str(name)
    return adapted


def _n_processes() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ["WORLD_SIZE"])


def _parallel(world: int) -> dict[str, Any]:
    """How transformers is asked for tensor parallelism over all processes."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=world, tp_plan="auto")}
    except (ImportError, TypeError):  # before 5.18
        return {"tp_plan": "auto"}


def _check_parallel(name: str | os.PathLike[str], config: Any, base: str | None, method: str | None) -> None:
    if not getattr(config, "base_model_tp_plan", None):
        raise EaptkError(
            f"transformers has no plan to share a {config.model_type} model out over processes; use device_map, or one "
            f"whole model a process"
        )
    if base is not None or method is not None:
        what = "an adapter" if base is not None else "quantised"
        raise EaptkError(
            f"{name} is {what}, and only whole plain weights are shared out over processes; merge or unquantise it, or "
            f"use device_map"
        )
    if not torch.distributed.is_initialized() and not all(name in os.environ for name in _TORCHRUN):
        raise EaptkError(
            "tensor parallelism needs several processes; start them with torchrun --nproc-per-node N -m eaptk …"
        )


def _quantisation(config: Any) -> str | None:
    """How the weights are packed, as the config names it."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))


def _need(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise EaptkError(f"{what} needs the package {package}: pip install 'eaptk[{package}]'")


def _offline() -> bool:
    """The hub's address is unknown here. Its client would go on asking for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer beside a model, or beside the base model of an adapter that has none; None if there is none.

    Raises:
        EaptkError: its files are broken.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # For a folder without any, transformers would make up an empty one.
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in _TOKENIZER_FILES):
        base = base_of(name)
        return None if base is None else load_tokenizer(base)
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
    """``sha256:…`` over name, dtype, shape and bytes of every parameter, and how adapters are applied.

    The same wherever the weights are. Of a model that is shared out over processes all of them call this together.
    """
    model = bare(model)

    def digest(item: tuple[str, Tensor | tuple[nn.Module, str]]) -> str:
        name, found = item
        tensor = found if isinstance(found, Tensor) else stored(*found)
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"

    contents = sorted(_contents(model), key=lambda item: item[0])
    if any(is_sharded(parameter) for parameter in model.parameters()):
        # Each is had from all processes, one after the other.
        lines = [digest((name, whole(stored(*found)))) for name, found in contents]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
            lines = list(pool.map(digest, contents))
    return _sha256("\n".join(lines + adapters(model)))


def _contents(model: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter once, as (module, name); of a quantised model every tensor of its state."""
    if _quantisation(model.config) is not None:
        yield from ((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))
        return
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            # Those that wait elsewhere are no longer one object.
            if id(parameter) not in seen and not (parameter.is_meta and full in tied):
                seen.add(id(parameter))
                yield full, (module, name)


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
        torch.empty(0, dtype=torch.float64, device=found)  # scores are added up in that
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, not built in, no float64
        raise EaptkError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
