"""Weights that are no plain tensors in their module: adapted, quantised, offloaded, or sharded over processes.

A projection is a linear map whatever it is stored as, and `matrix` finds the map. PEFT, accelerate and bitsandbytes are
never imported here: a model that needs them has brought them along.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eaptk.errors import EaptkError

#: Rows of the identity that a projection is probed with at a time.
PROBES = 1024
#: How far a probed map may be from the module: quantised ones round what they read to 8 bits.
LINEAR_TO = 0.05
#: Adapters that act on more than the modules they replace, or differently for every input.
_NOT_STATIC = ("XLORA", "POLY")
#: PEFT's layers that add a product of two narrow maps to a projection, plain or packed: file and class.
_LORA = (("layer", "Linear"), ("bnb", "Linear4bit"), ("bnb", "Linear8bitLt"))

_probed: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


def bare(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, its adapters in place; any other model as it is.

    Raises:
        EaptkError: an active adapter is not part of the model's modules: virtual tokens, or a mixture by input.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    for name in _names(model.active_adapters):
        config: Any = model.peft_config[name]
        kind = config.peft_type.value if hasattr(config.peft_type, "value") else str(config.peft_type)
        if (
            config.is_prompt_learning
            or kind in _NOT_STATIC
            or getattr(config, "alora_invocation_tokens", None)
        ):
            raise EaptkError(
                f"adapter {name!r} ({kind}) does not change the model's weights alone, so edges of the model do not "
                f"say what it does; use an adapter of weights, such as LoRA"
            )
    return model.base_model.model


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes token ids: an offloaded embedding has no device of its own."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return execution_device(embedding)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of activations: packed weights have another."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            found = hook.execution_device
            return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
    return next(tensor.device for tensor in _tensors(module))


def is_offloaded(model: nn.Module) -> bool:
    """Some weights are brought to their device for each use, from the CPU's memory or from disk."""
    return any(parameter.is_meta for parameter in model.parameters())


def stored(module: nn.Module, name: str) -> Tensor:
    """A parameter's content wherever it is: on its device, or where it waits to be brought there."""
    parameter: Tensor = getattr(module, name)
    for hook in _hooks(module) if parameter.is_meta else ():
        waiting = getattr(hook, "weights_map", None)
        if waiting is not None:
            content: Tensor = waiting[name]
            return content.detach().to(parameter.dtype)
    return parameter.detach()


def in_place(module: nn.Module, name: str) -> Tensor:
    """`stored`, on the module's device; of a parameter that is sharded over processes this process's part."""
    tensor: Any = stored(module, name)
    return tensor.to_local() if is_sharded(tensor) else tensor.to(execution_device(module))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of it (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """All of a tensor, from all processes that have a part of it: they call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def features(projection: nn.Module) -> tuple[int, int] | None:
    """Widths that a linear map reads and writes; None for other modules."""
    if isinstance(projection, Conv1D):
        return int(projection.nx), int(projection.nf)
    read, written = getattr(projection, "in_features", None), getattr(projection, "out_features", None)
    return (read, written) if isinstance(read, int) and isinstance(written, int) else None


def linear_maps(module: nn.Module) -> list[tuple[int, int]]:
    """`features` of those inside a module; adapters' own parts count with the projection they are part of."""
    found = features(module)
    if found is not None:
        return [found]
    return [shape for child in module.children() for shape in linear_maps(child)]


def matrix(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    """[in, out], the linear map that a projection is, apart from its bias.

    A plain weight is itself, an offloaded one is brought, an adapter's share is added, packed ones are unpacked or
    found by feeding the identity. Made anew at each call, but for the last: it is kept as long as the packed weights
    are, `dtype.itemsize` bytes an element.

    Args:
        dtype: of activations.

    Raises:
        EaptkError: the module is no linear map.
    """
    if _is_plain(projection):
        weight = in_place(projection, "weight")
        return weight if isinstance(projection, Conv1D) else weight.T
    adapted = _adapted(projection, dtype)
    if adapted is not None:
        return adapted
    unpacked = _unpacked(projection)
    return unpacked.T.to(dtype) if unpacked is not None else _probe(projection, dtype)


def at_hand(projection: nn.Module) -> bool:
    """Whether `matrix` is the module's own weight, where it computes."""
    return _is_plain(projection) and not cast(Tensor, projection.weight).is_meta


def _is_plain(projection: nn.Module) -> bool:
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or not torch.is_floating_point(weight):
        return False
    # By the forward it runs, not by its class: quantised and adapted projections subclass nn.Linear.
    forward = type(projection).forward
    if forward is nn.Linear.forward:
        return features(projection) == tuple(weight.shape[::-1])
    return forward is Conv1D.forward


def _adapted(projection: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Of a LoRA layer; its variants are more than a sum, and probed."""
    found = (getattr(sys.modules.get(f"peft.tuners.lora.{file}"), name, None) for file, name in _LORA)
    if not isinstance(projection, tuple(filter(None, found))):
        return None
    layer: Any = projection
    base = matrix(layer.base_layer, dtype)
    if layer.disable_adapters or layer.merged:
        return base
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if any(name in layer.lora_variant for name in active):
        return None
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for name in active:
        with torch.no_grad():
            delta: Tensor = layer.get_delta_weight(name)
        as_conv = isinstance(layer.base_layer, Conv1D)
        total = total + (delta if as_conv else delta.T).to(total)
    return total.to(base.dtype)


def _unpacked(projection: nn.Module) -> Tensor | None:
    """[out, in] of bitsandbytes' packed weights."""
    # The module's own: an adapter gives out those of the projection inside it.
    weight: Any = projection._parameters.get("weight")
    if type(weight).__name__ not in ("Params4bit", "Int8Params") or weight.is_meta:
        return None
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    with torch.no_grad():
        return dequantize_bnb_weight(weight, getattr(projection, "state", None)).detach()


@torch.no_grad()
def _probe(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    shape = features(projection)
    if shape is None or projection.training:
        raise _no_linear_map(projection)
    content = [(id(t), t._version) for t in _tensors(projection)]
    packed = any(not t.is_floating_point() for t in _tensors(projection))
    key = (dtype, *content)
    known = _probed.get(projection)
    if known is not None and known[0] == key:
        return known[1]
    width, device = shape[0], execution_device(projection)

    def run(x: Tensor) -> Tensor:
        # Past the module's hooks, which may be a capture's.
        return projection.forward(x.to(device, dtype)[None])[0].detach()

    zero = run(torch.zeros(1, width))
    found = torch.empty(width, zero.shape[-1], dtype=zero.dtype, device=zero.device)
    for start in range(0, width, PROBES):
        rows = range(start, min(start + PROBES, width))
        identity = torch.zeros(len(rows), width)
        identity[range(len(rows)), rows] = 1
        found[rows.start : rows.stop] = run(identity) - zero
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    expected, seen = x.to(found).double() @ found.double(), (run(x) - zero).double()
    if not (expected - seen).norm() <= LINEAR_TO * expected.norm():
        raise _no_linear_map(projection)
    found = found.to(dtype)
    if packed:
        _probed[projection] = (key, found)
    return found


@contextmanager
def laid_out_for_gradients(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes' 4-bit weights as they are inside.

    On a CPU with bfloat16 instructions a pass without gradients would lay them out anew, in place; from then on
    gradients through them are none or wrong.

    Raises:
        EaptkError: that has happened already.
    """
    modules: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for module in modules:
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise EaptkError(
                "bitsandbytes has laid the model's 4-bit weights out for inference on this CPU, and no gradient flows "
                "through them now; load it again, and score it before anything else runs it"
            )
    try:
        for module in modules:
            module.support_avx512bf16_for_cpu = False
        yield
    finally:
        for module in modules:
            module.support_avx512bf16_for_cpu = True


def packed_projections(model: nn.Module) -> list[nn.Module]:
    """One linear map of each kind whose weights are packed: the first of its class."""
    found: dict[type, nn.Module] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if features(module) is not None and any(not tensor.is_floating_point() for tensor in own):
            found.setdefault(type(module), module)
    return list(found.values())


def check_backward(projection: nn.Module, dtype: torch.dtype) -> None:
    """Refuse a packed projection whose backward pass is missing, or is not that of its map.

    Raises:
        EaptkError: one of these; the message says which.
    """
    shape = features(projection)
    if shape is None:
        raise _no_linear_map(projection)
    device, name = execution_device(projection), type(projection).__name__
    with torch.enable_grad():
        x = torch.randn(1, 32, shape[0], generator=torch.Generator().manual_seed(0))
        x = x.to(device, dtype).requires_grad_()
        try:
            y = projection(x)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            (found,) = torch.autograd.grad(y, x, g)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EaptkError(
                f"the quantised weights of {name} have no backward pass to activations on {device.type} ({reason}); "
                f"use the unquantised checkpoint, or another device"
            ) from error
    expected = g[0].double() @ matrix(projection, dtype).double().T
    if not (found[0].double() - expected).norm() <= LINEAR_TO * expected.norm():
        raise EaptkError(
            f"the backward pass of {name}'s quantised weights on {device.type} is not that of their forward pass; "
            f"use the unquantised checkpoint, or another device"
        )


def adapters(model: nn.Module) -> list[str]:
    """What adapters do beside their parameters: which are active, and at which scale; a line a module, sorted."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    found = []
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            layer: Any = module
            scales = getattr(layer, "scaling", {})
            active = [f"{each}×{scales.get(each)}" for each in _names(layer.active_adapters)]
            state = "disabled" if layer.disable_adapters else "merged" if layer.merged else "active"
            found.append(f"{name} {type(layer).__name__} {state} {' '.join(active)}")
    return sorted(found)


def _names(active: str | list[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Those of accelerate that place the module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _no_linear_map(projection: nn.Module) -> EaptkError:
    return EaptkError(
        f"{type(projection).__name__} is no linear map: its weight cannot be split by head; load the model "
        f"unquantised with adapters merged, or, where q, k and v are separate, use granularity='block'"
    )
