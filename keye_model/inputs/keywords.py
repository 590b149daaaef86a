"""Keywords of transformers that are accepted because their values change nothing here.

Each table lists the keywords of one call that are not arguments of ours, with the values that ask
for what we do anyway. Any other value raises an error that names the keyword.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_Table = Mapping[str, Sequence[Any] | None]  # None: any value

_FILES: _Table = {
    "trust_remote_code": None,
    "use_safetensors": (True,),
    "resume_download": None,
    "force_download": (False,),
    "cache_dir": (),
    "proxies": (),
    "revision": ("main",),
    "code_revision": None,
    "subfolder": ("",),
    "token": (),
    "use_auth_token": (),
    "variant": (),
}

# KeyeForConditionalGeneration.from_pretrained
LOADING: _Table = _FILES | {
    "attn_implementation": None,
    "_attn_implementation": None,
    "use_flash_attention_2": None,
    "low_cpu_mem_usage": None,
    "weights_only": None,
    "use_cache": (True,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "load_in_8bit": (False,),
    "load_in_4bit": (False,),
    "quantization_config": (),
    "max_memory": (),
    "offload_folder": (),
    "offload_state_dict": (False,),
    "offload_buffers": (False,),
    "tp_plan": (),
    "config": (),
    "state_dict": (),
    "from_tf": (False,),
    "from_flax": (False,),
    "gguf_file": (),
}

# KeyeProcessor.from_pretrained
LOADING_PROCESSOR: _Table = _FILES | {"use_fast": None, "backend": None, "padding_side": ("left",)}

# KeyeProcessor.__call__
PROCESSING: _Table = {
    "truncation": (False, "do_not_truncate"),
    "max_length": (),
    "pad_to_multiple_of": (),
    "add_special_tokens": None,  # the tokenizer of Keye has none to add
    "return_attention_mask": (True,),
    "return_token_type_ids": (False,),
    "return_mm_token_type_ids": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_length": (False,),
    "return_row_ids": (False,),
    "verbose": None,
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_sample_frames": (False,),
    "audio": ([],),
}

# KeyeProcessor.apply_chat_template
TEMPLATING: _Table = {
    "return_assistant_tokens_mask": (False,),
    "truncation": (False, "do_not_truncate"),
    "max_length": (),
    "add_special_tokens": None,
    "return_attention_mask": (True,),
    "load_audio_from_video": (False,),
    "tokenizer_kwargs": ({},),
    "sanitize_control_tokens": (False,),
}

# KeyeForConditionalGeneration.generate
GENERATING: _Table = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "early_stopping": None,  # for beam search only
    "length_penalty": None,  # for beam search only
    "diversity_penalty": None,  # for beam search only
    "use_cache": (True,),
    "cache_implementation": ("dynamic", "static"),
    "cache_config": (),
    "disable_compile": None,
    "compile_config": (),
    "bos_token_id": None,  # for an empty prompt only
    "tokenizer": None,  # for stop_strings, which use the checkpoint's
    "generation_config": (),
    "inputs": (),
    "inputs_embeds": (),
    "past_key_values": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_length": (),
    "max_time": (),
    "min_p": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "low_memory": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "streamer": (),
    "logits_processor": ([],),
    "stopping_criteria": ([],),
    "prefix_allowed_tokens_fn": (),
    "negative_prompt_ids": (),
    "synced_gpus": (False,),
    "custom_generate": (),
    "return_dict_in_generate": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_legacy_cache": None,
    "use_model_defaults": None,
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
