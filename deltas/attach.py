"""Makes a loaded Hugging Face model delta-aware, without changing its weights or its state-dict keys.

Each linear and norm that has a site becomes an instance of a subclass of its own class (``module.__class__ = ...``),
so the modelling code stays Hugging Face's and only the leaves change. A forward pass is told the batch's plan through
one shared :class:`Hooks` object; with no plan the model computes exactly what it did before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltas.bank import SiteGroup, site_groups
from deltas.batch import Plan
from deltas.errors import UnsupportedBackbone
from deltas.ops import Ops
from deltas.ops.native import Kernels
from deltas.sites import BackboneSpec, SiteKind


@dataclass(eq=False)
class Hooks:
    """What the hooked modules share: the plan of the batch being computed, and the residual of its current block."""

    ops: Ops
    plan: Plan | None = None
    residual: Tensor | None = None

    @property
    def kernels(self) -> Kernels | None:
        return self.ops.kernels


@dataclass(eq=False)
class _Packed:
    """The weights of a group's linears, side by side, in the layout that is fastest on this device."""

    weight: Tensor
    bias: Tensor | None
    onednn: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.onednn:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


@dataclass(eq=False)
class _GroupHook:
    """One pass over a group: the base's linears at once, then every row's patches, then the block's.

    The first member computes, the others fetch: Hugging Face's modules call them in turn with one input.
    """

    hooks: Hooks
    group: SiteGroup
    packed: _Packed
    block: int | None  # the block group whose output this linear's output is
    last_input: Tensor | None = None
    last_output: Tensor | None = None
    pending: int = field(default=0)

    def member(self, j: int, x: Tensor) -> Tensor:
        site = self.group.sites[j]
        if j == 0:
            y = self.compute(x)
            if len(self.group.sites) == 1:
                return y
            self.last_input, self.last_output, self.pending = x, y, len(self.group.sites) - 1
        elif x is not self.last_input or self.last_output is None:
            raise RuntimeError(f"{site.path} was called with another input than its group's first member")
        else:
            y = self.last_output
            self.pending -= 1
            if self.pending == 0:
                self.last_input = self.last_output = None
        return y[..., self.group.offsets[j] : self.group.offsets[j] + site.out_features]

    def compute(self, x: Tensor) -> Tensor:
        y = self.packed(x)
        plan = self.hooks.plan
        if plan is not None:
            rows = y.view(-1, y.shape[-1])
            if plan.active(self.group.index):
                plan.apply(self.group.index, x.reshape(-1, x.shape[-1]), rows)
            if self.block is not None and plan.active(self.block):
                residual = self.hooks.residual
                if residual is None:
                    raise RuntimeError("a block's residual is not known: its norm was not hooked")
                plan.apply(self.block, residual.reshape(-1, residual.shape[-1]), rows)
        return y


class _DeltaLinear:
    """Mixin put before a linear's own class."""

    _deltaserve_hook: _GroupHook
    _deltaserve_member: int

    def forward(self, x: Tensor) -> Tensor:
        return self._deltaserve_hook.member(self._deltaserve_member, x)


@dataclass(eq=False)
class _NormHook:
    hooks: Hooks
    group: int
    starts_block: bool  # its input is the residual that the block's output will be added to
    rms_eps: float | None  # for a plain RMS norm, which the C kernel can compute


class _DeltaNorm:
    """Mixin put before a norm's own class."""

    _deltaserve_hook: _NormHook
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hook = self._deltaserve_hook
        hooks = hook.hooks
        if hook.starts_block:
            hooks.residual = x
        kernels = hooks.kernels
        if kernels is not None and hook.rms_eps is not None and not torch.is_grad_enabled():
            y = torch.empty_like(x)
            width = x.shape[-1]
            kernels.rms_norm(x.view(-1, width), self.weight, hook.rms_eps, y.view(-1, width))
        else:
            y = super().forward(x)  # type: ignore[misc]
        plan = hooks.plan
        if plan is not None and plan.active(hook.group):
            plan.apply(hook.group, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


_CLASSES: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, mixin: type, hook: Any) -> None:
    """Changes the module's class in place. A plain attribute holds the hook, so the state dict does not see it."""
    cls = type(module)
    if (mixin, cls) not in _CLASSES:
        _CLASSES[(mixin, cls)] = type(f"Delta{cls.__name__}", (mixin, cls), {})
    module.__class__ = _CLASSES[(mixin, cls)]
    object.__setattr__(module, "_deltaserve_hook", hook)


def attach(model: nn.Module, spec: BackboneSpec, ops: Ops, *, prepack: bool = True) -> Hooks:
    """Hooks every site of ``spec`` in ``model`` (in evaluation mode) and returns what the passes share.

    ``prepack`` keeps a second, reordered copy of the linears' weights where that is faster (CPU), and lays fused
    groups side by side elsewhere. Raises :class:`UnsupportedBackbone` if the model lacks a module of the table.
    """
    hooks = Hooks(ops)
    groups = site_groups(spec)
    blocks = {g.sites[0].path: g.index for g in groups if g.kind is SiteKind.BLOCK}
    modules = dict(model.named_modules())
    for group in groups:
        if group.kind is SiteKind.BLOCK:
            continue
        missing = [site.path for site in group.sites if site.path not in modules]
        if missing:
            raise UnsupportedBackbone(f"the model has no module {missing[0]}", field=missing[0])
        members = [modules[site.path] for site in group.sites]
        if group.kind is SiteKind.NORM:
            norm = members[0]
            starts = group.sites[0].name.endswith((".attn.norm", ".mlp.norm"))
            _become(norm, _DeltaNorm, _NormHook(hooks, group.index, starts, _rms_eps(norm)))
            continue
        hook = _GroupHook(hooks, group, _pack(members, prepack), blocks.get(group.sites[-1].path))
        for j, linear in enumerate(members):
            _become(linear, _DeltaLinear, hook)
            object.__setattr__(linear, "_deltaserve_member", j)
    return hooks


def _rms_eps(norm: nn.Module) -> float | None:
    eps = getattr(norm, "variance_epsilon", None)
    plain = type(norm).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
    return float(eps) if plain and eps is not None else None


def _pack(linears: list[nn.Module], prepack: bool) -> _Packed:
    weights: list[Tensor] = [linear.weight.detach() for linear in linears]  # type: ignore[operator]
    biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]  # type: ignore[operator]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None
    if any(b is not None for b in biases):
        pairs = zip(biases, weights, strict=True)
        bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for b, w in pairs])
    on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if prepack and on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return _Packed(torch.ops.mkldnn._reorder_linear_weight(weight), bias, onednn=True)
    if len(weights) > 1 and not on_cpu:
        at = 0
        for linear, own in zip(linears, weights, strict=True):  # the fused copy becomes the only one
            linear.weight.data = weight[at : at + own.shape[0]]
            at += own.shape[0]
    return _Packed(weight, bias, onednn=False)
