"""Keywords of transformers that are accepted because their values change nothing here.

Each table lists the keywords of one call that are not arguments of ours, with the values that ask
for what we do anyway. Any other value raises an error that names the keyword.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_Table = Mapping[str, Sequence[Any] | None]  # None: any value


def _each(names: str, taken: Sequence[Any] | None) -> _Table:
    """The same values for several keywords."""
    return dict.fromkeys(names.split(), taken)


_FILES: _Table = {
    **_each("trust_remote_code resume_download code_revision", None),
    **_each("cache_dir proxies token use_auth_token variant", ()),
    "force_download": (False,),
    "revision": ("main",),
    "subfolder": ("",),
    "use_safetensors": (True,),
}

# KeyeForConditionalGeneration.from_pretrained
LOADING: _Table = {
    **_FILES,
    **_each("attn_implementation _attn_implementation use_flash_attention_2", None),
    **_each("low_cpu_mem_usage weights_only", None),
    **_each("quantization_config max_memory offload_folder tp_plan config state_dict", ()),
    **_each("gguf_file", ()),
    **_each("ignore_mismatched_sizes output_loading_info load_in_8bit load_in_4bit", (False,)),
    **_each("offload_state_dict offload_buffers from_tf from_flax", (False,)),
    "use_cache": (True,),
}

# KeyeProcessor.from_pretrained
LOADING_PROCESSOR: _Table = {**_FILES, **_each("use_fast backend", None), "padding_side": ("left",)}

# KeyeProcessor.__call__
PROCESSING: _Table = {
    **_each("max_length pad_to_multiple_of", ()),
    **_each("return_attention_mask do_convert_rgb do_resize do_rescale do_normalize", (True,)),
    **_each("return_token_type_ids return_mm_token_type_ids return_overflowing_tokens", (False,)),
    **_each("return_special_tokens_mask return_offsets_mapping return_length", (False,)),
    **_each("return_row_ids do_sample_frames", (False,)),
    "add_special_tokens": None,  # the tokenizer of Keye has none to add
    "truncation": (False, "do_not_truncate"),
    "verbose": None,
    "audio": ([],),
}

# KeyeProcessor.apply_chat_template
TEMPLATING: _Table = {
    **_each("return_assistant_tokens_mask load_audio_from_video", (False,)),
    "sanitize_control_tokens": (False,),
    "truncation": (False, "do_not_truncate"),
    "max_length": (),
    "add_special_tokens": None,
    "return_attention_mask": (True,),
    "tokenizer_kwargs": ({},),
}

# KeyeForConditionalGeneration.generate
GENERATING: _Table = {
    **_each("early_stopping length_penalty diversity_penalty", None),  # for beam search only
    **_each("disable_compile return_legacy_cache use_model_defaults", None),
    "bos_token_id": None,  # for an empty prompt only
    "tokenizer": None,  # for stop_strings, which use the checkpoint's
    **_each("generation_config inputs inputs_embeds past_key_values negative_prompt_ids", ()),
    **_each("max_length max_time forced_bos_token_id forced_eos_token_id", ()),
    **_each("cache_config compile_config custom_generate streamer watermarking_config", ()),
    **_each("sequence_bias exponential_decay_length_penalty prefix_allowed_tokens_fn top_h", ()),
    **_each("dola_layers prompt_lookup_num_tokens max_matching_ngram_size", ()),
    **_each("assistant_model assistant_tokenizer", ()),
    **_each("num_beams num_beam_groups num_return_sequences", (1,)),
    **_each("typical_p guidance_scale encoder_repetition_penalty", (1,)),
    **_each("min_length min_new_tokens min_p epsilon_cutoff eta_cutoff penalty_alpha", (0,)),
    **_each("no_repeat_ngram_size encoder_no_repeat_ngram_size", (0,)),
    **_each("bad_words_ids force_words_ids constraints suppress_tokens", ([],)),
    **_each("begin_suppress_tokens logits_processor stopping_criteria", ([],)),
    **_each("renormalize_logits remove_invalid_values token_healing low_memory", (False,)),
    **_each("synced_gpus return_dict_in_generate", (False,)),
    **_each("output_attentions output_hidden_states output_scores output_logits", (False,)),
    "cache_implementation": ("dynamic", "static"),
    "use_cache": (True,),
}


def without_idle(given: Mapping[str, Any], table: _Table) -> dict[str, Any]:
    """Drop the keywords of ``table``; their values must change nothing here, as None never does.

    Raises:
        NotImplementedError: A value would change something.
    """
    for name, value in given.items():
        taken = table.get(name)
        if name not in table or taken is None or value is None:
            continue
        if not isinstance(value, (bool, int, float, str, list, dict)) or value not in taken:
            rule = " or ".join(repr(one) for one in taken if one != []) or "left out"
            raise NotImplementedError(f"{name} must be {rule}, got {value!r}")
    return {name: value for name, value in given.items() if name not in table}


def refuse(unknown: Mapping[str, Any], known: str) -> None:
    """Raise a TypeError for the first keyword, if there is one; ``known`` lists the valid ones."""
    for name in unknown:
        raise TypeError(f"unknown keyword {name!r}; known: {known}")
