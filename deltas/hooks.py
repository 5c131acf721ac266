"""What the hooked modules do: the backbone's own computation, then the batch's steps at that site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltas.batch import Plan
from deltas.groups import SiteGroup
from deltas.ops import Ops
from deltas.ops.native import Kernels
from deltas.ops.rows import RowKernels
from deltas.sites import Site

_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")
# RMS norms that scale by one more than their weight, and round once
_CENTRED_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")


@dataclass(eq=False)
class Hooks:
    """What the hooked modules share: the plan of the batch being computed.

    ``decoder_plan`` is for the tokens of an encoder-decoder's decoder; ``plan`` then is for the encoder's.
    """

    ops: Ops
    plan: Plan | None = None
    decoder_plan: Plan | None = None

    @property
    def rows(self) -> RowKernels | None:
        return self.ops.rows

    def active(self, group: SiteGroup) -> Plan | None:
        """The plan that has something to do at this group, if one has."""
        plan = self.decoder_plan if group.decoder else self.plan
        return plan if plan is not None and plan.active(group.index) else None


@dataclass(eq=False)
class Packed:
    """The weights of a group's linears, side by side, in the layout that is fastest on this device.

    ``kernels`` says that the weight is in the layout of :meth:`~deltas.ops.native.Kernels.pack_linear`, ``onednn`` that
    it is in oneDNN's; else it is ``[out, in]``.
    """

    weight: Tensor
    bias: Tensor | None
    out: int
    kernels: Kernels | None = None
    onednn: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.kernels is not None:
            rows = x.reshape(-1, x.shape[-1])
            if rows.stride(1) != 1:
                rows = rows.contiguous()
            return self.kernels.linear(rows, self.weight, self.bias, self.out).view(*x.shape[:-1], self.out)
        if self.onednn:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)

    @staticmethod
    def of(linears: Sequence[nn.Module], *, prepack: bool, kernels: Kernels | None = None) -> Packed:
        """The linears' weights. Where they lie one behind the other already there is no copy; else the fused copy becomes
        the only one, unless it is reordered: for ``kernels`` where they can, else for oneDNN."""
        weights = [weight_of(linear) for linear in linears]
        biases = [bias_of(linear) for linear in linears]
        whole = _side_by_side(weights)
        weight = torch.cat(weights) if whole is None else whole
        bias, out = None, len(weight)
        if any(b is not None for b in biases):
            pairs = zip(biases, weights, strict=True)
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for b, w in pairs])
        on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        if prepack and on_cpu and kernels is not None and kernels.packs(weight):
            return Packed(kernels.pack_linear(weight), bias, out, kernels=kernels)
        if prepack and on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            return Packed(reordered, bias, out, onednn=True)
        if whole is None:
            at = 0
            for linear, own in zip(linears, weights, strict=True):
                linear.weight.data = weight[at : at + own.shape[0]]
                at += own.shape[0]
        return Packed(weight, bias, out)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """One view of weights that follow each other in one memory, rows after rows; None where they do not."""
    first, end = weights[0], weights[0].data_ptr()
    if len(weights) == 1:
        return first
    for weight in weights:
        apart = weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if apart or not weight.is_contiguous() or weight.data_ptr() != end:
            return None
        end += weight.numel() * weight.element_size()
    rows = sum(len(weight) for weight in weights)
    return first.as_strided((rows, first.shape[1]), first.stride())


def weight_of(linear: nn.Module) -> Tensor:
    """``[out, in]``, also of GPT-2's ``Conv1D``, which stores ``[in, out]``."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    return weight.T if type(linear).__name__.endswith("Conv1D") else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    bias = linear.bias
    return None if bias is None else bias.detach()  # type: ignore[operator]


class _Asked:
    """What a step may ask of a module: by default nothing. See :class:`~deltas.batch.Hooked`."""

    fed = False

    def linear(self, _out0: int, _out: int, _x: Tensor, /) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a linear")

    def bias(self, _out0: int, _out: int, /) -> Tensor | None:
        raise TypeError(f"{type(self).__name__} is not a linear")

    def norm(self, _x: Tensor, _weight: Tensor, _bias: Tensor | None, /) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a norm")

    def norm_change(self, _x: Tensor, _change: Tensor, /) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a norm")

    def inner(self, _rows: slice, /) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a block")

    def normed(self, _x: Tensor, /) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a block")


@dataclass(eq=False)
class BlockHook(_Asked):
    """A sublayer's output, before the residual is added. ``after`` is the norm of post-norm backbones."""

    hooks: Hooks
    group: SiteGroup
    site: Site
    after: nn.Module | None
    residual: Tensor | None = None
    entered: Tensor | None = None

    def start(self, path: str, x: Tensor) -> None:
        """Remembers what a module of the sublayer was given, by the module's path."""
        if path == self.site.residual:
            self.residual = x
        if path == self.site.inner:
            self.entered = x

    def apply(self, plan: Plan, rows: Tensor) -> None:
        """Applies the batch's steps to the sublayer's output ``[tokens, hidden]``."""
        if self.residual is None:
            raise RuntimeError(
                f"{self.site.name}: the residual is not known: {self.site.residual} did not run"
            )
        plan.apply(self.group.index, self.residual.reshape(-1, self.residual.shape[-1]), rows, self)

    def inner(self, rows: slice, /) -> Tensor:
        if self.entered is None:
            raise RuntimeError(f"{self.site.name}: its input is not known: {self.site.inner} did not run")
        return self.entered.reshape(-1, self.entered.shape[-1])[rows]

    def normed(self, x: Tensor, /) -> Tensor:
        if self.after is None:
            return x
        plain: Tensor = type(self.after).__mro__[2].forward(self.after, x)  # type: ignore[attr-defined]
        return plain


@dataclass(eq=False)
class GroupHook(_Asked):
    """One pass over a group: the base's linears at once, then every row's steps, then the block's.

    The first member computes, the others fetch: Hugging Face's modules call them in turn with one input. ``starts``
    are the blocks whose input or residual this group's input is.
    """

    hooks: Hooks
    group: SiteGroup
    members: list[nn.Module]
    packed: Packed
    block: BlockHook | None
    starts: list[BlockHook]
    last_input: Tensor | None = None
    last_parts: Sequence[Tensor] = ()
    pending: int = field(default=0)

    def member(self, j: int, x: Tensor) -> Tensor:
        """Member j's share of the group's output for ``x`` ``[..., in]``."""
        sites = self.group.sites
        if j == 0:
            y = self.whole(x)
            if len(sites) == 1:
                return y
            # by one operation, hence with one gradient for all of them
            self.last_parts = torch.split(y, [site.out_features for site in sites], dim=-1)
            self.last_input, self.pending = x, len(sites) - 1
        elif x is not self.last_input:
            raise RuntimeError(f"{sites[j].path} was called with another input than its group's first member")
        else:
            self.pending -= 1
        part = self.last_parts[j]
        if self.pending == 0:
            self.last_input, self.last_parts = None, ()
        return part

    def whole(self, x: Tensor) -> Tensor:
        """The outputs of all members side by side, ``[..., out]``, with the batch's steps applied."""
        for block in self.starts:
            block.start(self.group.sites[0].path, x)
        plan = self.hooks.active(self.group)
        block_plan = None if self.block is None else self.hooks.active(self.block.group)
        if plan is None and block_plan is None:
            self.fed = False
            return self.packed(x)
        rows_in = x.reshape(-1, x.shape[-1])
        given = rows_in if plan is None else plan.feed(self.group.index, rows_in, self.group.out_features)
        self.fed = given is not rows_in
        y = self.packed(given)  # no view: a gradient through steps on a view copies all of it for each
        if plan is not None:
            plan.apply(self.group.index, rows_in, y, self)
        if block_plan is not None and self.block is not None:
            self.block.apply(block_plan, y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def linear(self, out0: int, out: int, x: Tensor, /) -> Tensor:
        member, columns = self._member_at(out0, out)
        return F.linear(x, weight_of(member)[columns], self.bias(out0, out))

    def bias(self, out0: int, out: int, /) -> Tensor | None:
        member, columns = self._member_at(out0, out)
        bias = bias_of(member)
        return None if bias is None else bias[columns]

    def _member_at(self, out0: int, out: int) -> tuple[nn.Module, slice]:
        """The module that makes these columns of the group's output, and which of its own they are."""
        j = max(j for j, offset in enumerate(self.group.offsets) if offset <= out0)
        start = out0 - self.group.offsets[j]
        return self.members[j], slice(start, start + out)


def group_hook(linear: nn.Module) -> GroupHook:
    """The hook of a linear that :func:`deltas.attach.attach` has hooked, and of the others in its group."""
    hook: GroupHook = linear._deltaserve_hook  # type: ignore[assignment]
    return hook


@dataclass(eq=False)
class NormHook(_Asked):
    """A layer or RMS norm. ``block`` is the one whose residual its input is, ``closes`` the one whose sum it norms,
    ``ends`` the one whose output is this norm's."""

    hooks: Hooks
    group: SiteGroup
    module: nn.Module
    block: BlockHook | None = None
    closes: BlockHook | None = None
    ends: BlockHook | None = None

    def __post_init__(self) -> None:
        name = type(self.module).__name__
        self._centred = name in _CENTRED_NORMS
        eps = getattr(self.module, "eps" if self._centred else "variance_epsilon", None)
        self._eps = None if eps is None else float(eps)
        self._by_kernel = name in _RMS_NORMS and self._eps is not None

    def __call__(self, x: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """The norm of ``x`` ``[..., n]``; ``own`` is the module's own computation."""
        site = self.group.sites[0]
        if self.block is not None:
            self.block.start(site.path, x)
        kernels, width = self.hooks.rows, x.shape[-1]
        if kernels is not None and self._by_kernel and self._eps is not None and not torch.is_grad_enabled():
            y = x.new_empty(x.shape)
            kernels.rms_norm(x.reshape(-1, width), self.module.weight, self._eps, y.view(-1, width))  # type: ignore[arg-type]
        else:
            y = own(x)
        plan = self.hooks.active(self.group)
        if plan is not None:
            for given, gave in _heads(x, y, site.heads_axis):
                plan.apply(self.group.index, given.reshape(-1, width), gave.view(-1, width), self)
        block_plan = None if self.ends is None else self.hooks.active(self.ends.group)
        if block_plan is not None and self.ends is not None:
            self.ends.apply(block_plan, y.view(-1, width))
        return y

    def inner(self, rows: slice, /) -> Tensor:
        if self.closes is None:
            raise RuntimeError(f"{self.group.sites[0].name} follows no block")
        return self.closes.inner(rows)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        if isinstance(self.module, nn.LayerNorm):
            if weight.dim() == 1:
                return F.layer_norm(x, self.module.normalized_shape, weight, bias, self.module.eps)
            plain = F.layer_norm(x.float(), self.module.normalized_shape, None, None, self.module.eps)
            scaled = plain * weight.float()
            return (scaled if bias is None else scaled + bias.float()).to(x.dtype)
        if self._centred:
            return (self._normal(x) * (1.0 + weight.float())).to(x.dtype)
        return weight * self._normal(x).to(x.dtype)

    def norm_change(self, x: Tensor, change: Tensor, /) -> Tensor:
        if self._centred:
            return (self._normal(x) * change.float()).to(x.dtype)
        return self.norm(x, change, None)

    def _normal(self, x: Tensor) -> Tensor:
        """``x`` divided by its root mean square, float32."""
        if self._eps is None:
            raise TypeError(f"{type(self.module).__name__} is no norm that is known here")
        wide = x.to(torch.float32)
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)


def _heads(x: Tensor, y: Tensor, axis: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a norm was given and gave, of whole tokens, or head by head: rows of one batch's tokens either way."""
    if axis == 0:
        yield x, y
        return
    for head in range(x.shape[axis]):
        yield x.select(axis, head), y.select(axis, head)


@dataclass(eq=False)
class EmbeddingHook(_Asked):
    """An embedding: its input is token ids."""

    hooks: Hooks
    group: SiteGroup

    def __call__(self, ids: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """The embeddings of ``ids`` ``[...]``; ``own`` is the module's own computation."""
        y = own(ids)
        plan = self.hooks.active(self.group)
        if plan is not None:
            plan.apply(self.group.index, ids.reshape(-1), y.view(-1, y.shape[-1]), self)
        return y
