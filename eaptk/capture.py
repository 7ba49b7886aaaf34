"""Hooks that read sources in a forward pass and destination gradients in its backward pass.

Sources are module outputs, held by reference. A destination's own share of the gradient is had by giving
it its own *view* of the tensor it reads: the view's gradient is what flows through that reader alone,
and autograd computes it anyway. Where it is taken decides what is left to do:

    at the residual stream, before a norm that serves one destination      nothing
    at a projection's input (q, k and v share a norm)                       the norm's product
    at a projection's output, by head                                       weights and the norm's product

The last two are the contraction's work (`eaptk.kernels`). Hooks exist only inside `with Capture(…)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eaptk.errors import EaptkError
from eaptk.kernels import Destination, Norm, Source
from eaptk.sites import BRANCHES, LayerSites, Reader, Sites
from eaptk.weights import at_hand, is_offloaded, laid_out_for_gradients


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every flag as it was found outside, errors included.

    Raises:
        EaptkError: the model's parameters are such that no gradient flows through them.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise EaptkError(
            "the model was made under torch.inference_mode(), which allows no gradients; make it outside"
        )
    training = [module for module in model.modules() if module.training]
    # By place: of an offloaded model each use of a parameter leaves another object there.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        model.eval()
        for module, name in trainable:
            getattr(module, name).requires_grad_(False)
        with torch.inference_mode(False), laid_out_for_gradients(model):
            yield
    finally:
        for module in training:
            module.training = True
        for module, name in trainable:
            getattr(module, name).requires_grad_(True)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do another thing inside; outside it has the forward it had."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def run_again(block: nn.Module) -> AbstractContextManager[None]:
    """Of what the block computes keep its input alone; the backward pass runs it again."""
    # Hugging Face's own switch acts in training mode alone.
    # Stopped early, a module whose weights were brought for the occasion would keep them.
    again = partial(
        checkpoint,
        block.forward,
        use_reentrant=False,
        preserve_rng_state=False,
        early_stop=not is_offloaded(block),
    )
    return replaced_forward(block, again)


class Capture:
    """Sources, and with `gradients` destinations, of one forward pass run inside the context.

    `values` holds [B, T, D] by source name (``input``, ``a3``, ``m3``); at head granularity ``a3`` holds the
    output projection's input [B, T, heads, head_dim]. After `backward` `gradients` holds what the module
    docstring lists, by destination name (``a3<q>``, ``m3``, ``logits``).

    Args:
        recompute: keep of each layer its input alone, and run it again when the backward pass reaches it.
    """

    def __init__(self, sites: Sites, gradients: bool, recompute: bool = False) -> None:
        self.sites = sites
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        #: The stream as the first layer receives it, a leaf: backward passes run from the loss to here.
        self.root: Tensor | None = None
        self._with_gradients = gradients
        self._recompute = recompute
        self._left: Callable[[int], None] | None = None
        #: A layer that runs again meets the same hooks; what they read is known already.
        self._reading = True
        self._hooks = ExitStack()

    def __enter__(self) -> Capture:
        try:
            for index, layer in enumerate(self.sites.layers):
                self._hook_sources(index, layer)
                if self._with_gradients:
                    self._hook_destinations(index, layer)
                    if index:
                        self._before(layer.block, self._watch(index))
                if self._recompute:
                    self._hooks.enter_context(run_again(layer.block))
            if self._with_gradients:
                self._tap_input(self.sites.final_norm, "logits")
        except BaseException:
            self._hooks.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._hooks.close()

    def sources(
        self, replacements: Mapping[str, Tensor] | None = None, *, later: bool = False
    ) -> list[Source]:
        """Operands in order of writing; `replacements` by source name, broadcastable to `values`.

        Args:
            later: leave weights that would have to be made or brought on the meta device; `eaptk.division` does it.
        """
        by_head = self.sites.graph.granularity == "head"
        operands = []
        for name, value in self.values.items():
            weight = gain = None
            if by_head and name.startswith("a"):
                layer = self.sites.layers[int(name[1:])]
                if not later or at_hand(layer.attention_output):
                    weight = self.sites.output_weight(layer)
                else:
                    width = self.values["input"].shape[-1]
                    weight = torch.empty(*value.shape[2:], width, dtype=self.sites.dtype, device="meta")
                if layer.attention_post_norm is not None:
                    gain = self.sites.norm_facts(layer.attention_post_norm)[0]
            replacement = None if replacements is None else replacements[name].to(value.device)
            if replacement is not None and weight is not None:
                replacement = self._own_heads(replacement)
            operands.append(Source(value, weight, gain, replacement))
        return operands

    def _own_heads(self, heads: Tensor) -> Tensor:
        """Of [..., heads, head_dim] those that this process has."""
        shards = self.sites.shards
        if shards is None or heads.shape[-2] != self.sites.graph.n_heads:
            return heads
        return shards.own(heads, -2)

    def backward(
        self,
        loss: Tensor | None,
        left: Callable[[int], None] | None = None,
        again: bool = False,
        ends: Sequence[tuple[Tensor, Tensor]] = (),
        leaves: Sequence[Tensor] = (),
    ) -> None:
        """Gradients of `loss`, a scalar, down to the first layer's input.

        Args:
            left: told a layer's index when the pass has left it: gradients of its destinations and of those above
                are complete. Not told of layer 0, with which the pass ends.
            again: another backward pass is to follow. What this one recorded must be released before.
            ends: further tensors to go back from, each with its gradient.
            leaves: further tensors to go back to, whose hooks take their gradients.
        """
        assert self.root is not None
        self._reading, self._left = False, left
        roots = [*([] if loss is None else [(loss, None)]), *ends]
        try:
            torch.autograd.grad(
                [root for root, _ in roots],
                [self.root, *leaves],
                [gradient for _, gradient in roots],
                retain_graph=again,
            )
        finally:
            # It may know this capture. In a cycle all sources would wait for Python's collector.
            self._left = None

    def destinations(self, readers: Sequence[Reader] | None = None) -> list[Destination]:
        """Operands in order of reading, once the backward pass has left their layers; default: all."""
        norms: dict[int, Norm] = {}
        operands = []
        for reader in self.sites.readers if readers is None else readers:
            norm = weight = None
            layer = self.sites.layers[reader.layer] if reader.normed else None
            if layer is not None:
                if reader.layer not in norms:
                    stream = self.streams[f"a{reader.layer}"]
                    norms[reader.layer] = Norm(stream, *self.sites.norm_facts(layer.attention_norm))
                norm = norms[reader.layer]
                if reader.branch is not None:
                    weight = self.sites.branch_weight(layer, reader.branch)
            operands.append(Destination(self.gradients[reader.name], reader.reach, weight, norm))
        return operands

    def release(self, readers: Sequence[Reader], again: bool = False) -> None:
        """Let go of what only these destinations need, once they are contracted; the last of all come first.

        Args:
            again: another backward pass is to follow, whose gradients need the streams that are there.
        """
        for reader in readers:
            del self.gradients[reader.name]
            if not again and reader.normed and reader.name.startswith("a"):
                self.streams.pop(f"a{reader.layer}", None)

    def _hook_sources(self, index: int, layer: LayerSites) -> None:
        if index == 0:
            self._before(layer.block, self._read_input)
        if self.sites.graph.granularity == "block":
            self._after(layer.attention_write, self._read_output(f"a{index}"))
        else:
            self._before(layer.attention_output, self._read_heads(f"a{index}"))
            if layer.attention_post_norm is not None:
                self._before(
                    layer.attention_post_norm, self._scale_heads(f"a{index}", layer.attention_post_norm)
                )
        self._after(layer.mlp_write, self._read_output(f"m{index}"))

    def _hook_destinations(self, index: int, layer: LayerSites) -> None:
        name, graph = f"a{index}", self.sites.graph
        if graph.qkv == "merged" and not layer.shared_norm:
            self._tap_input(layer.attention_norm, name)
        else:
            self._before(layer.attention_norm, self._read_stream(name))
            self._tap_attention(layer, name)
        self._tap_input(layer.mlp_read if layer.shared_norm else layer.mlp_norm, f"m{index}")

    def _tap_attention(self, layer: LayerSites, name: str) -> None:
        graph, fused = self.sites.graph, self.sites.architecture.fused is not None
        modules = dict(zip(BRANCHES, (layer.query, layer.key, layer.value), strict=True))
        if graph.qkv == "merged":
            for module in dict.fromkeys(modules.values()):
                self._tap_input(module, name)
        elif graph.granularity == "head":
            keys = {branch: f"{name}<{branch}>" for branch in BRANCHES}
            for module in dict.fromkeys(modules.values()):
                owned = {keys[branch]: branch for branch in BRANCHES if modules[branch] is module}
                self._after(module, self._tap_output(owned))
        elif fused:
            self._after(layer.query, self._split_backward(layer, name))
        else:
            for branch, module in modules.items():
                self._tap_input(module, f"{name}<{branch}>")

    def _watch(self, index: int) -> Callable[[Tensor], None]:
        def left(gradient: Tensor) -> None:
            if self._left is not None:
                self._left(index)

        def watch(stream: Tensor) -> None:
            if stream.requires_grad:
                stream.register_hook(left)

        return watch

    def _record(self, key: str) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            seen = self.gradients.get(key)
            self.gradients[key] = gradient if seen is None else seen + gradient

        return record

    def _before(self, module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> None:
        """Let `change` see, and perhaps replace, the tensor that `module` reads."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            changed = change(x)
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        self._hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> None:
        self._hooks.callback(module.register_forward_hook(hook).remove)

    def _tap_input(self, module: nn.Module, key: str) -> None:
        record = self._record(key)

        def tap(x: Tensor) -> Tensor:
            view = x.view_as(x)
            view.register_hook(record)
            return view

        self._before(module, tap)

    def _tap_output(self, branches: Mapping[str, str]) -> Callable[[nn.Module, Any, Any], Any]:
        def record(gradient: Tensor) -> None:
            for key, branch in branches.items():
                self.gradients[key] = self.sites.branch_values(gradient, branch)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            view = output.view_as(output)
            view.register_hook(record)
            return view

        return hook

    def _split_backward(self, layer: LayerSites, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        shards = self.sites.shards

        def branches(gradient: Tensor) -> Iterator[Tensor]:
            for branch in BRANCHES:
                # Had only now: of most models it is at hand, of some it is made or brought.
                weight = self.sites.branch_weight(layer, branch).flatten(0, 1)
                found = self.sites.branch_values(gradient, branch).flatten(-2) @ weight
                found = found if shards is None else shards.sum(found)
                self.gradients[f"{name}<{branch}>"] = found
                yield found

        def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
            return _SplitBackward.apply(args[0], output.detach(), branches)  # type: ignore[no-untyped-call]

        return hook

    def _read_input(self, stream: Tensor) -> Tensor | None:
        self.values["input"] = stream.detach()
        if not self._with_gradients:
            return None
        self.root = stream.detach().requires_grad_()
        return self.root

    def _read_stream(self, name: str) -> Callable[[Tensor], None]:
        def read(stream: Tensor) -> None:
            if self._reading:
                self.streams[name] = stream.detach()

        return read

    def _read_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._reading:
                self.values[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def _read_heads(self, name: str) -> Callable[[Tensor], None]:
        def read(heads: Tensor) -> None:
            if self._reading:
                self.values[name] = self.sites.by_head(heads.detach())

        return read

    def _scale_heads(self, name: str, norm: nn.Module) -> Callable[[Tensor], None]:
        # A norm between the heads' sum and the stream is no linear map, but at the scale it takes on this
        # input it is: each head's share of what is added is its output times that scale and the gain.
        _, eps, centred = self.sites.norm_facts(norm)
        if centred:
            raise EaptkError(
                "a LayerNorm after the attention block cannot be shared out among heads; use 'block'"
            )

        def scale(summed: Tensor) -> None:
            if not self._reading:
                return
            summed = summed.detach().to(torch.promote_types(summed.dtype, torch.float32))
            rho = torch.rsqrt(summed.square().mean(-1, keepdim=True) + eps)
            self.values[name] = self.values[name] * rho.unsqueeze(-1)

        return scale


class _SplitBackward(torch.autograd.Function):
    """The output of a fused q/k/v projection, whose backward multiplies by its three parts one by one.

    The sum is the gradient that one product with the whole weight would give, at the same cost.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output: Tensor, branches: Callable[[Tensor], Iterator[Tensor]]
    ) -> Tensor:
        ctx.branches = branches
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        first, second, third = ctx.branches(gradients[0])
        return first + second + third, None, None
