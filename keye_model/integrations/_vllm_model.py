"""Keye-VL as a vLLM model: our tower and projector over vLLM's sharded matrices, its Qwen3 decoder.

Differences from the Keye models that come with vLLM:

- all images and videos of a step go through the tower as one packed sequence, the projector too,
  and no length is read back from the device between the layers;
- pixels arrive as raw bytes;
- the temporal positions of an 8B-Preview video follow its seconds per frame and its frames share
  one origin, as in modeling_keye.py of that checkpoint;
- the unused table `packing_position_embedding` may be absent and takes no memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMRoPE,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from keye_kernels import rope_2d_
from keye_kernels.integrations.vllm import KeyeEncoderAttention, our_layers, report
from keye_model.checkpoint.config import KeyeConfig, KeyeVisionConfig
from keye_model.checkpoint.weights import published_name
from keye_model.inputs.positions import rope_positions
from keye_model.inputs.request import Grid, host_grid, num_patches
from keye_model.integrations._vllm_processor import (
    KeyeDummyInputsBuilder,
    KeyeMultiModalProcessor,
    KeyeProcessingInfo,
)
from keye_model.network.features import vision_features
from keye_model.network.projector import KeyeProjector
from keye_model.network.vision import KeyeVisionModel, VisionAttention, VisionLayout

logger = init_logger(f"vllm.{__name__}")  # the handler of the logger "vllm" prints it

_TEXT = -1  # the id of every token that no picture or video fills


class TowerAttention(VisionAttention):
    """The tower's attention, with its heads split between the processes.

    If `our_layers` has not replaced vLLM's attention layer, that one is called.
    """

    def __init__(
        self, config: KeyeVisionConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.qkv_proj = QKVParallelLinear(
            hidden,
            self.head_dim,
            config.num_attention_heads,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.out_proj = RowParallelLinear(
            hidden,
            hidden,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
            return_bias=False,
        )
        self.num_heads = self.qkv_proj.num_heads
        self.attn = MMEncoderAttention(self.num_heads, self.head_dim, prefix=f"{prefix}.attn")

    def forward(self, x: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        """x: [num_patches, hidden_size]. Returns a tensor like x."""
        if isinstance(self.attn, KeyeEncoderAttention):
            return super().forward(x, layout)  # the same op, with the schedule all layers share
        qkv = self.qkv_proj(x).view(1, -1, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        rope_2d_(q[0], k[0], layout.positions, theta=self.theta)
        longest = torch.tensor(layout.max_seqlen)  # on the host, so no backend waits for the device
        x = self.attn(q, k, v, cu_seqlens=layout.cu_seqlens, max_seqlen=longest)
        return self.out_proj(x[0].flatten(1))


class Tower(KeyeVisionModel):
    """The vision tower over vLLM's matrices."""

    def __init__(
        self, config: KeyeConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config)
        vision = config.vision_config
        for i, layer in enumerate(self.layers):
            name = f"{prefix}.layers.{i}"
            layer.self_attn = TowerAttention(vision, quant_config, f"{name}.self_attn")
            layer.mlp.fc1, layer.mlp.fc2 = _column_and_row(
                (vision.hidden_size, vision.intermediate_size, vision.hidden_size),
                quant_config,
                (f"{name}.mlp.fc1", f"{name}.mlp.fc2"),
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        fused = {f".{part}_proj": (".qkv_proj", part) for part in "qkv"}
        mapper = WeightsMapper(orig_to_new_stacked=fused)
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)


class Projector(KeyeProjector):
    """The projector over vLLM's matrices."""

    def __init__(
        self, config: KeyeConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config)
        merged = config.vision_config.hidden_size * self.merge_size**2
        self.linear_1, self.linear_2 = _column_and_row(
            (merged, merged, config.text_config.hidden_size),
            quant_config,
            (f"{prefix}.linear_1", f"{prefix}.linear_2"),
        )


def _column_and_row(
    widths: tuple[int, int, int], quant_config: QuantizationConfig | None, names: tuple[str, str]
) -> tuple[ColumnParallelLinear, RowParallelLinear]:
    """Two linear layers with biases; the width between them is split between the processes."""
    outer, inner, last = widths
    shared = {"quant_config": quant_config, "return_bias": False}
    return (
        ColumnParallelLinear(outer, inner, prefix=names[0], **shared),
        RowParallelLinear(inner, last, prefix=names[1], **shared),
    )


@MULTIMODAL_REGISTRY.register_processor(
    KeyeMultiModalProcessor, info=KeyeProcessingInfo, dummy_inputs=KeyeDummyInputsBuilder
)
class KeyeForConditionalGeneration(
    nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP, SupportsMRoPE
):
    """Keye-VL-8B-Preview and 1.5, which differ in `config.variant`."""

    packed_modules_mapping = {  # noqa: RUF012 - vLLM's shape
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "visual.vision_model.embeddings.packing_position_embedding.": None,
            "visual.vision_model.head.": None,
            "visual.vision_model.embeddings.": "visual.",
            "visual.vision_model.encoder.": "visual.",
            "visual.vision_model.": "visual.",
            "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config, quant_config = vllm_config.model_config, vllm_config.quant_config
        self.config = model_config.hf_config  # vLLM's mixins read it
        self.keye_config = _keye_config(
            self.config.to_dict(), model_config.hf_image_processor_config or {}
        )
        with our_layers():
            with self._mark_tower_model(vllm_config, {"image", "video"}):
                self.visual = Tower(self.keye_config, quant_config, maybe_prefix(prefix, "visual"))
                self.mlp_AR = Projector(
                    self.keye_config, quant_config, maybe_prefix(prefix, "mlp_AR")
                )
            with self._mark_language_model(vllm_config):
                self.language_model = init_vllm_registered_model(
                    vllm_config=vllm_config,
                    prefix=maybe_prefix(prefix, "language_model"),
                    architectures=["Qwen3ForCausalLM"],
                )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.requires_grad_(False)  # on a CPU, vLLM measures memory with gradients enabled

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        del i
        if modality not in ("image", "video"):
            raise ValueError(f"modality must be 'image' or 'video', got {modality!r}")
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"

    def embed_multimodal(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
        **unused: object,
    ) -> MultiModalEmbeddings:
        """Features of the images or videos of a step, one tensor for each.

        Args:
            pixel_values, pixel_values_videos: [num_patches, 3, patch, patch] uint8.
            image_grid_thw, video_grid_thw: [num_rows, 3], on the host.
            num_rows: [num_videos], rows of video_grid_thw that each video has, on the host.
            unused: Values that only the prompt needs.

        Returns:
            For each item [num_tokens, text hidden_size].
        """
        del unused
        images = host_grid("image_grid_thw", image_grid_thw)
        videos = host_grid("video_grid_thw", video_grid_thw)
        features: list[torch.Tensor] = []
        if images:
            features += self._encode(pixel_values, images, [1] * len(images))
        if videos:
            features += self._encode(pixel_values_videos, videos, num_rows.tolist())
        return features

    def _encode(
        self, pixels: torch.Tensor, grid: Grid, rows_of_items: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Run tower and projector over all rows of `grid` and split the features by item."""
        parts = list(vision_features(self.visual, self.mlp_AR, pixels, grid))
        merged = self.mlp_AR.merge_size**2
        sizes, row = [], 0
        for count in rows_of_items:
            sizes.append(num_patches(grid[row : row + count]) // merged)
            row += count
        return torch.cat(parts).split(sizes)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Positions [3, num_tokens] of a prompt, and the next one minus num_tokens."""
        # Only tokens that a feature fills count as placeholders, whatever ids the prompt holds.
        ids = torch.full((len(input_tokens),), _TEXT)
        grids: dict[str, list[tuple[int, ...]]] = {"image": [], "video": []}
        seconds: list[float] = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            if feature.data is None:
                raise ValueError("mm_features must have their data for 3D positions, got None")
            kind, place = feature.modality, feature.mm_position
            span = ids[place.offset : place.offset + place.length]
            span[... if place.is_embed is None else place.is_embed] = getattr(
                self.keye_config, f"{kind}_token_id"
            )
            rows = feature.data[f"{kind}_grid_thw"].data.reshape(-1, 3)
            grids[kind] += [tuple(row) for row in rows.tolist()]
            if kind == "video":
                seconds.append(feature.data["seconds_bits"].data.view(torch.float32).item())
        positions, next_position = rope_positions(
            ids,
            tuple(grids["image"]),
            tuple(grids["video"]),
            seconds if self.keye_config.variant.timed_positions else (),
            self.keye_config,
        )
        return positions, next_position - len(input_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **unused: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Decode packed tokens; positions [3, num_tokens]."""
        del unused
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        published = ((published_name(name), tensor) for name, tensor in weights)
        loaded = AutoWeightsLoader(self).load_weights(published, mapper=self.hf_to_vllm_mapper)
        for row in report(self):
            logger.info("keye_model: %s", row)
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="mlp_AR.", tower_model="visual."
        )


def _keye_config(raw: dict, pixels: dict) -> KeyeConfig:
    """Our configuration from vLLM's, with the pixel statistics of `preprocessor_config.json`."""
    config = KeyeConfig.from_dict(raw)
    found = {key: tuple(pixels[key]) for key in ("image_mean", "image_std") if pixels.get(key)}
    return dataclasses.replace(
        config, vision_config=dataclasses.replace(config.vision_config, **found)
    )
