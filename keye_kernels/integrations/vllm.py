"""Our ops as layers of vLLM's models.

    VLLM_PLUGINS=keye_kernels vllm serve <any model>

vLLM builds our subclasses of its layers: they keep weights, names and sharding, and call our ops.
This changes every model vLLM serves, so it happens only if VLLM_PLUGINS names this plugin.
`report(model)` tells which layers were replaced and why the others were not. The Keye models of
`keye_model.integrations.vllm` are always built with these layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import vllm
from torch import nn
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from keye_kernels import _backends, backends, mrope_, rms_norm, silu_mul, varlen_attention

PLUGIN = "keye_kernels"
# Releases of vLLM that are supported: its layers have no stable interface.
RELEASES = ("0.32", "0.33")

logger = init_logger(f"vllm.{__name__}")  # the handler of the logger "vllm" prints it


class KeyeEncoderAttention(MMEncoderAttention):
    """Attention of vision encoders: all images of a call in one packed launch."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if self.fp8_enabled:
            raise NotImplementedError(
                "mm_encoder_attn_dtype must not be 'fp8' with the attention of keye_kernels"
            )
        if self.head_size % 8 or self.head_size > 256:
            raise NotImplementedError(
                "head_size of an encoder must be a multiple of 8 up to 256 with the attention of "
                f"keye_kernels, got {self.head_size}"
            )

    @torch.no_grad()  # on a CPU, vLLM measures the memory of a step with gradients enabled
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | int | None = None,
        sequence_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            query: [batch_size, seqlen, num_heads * head_size], or with the last dim split in two.
            key, value: The same, with num_kv_heads and a seqlen of their own.
            cu_seqlens: [num_sequences + 1], where each sequence of the flattened batch starts.
                None: each row of the batch is one.
            max_seqlen: Upper bound of their lengths. None and 0, which vLLM passes its own PyTorch
                backend, mean unknown. A GPU tensor is read back, as in vLLM's backends.
            sequence_lengths: Not read; for another backend.

        Returns:
            A tensor like query.
        """
        del sequence_lengths
        q = query.reshape(-1, self.num_heads, self.head_size)
        k = key.reshape(-1, self.num_kv_heads, self.head_size)
        v = value.reshape(-1, self.num_kv_heads, self.head_size)
        if cu_seqlens is None:
            cu_seqlens_q, cu_seqlens_k = (
                torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[1]
                for x in (query, key)
            )
            max_seqlen_q, max_seqlen_k = query.shape[1], key.shape[1]
        else:
            cu_seqlens_q = cu_seqlens_k = cu_seqlens.to(torch.int32)
            # torch.compile cannot read the value of a tensor.
            unknown = max_seqlen is None or torch.compiler.is_compiling()
            known = 0 if unknown else int(max_seqlen)
            max_seqlen_q = max_seqlen_k = known or len(q)
        out = varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale=self.scale,
        )  # fmt: skip
        return out.view(query.shape)

    # Skip what vLLM prepares for its FlashInfer backend: our op takes plain cu_seqlens.

    @classmethod
    def maybe_compute_seq_lens(cls, *_args: object, **_kwargs: object) -> None:
        return None

    @classmethod
    def maybe_recompute_cu_seqlens(
        cls, _attn_backend: AttentionBackendEnum, *args: object, **kwargs: object
    ) -> torch.Tensor:
        plain = AttentionBackendEnum.TORCH_SDPA
        return super().maybe_recompute_cu_seqlens(plain, *args, **kwargs)


class KeyeRMSNorm(RMSNorm):
    """RMSNorm with a weight over all channels; adds the residual in the same pass."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if not self.has_weight:
            _keep(self, "it has no weight")
        elif self.variance_size_override is not None:
            _keep(self, "it takes the variance of a part of the channels")
        elif self.weight.dtype != torch.get_default_dtype():
            _keep(self, f"its weight is {self.weight.dtype}, unlike the model")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [..., hidden_size]. Returns norm(x), or (norm of the sum, the sum)."""
        if kept_because(self):
            return super().forward(x, residual)
        rows = x.reshape(-1, self.hidden_size)  # copies heads that are slices of a packed qkv
        weight = self.weight.data  # under torch.compile the parameter would require gradients
        if residual is None:
            return rms_norm(rows, weight, self.variance_epsilon).view(x.shape)
        residual = residual.reshape(rows.shape)
        y, total = rms_norm(rows, weight, self.variance_epsilon, residual=residual)
        return y.view(x.shape), total.view(x.shape)


class KeyeSiluAndMul(SiluAndMul):
    """silu(gate) * up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., 2 * intermediate_size], gate first. Returns [..., intermediate_size]."""
        return silu_mul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], x.shape[-1] // 2)


class KeyeMRotaryEmbedding(MRotaryEmbedding):
    """3D RoPE of q and k in one launch, in place, with angles in fp32 instead of a bf16 table."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if self.mrope_section is None:
            _keep(self, "it has no mrope_section")
        elif self.scaling_factor is not None:
            _keep(self, "its frequencies are scaled (YaRN)")
        elif self.rotary_dim != self.head_size or not self.is_neox_style:
            _keep(self, "it turns a part of the channels, or adjacent pairs")

    def forward(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate query and key [num_tokens, heads * head_size] by positions [3, num_tokens].

        Positions [num_tokens] are used for all three axes.

        Raises:
            NotImplementedError: There is no key, or there are offsets.
        """
        if kept_because(self):
            return super().forward(positions, query, key, offsets)
        if key is None or offsets is not None:
            raise NotImplementedError("the 3D RoPE of keye_kernels takes a key and no offsets")
        mrope_(
            query.view(query.shape[0], -1, self.head_size),
            key.view(key.shape[0], -1, self.head_size),
            positions if positions.dim() == 2 else positions.expand(3, -1).contiguous(),
            mrope_section=self.mrope_section,
            theta=self.base,
            interleaved=self.mrope_interleaved,
        )
        return query, key


@dataclass(frozen=True)
class _Replacement:
    layer: type[CustomOp]  # vLLM's
    ours: type[CustomOp]
    op: str


_REPLACEMENTS = (
    _Replacement(MMEncoderAttention, KeyeEncoderAttention, "varlen_attention"),
    _Replacement(RMSNorm, KeyeRMSNorm, "rms_norm"),
    _Replacement(SiluAndMul, KeyeSiluAndMul, "silu_mul"),
    _Replacement(MRotaryEmbedding, KeyeMRotaryEmbedding, "mrope_"),
)


def register() -> None:
    """Replace layers in every model that vLLM builds after this call; may be called again.

    vLLM calls this in each of its processes (entry point ``vllm.general_plugins``).

    Raises:
        RuntimeError: VLLM_PLUGINS names this plugin and the release of vLLM is not supported.
    """
    if PLUGIN not in (envs.VLLM_PLUGINS or ()):
        logger.info(
            "keye_kernels replaces no layers: that takes VLLM_PLUGINS=%s (with all other plugins "
            "that shall be loaded)",
            PLUGIN,
        )
        return
    check_release()
    op_registry_oot.update(_new_entries())
    for replacement in _REPLACEMENTS:
        logger.info("keye_kernels: %s: %s", replacement.layer.__name__, _state(replacement))


@contextmanager
def our_layers() -> Iterator[None]:
    """Let vLLM build our layers inside the block only."""
    check_release()
    entries = _new_entries()
    op_registry_oot.update(entries)
    try:
        yield
    finally:
        for name in entries:
            del op_registry_oot[name]


def check_release() -> None:
    """Raise RuntimeError unless the layers fit this release of vLLM."""
    if ".".join(vllm.__version__.split(".")[:2]) not in RELEASES:
        raise RuntimeError(
            f"vllm must be release {' or '.join(RELEASES)} for the plugins of keye-kernels, got "
            f"{vllm.__version__}; VLLM_PLUGINS without them runs vLLM alone"
        )


@dataclass(frozen=True)
class Row:
    """One kind of layer in a model.

    Attributes:
        layer: Name of vLLM's class.
        op: Our op that replaces it.
        replaced, modules: Number of modules that call our op, and of all modules of the class.
        note: The backend that serves the op, and why the other modules were not replaced.
    """

    layer: str
    op: str
    replaced: int
    modules: int
    note: str

    def __str__(self) -> str:
        return f"{self.layer} -> {self.op}: {self.replaced} of {self.modules} ({self.note})"


def report(model: nn.Module) -> list[Row]:
    """The layers of a vLLM model that run on our ops, to be called through `LLM.apply_model`."""
    rows = []
    for replacement in _REPLACEMENTS:
        modules = [m for m in model.modules() if isinstance(m, replacement.layer)]
        kept = [m for m in modules if not isinstance(m, replacement.ours) or kept_because(m)]
        if not modules:
            continue
        notes = {
            kept_because(m) or f"{type(m).__name__} of vLLM: {_state(replacement)}" for m in kept
        }
        if len(kept) < len(modules):
            notes.add(f"by {_served(replacement.op).backend}")
        rows.append(
            Row(
                replacement.layer.__name__,
                replacement.op,
                len(modules) - len(kept),
                len(modules),
                "; ".join(sorted(notes)),
            )
        )
    return rows


def kept_because(module: nn.Module) -> str | None:
    """Why a layer of ours runs vLLM's code, or None."""
    return getattr(module, "_keye_kernels_kept", None)


def _keep(module: nn.Module, reason: str) -> None:
    """Let a layer that our op does not serve run vLLM's code, and log the reason."""
    module._keye_kernels_kept = reason
    logger.warning_once(
        "keye_kernels does not replace one kind of %s: %s", type(module).__name__, reason
    )


def _new_entries() -> dict[str, type[CustomOp]]:
    """Our entries for vLLM's registry of replaced layers: name of vLLM's class to our class."""
    return {
        r.layer.__name__: r.ours
        for r in _REPLACEMENTS
        if r.layer.__name__ not in op_registry_oot and _obstacle(r.op) is None
    }


def _state(replacement: _Replacement) -> str:
    """What vLLM builds for this layer now, in words."""
    taken = op_registry_oot.get(replacement.layer.__name__)
    if taken is replacement.ours:
        return f"{replacement.op} by {_served(replacement.op).backend}"
    if taken is not None:
        return f"replaced by {taken.__module__}.{taken.__name__} before"
    return _obstacle(replacement.op) or "not asked for"


def _served(op: str) -> _backends.ServedBy:
    return backends(current_platform.device_type)[op]


def _obstacle(op: str) -> str | None:
    """Why our op cannot replace a layer of vLLM on this machine, or None."""
    device = current_platform.device_type
    if device not in ("cuda", "cpu"):
        return f"{op} runs on cuda and cpu tensors, not on {device}"
    served = _served(op)
    asked = _backends.requested()
    if device == "cuda" and served.backend == "reference" and asked == "auto":
        return f"only the definition of {op} runs here, which is slower than vLLM's layer: {served}"
    return None
