"""Makes a loaded Hugging Face model delta-aware, without changing its weights or its state-dict keys.

Each linear, norm and embedding that has a site becomes an instance of a subclass of its own class
(``module.__class__ = ...``), so the modelling code stays Hugging Face's and only the leaves change. A forward pass is
told the batch's plan through one shared :class:`Hooks` object; with no plan the model computes exactly what it did.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltas.errors import UnsupportedBackbone
from deltas.groups import SiteGroup, site_groups
from deltas.hooks import BlockHook, EmbeddingHook, GroupHook, Hooks, NormHook, Packed
from deltas.ops import Ops
from deltas.sites import BackboneSpec, Site, SiteKind


class _DeltaLinear:
    """Mixin put before a linear's own class."""

    _deltaserve_hook: GroupHook
    _deltaserve_member: int

    def forward(self, x: Tensor) -> Tensor:
        return self._deltaserve_hook.member(self._deltaserve_member, x)


class _DeltaNorm:
    """Mixin put before a norm's own class."""

    _deltaserve_hook: NormHook

    def forward(self, x: Tensor) -> Tensor:
        return self._deltaserve_hook(x, super().forward)  # type: ignore[misc]


class _DeltaEmbedding(nn.Embedding):
    """Put behind an embedding's own class, where that has a factor (Gemma's) or an offset (OPT's positions): what is
    changed is the table, and the ids are its rows."""

    _deltaserve_hook: EmbeddingHook

    def forward(self, ids: Tensor) -> Tensor:
        return self._deltaserve_hook(ids, super().forward)


_CLASSES: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, mixin: type, hook: Any) -> None:
    """Changes the module's class in place. A plain attribute holds the hook, so the state dict does not see it."""
    cls = type(module)
    if (mixin, cls) not in _CLASSES:
        behind = mixin is _DeltaEmbedding and cls is not nn.Embedding
        _CLASSES[(mixin, cls)] = type(f"Delta{cls.__name__}", (cls, mixin) if behind else (mixin, cls), {})
    module.__class__ = _CLASSES[(mixin, cls)]
    object.__setattr__(module, "_deltaserve_hook", hook)


def attach(model: nn.Module, spec: BackboneSpec, ops: Ops, *, prepack: bool = True) -> Hooks:
    """Hooks every site of ``spec`` in ``model`` (in evaluation mode) and returns what the passes share.

    ``prepack`` keeps a second, reordered copy of the linears' weights where that is faster (CPU), and lays fused
    groups side by side elsewhere. Raises :class:`UnsupportedBackbone` if the model lacks a module of the table.
    """
    hooks = Hooks(ops)
    groups = site_groups(spec)
    modules = dict(model.named_modules())
    absent = [
        site.path
        for g in groups
        for site in g.sites
        if g.kind is not SiteKind.BLOCK and site.path not in modules
    ]
    if absent:
        raise UnsupportedBackbone(f"the model has no module {absent[0]}", field=absent[0])
    blocks = {g.sites[0].path: _block(hooks, g, modules) for g in groups if g.kind is SiteKind.BLOCK}
    residuals = {hook.site.residual: hook for hook in blocks.values()}
    inners = {hook.site.inner: hook for hook in blocks.values()}
    norms = {hook.site.norm: hook for hook in blocks.values() if hook.site.norm}
    for group in groups:
        first = group.sites[0]
        if group.kind is SiteKind.NORM:
            norm = modules[first.path]
            hook = NormHook(
                hooks,
                group,
                norm,
                block=residuals.get(first.path),
                closes=norms.get(first.path),
                ends=blocks.get(first.path),
            )
            _become(norm, _DeltaNorm, hook)
        elif group.kind is SiteKind.EMBEDDING:
            _become(modules[first.path], _DeltaEmbedding, EmbeddingHook(hooks, group))
        elif group.kind is SiteKind.LINEAR:
            members = [modules[site.path] for site in group.sites]
            linear = GroupHook(
                hooks,
                group,
                members,
                Packed.of(members, prepack=prepack, kernels=ops.kernels),
                block=blocks.get(group.sites[-1].path),
                starts=[b for b in (residuals.get(first.path), inners.get(first.path)) if b is not None],
            )
            for j, member in enumerate(members):
                _become(member, _DeltaLinear, linear)
                object.__setattr__(member, "_deltaserve_member", j)
    return hooks


def _block(hooks: Hooks, group: SiteGroup, modules: dict[str, nn.Module]) -> BlockHook:
    site: Site = group.sites[0]
    return BlockHook(hooks, group, site, modules[site.norm] if site.norm else None)
