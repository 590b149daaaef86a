"""Our ops inside models of Hugging Face transformers, with one line.

    from keye_kernels.integrations.transformers import apply, report, revert

    apply(model)            # this model; apply("qwen3_vl") changes the classes of a family
    print(report(model))    # what was replaced, what was not, and why
    revert(model)

Modules get another `forward` and keep everything else: weights, names, state_dict, device. Adapters
and hooks that are added later work as usual: a module whose children have been changed uses its
original forward. Ops are forward-only: call the model under `torch.inference_mode()` or
`torch.no_grad()`.
"""

import functools
import importlib
import re
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

import transformers
from torch import nn

from keye_kernels.integrations import _decoder_attention, _rotary
from keye_kernels.integrations._decoder_attention import Configured
from keye_kernels.integrations._families import Family, Replacement, families, refuse_attention
from keye_kernels.integrations._guard import FORWARDS, OURS, why_called
from keye_kernels.integrations._report import Report, Row
from keye_kernels.integrations._subclass import put, subclass, take_back

_MAJOR, _MINOR = (
    int(part) for part in re.match(r"(\d+)\.(\d+)", transformers.__version__).groups()
)
_DECODER_ATTENTION = "varlen_attention"
_MARK = "_keye_kernels_replaces"  # attribute of our forwards: the original forward
_ROTATE = {"mrope_": _rotary.rotate_decoder, "rope_2d_": _rotary.rotate_vision}


def apply(model_or_family: nn.Module | str, *, ops: Collection[str] | None = None) -> None:
    """Let a model, or all models of a family, run on our ops.

    Args:
        model_or_family: A model or a part of one, and only that is changed. Or the name of a family
            ("paddleocr_vl", "qwen2_5_vl", "qwen3_vl", "siglip2", "qwen3"): its classes are changed,
            so all its models, also those built later. In a model with parts of several families
            (a SigLIP2 tower before a Qwen3 decoder) all are changed. Decoder attention is changed
            in models only; models of a family take ``attn_implementation="keye_kernels"``.
        ops: Names of the ops to use. None: all that the family can use.

    Raises:
        ValueError: The family or an op is unknown; or our op does not serve the configuration of a
            module (the message names both).
        RuntimeError: The release of transformers is not supported; or the model, its family or a
            part of it is changed already: `revert` first; or a module has a forward of its own
            (hooks of accelerate): apply before they are added.
    """
    _check_release()
    if isinstance(model_or_family, str):
        family, modeling = _family(model_or_family)
        chosen = _chosen([family], ops)
        if _is_family_changed(family, modeling):
            raise RuntimeError(f"{model_or_family!r} is changed already; call revert first")
        for replacement, cls in _available(family.replacements, modeling):
            if chosen.issuperset(replacement.ops) and _owned(cls, modeling):
                cls.forward = FORWARDS[cls] = _checked(replacement, modeling, cls.forward)
        _install(family, modeling, chosen)
        return

    found = _families_of(model_or_family)
    chosen = _chosen([family for family, _ in found], ops)
    for family, modeling in found:
        if _is_family_changed(family, modeling):
            name = modeling.__name__.split(".")[2]
            raise RuntimeError(f"the family {name!r} of the model is changed already")
    planned = [
        (name, module, replacement, modeling)
        for family, modeling in found
        for replacement, cls in _available(family.in_models, modeling)
        if chosen.issuperset(replacement.ops)
        for name, module in _of_class(model_or_family, cls)
    ]
    decoders = [
        named
        for family, modeling in found
        if family.decoder and _DECODER_ATTENTION in chosen
        for named in _of_class(model_or_family, getattr(modeling, family.decoder[0]))
    ]
    if any(_is_ours(module) for module in model_or_family.modules()):
        raise RuntimeError("the model, or a part of it, is changed already; call revert first")
    for name, module in decoders:  # all is checked before anything is changed
        _refuse(name, module, refuse_attention(module), (_DECODER_ATTENTION,))
    for name, module, replacement, _ in planned:
        _refuse(name, module, replacement.refuse(module), replacement.ops)
        if "forward" in vars(module) and not _is_plain(module):
            raise RuntimeError(
                f"{_called(name)}{type(module).__name__} must have the forward of its class, got "
                "one of its own (hooks of accelerate, for several devices or offloading); apply "
                "before it is added"
            )
    for _, module, _, modeling in planned:
        put(module, _ours(modeling.__name__, type(module).__name__))
    for family, modeling in found:
        _install(family, modeling, chosen)
    for _, module in decoders:
        module.config = Configured(module.config)


def revert(model_or_family: nn.Module | str) -> None:
    """Undo `apply` with the same argument.

    Raises:
        ValueError: The family is unknown.
        RuntimeError: There is nothing to undo.
    """
    if isinstance(model_or_family, str):
        family, modeling = _family(model_or_family)
        if not _is_family_changed(family, modeling):
            raise RuntimeError(f"{model_or_family!r} is not changed; call apply first")
        for replacement in family.replacements:
            cls, _ = _resolve(replacement, modeling)
            if _is_marked(cls.forward):
                cls.forward = FORWARDS[cls] = getattr(cls.forward, _MARK)
        return
    changed = [module for module in model_or_family.modules() if _is_ours(module)]
    if not changed:
        raise RuntimeError("the model itself is not changed; call apply first")
    for module in changed:
        if type(module) not in OURS and _has_our_class(module):
            raise RuntimeError(
                f"{type(module).__name__} must have the class that apply gave it, got another made "
                "from it; remove its parametrizations or wrappers, then call revert"
            )
    for module in changed:
        if type(module) in OURS:
            take_back(module)
        config = vars(module).get("config")
        if isinstance(config, Configured):
            module.config = config.original


def report(model_or_family: nn.Module | str) -> Report:
    """Tell, for each class of a model or family, how many modules run on our ops, and why not.

    Raises:
        ValueError: The family is unknown, or the model has no part of a family served.
        RuntimeError: The release of transformers is not supported.
    """
    _check_release()
    if isinstance(model_or_family, str):
        family, modeling = _family(model_or_family)
        return Report(model_or_family, tuple(_rows(family, modeling, None)))
    rows = [
        row
        for family, modeling in _families_of(model_or_family)
        for row in _rows(family, modeling, model_or_family)
    ]
    return Report(type(model_or_family).__name__, tuple(rows))


def _rows(family: Family, modeling: ModuleType, model: nn.Module | None) -> Iterator[Row]:
    def modules_of(cls: type) -> list[tuple[str, nn.Module]]:
        return [] if model is None else list(_of_class(model, cls))

    for replacement in family.replacements:
        cls, why_not = _resolve(replacement, modeling)
        if cls is None:
            continue
        modules, reasons = modules_of(cls), []
        if model is None:
            replaced = int(_is_marked(cls.forward))
        elif not modules:
            continue
        else:
            own = [(name, _own_forward(module, replacement, modeling)) for name, module in modules]
            replaced = [why for _, why in own].count(None)
            reasons = [f"{_called(name)}{why}" for name, why in own if why]
        note = replacement.note
        if replaced < (len(modules) or 1):
            note = reasons[0] if reasons else why_not or "not asked for"
            if model is None and not why_not and not _owned(cls, modeling):
                note = f"shared with {cls.__module__.split('.')[2]}; apply to a model changes it"
        yield Row(cls.__name__, replacement.ops, replaced, len(modules) or 1, note)
    if family.decoder:
        cls, name = getattr(modeling, family.decoder[0]), _decoder_attention.NAME
        modules = modules_of(cls)
        asked = [module.config._attn_implementation for _, module in modules]
        replaced = asked.count(name)
        if modules or model is None:
            note = _decoder_attention.NOTE
            if not replaced:
                note = f"attn_implementation={name!r} is not asked for"
                if "eager" in asked:
                    note = "attn_implementation='eager' keeps its own, which returns weights"
            yield Row(cls.__name__, (_DECODER_ATTENTION,), replaced, len(modules) or 1, note)
    for part, why_not in family.left.items():
        cls = getattr(modeling, part, None)
        modules = 0 if cls is None else 1 if model is None else len(modules_of(cls))
        if modules:
            yield Row(part, (), 0, modules, why_not)


def _own_forward(module: nn.Module, replacement: Replacement, modeling: ModuleType) -> str | None:
    """Why the module runs the library's forward ("" if `apply` never changed it); None if ours."""
    ours = type(module).forward
    if not _is_marked(ours) and type(module) not in OURS:
        return ""
    if "forward" in vars(module):  # accelerate keeps the forward that its hooks wrap
        inner = vars(module).get("_old_forward", module.forward)
        if getattr(inner, "__func__", None) is not ours:
            return "a forward of its own"
    known = [
        (path, [getattr(modeling, kind, None) if isinstance(kind, str) else kind for kind in kinds])
        for path, kinds in replacement.parts
    ]
    return why_called(module, known)


def _check_release() -> None:
    if not ((_MAJOR, _MINOR) == (4, 57) or (_MAJOR == 5 and _MINOR >= 17)):
        raise RuntimeError(
            f"transformers must be 4.57, or 5 from 5.17 on, got {transformers.__version__}"
        )


def _family(name: str) -> tuple[Family, ModuleType]:
    known = {k: family for k, family in families(_MAJOR).items() if family.since <= _MAJOR}
    if name not in known:
        raise ValueError(
            f"model_or_family must be a model or one of {', '.join(known)} with transformers "
            f"{transformers.__version__}, got {name!r}"
        )
    return known[name], importlib.import_module(f"transformers.models.{known[name].modeling}")


def _families_of(model: nn.Module) -> list[tuple[Family, ModuleType]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_or_family must be a model or a name, got {type(model).__name__}")
    modules = {type(module).__module__ for module in model.modules()}
    names = [
        name
        for name, family in families(_MAJOR).items()
        if f"transformers.models.{family.modeling}" in modules
    ]
    if not names:
        raise ValueError(
            "model_or_family must have parts of one of the families "
            f"{', '.join(families(_MAJOR))}, got {type(model).__name__}"
        )
    return [_family(name) for name in names]


def _chosen(found: list[Family], ops: Collection[str] | None) -> set[str]:
    known = {op for family in found for row in family.replacements for op in row.ops}
    known |= {_DECODER_ATTENTION for family in found if family.decoder}
    if ops is not None and (isinstance(ops, str) or not ops or set(ops) - known):
        raise ValueError(f"ops must hold names from {', '.join(sorted(known))}, got {ops!r}")
    return known if ops is None else set(ops)


def _resolve(replacement: Replacement, modeling: ModuleType) -> tuple[type | None, str | None]:
    """The class in this release, and why it cannot be replaced here."""
    for name in replacement.classes:
        cls = getattr(modeling, name, None)
        if cls is not None:
            return cls, replacement.missing(cls)
    return None, None


def _available(
    rows: tuple[Replacement, ...], modeling: ModuleType
) -> Iterator[tuple[Replacement, type]]:
    for replacement in rows:
        cls, why_not = _resolve(replacement, modeling)
        if cls is None:
            raise RuntimeError(
                f"transformers must have a class {replacement.classes[0]} in {modeling.__name__}, "
                f"got none in {transformers.__version__}"
            )
        if why_not is None:
            yield replacement, cls


def _owned(cls: type, modeling: ModuleType) -> bool:
    """Whether the class is the family's own, so that changing it affects no other family."""
    return cls.__module__ == modeling.__name__


def _of_class(model: nn.Module, cls: type) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if OURS.get(type(module), type(module)) is cls:
            yield name, module


def _called(name: str) -> str:
    """The name of a module as the prefix of a message."""
    return f"{name}: " if name else ""


def _refuse(name: str, module: nn.Module, why: str | None, ops: tuple[str, ...]) -> None:
    if why is not None:
        left_out = " or ".join(map(repr, ops))
        raise ValueError(
            f"{_called(name)}{why} in {type(module).__name__}; leave {left_out} out of ops"
        )


@functools.cache
def _ours(modeling: str, name: str) -> type:
    """Our subclass of the class ``name`` of a modeling module; unpickling calls this too."""
    _check_release()
    module = importlib.import_module(modeling)
    for family in families(_MAJOR).values():
        if f"transformers.models.{family.modeling}" != modeling:
            continue
        for replacement, cls in _available(family.in_models, module):
            if cls.__name__ == name:
                _install(family, module, set(replacement.ops))
                original = getattr(cls.forward, _MARK, cls.forward)
                forward = replacement.make(module, original)
                return subclass(cls, forward, (_ours, modeling, name))
    raise RuntimeError(f"transformers must have a class {name} that is served in {modeling}")


def _checked(
    replacement: Replacement, modeling: ModuleType, original: Callable[..., Any]
) -> Callable[..., Any]:
    """Our forward for a whole class; it checks the module's configuration in each call."""
    inner = replacement.make(modeling, original)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _refuse("", self, replacement.refuse(self), replacement.ops)
        return inner(self, *args, **kwargs)

    setattr(forward, _MARK, original)
    return forward


def _is_marked(forward: Any) -> bool:
    return hasattr(getattr(forward, "__func__", forward), _MARK)


def _has_our_class(module: nn.Module) -> bool:
    return any(cls in OURS for cls in type(module).__mro__)


def _is_ours(module: nn.Module) -> bool:
    """Whether the module itself, not its class, is changed."""
    return _has_our_class(module) or isinstance(vars(module).get("config"), Configured)


def _is_plain(module: nn.Module) -> bool:
    # transformers 4.57 sets the class's forward on modules whose outputs it recorded.
    return getattr(module.forward, "__func__", None) is type(module).forward


def _is_family_changed(family: Family, modeling: ModuleType) -> bool:
    return any(_is_marked(cls.forward) for _, cls in _available(family.replacements, modeling))


def _install(family: Family, modeling: ModuleType, chosen: set[str]) -> None:
    """Let the rotation functions accept positions as well as cosines, once per process.

    `revert` does not undo it: callers that pass cosines are not affected.
    """
    for name, op in family.functions.items():
        function = getattr(modeling, name, None)
        if function is not None and op in chosen and not hasattr(function, _MARK):
            rotate = _ROTATE[op](function)
            setattr(rotate, _MARK, function)
            setattr(modeling, name, rotate)
