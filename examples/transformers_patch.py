"""Run a vision-language model of transformers on keye_kernels, and print what was replaced.

    python examples/transformers_patch.py [model]     # a directory or a Hub id

Without a model it makes a tiny Qwen3-VL with random weights, whose answers mean nothing.
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from keye_kernels.integrations.transformers import apply, report

TINY = Qwen3VLConfig(
    text_config={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    vision_config={"hidden_size": 144, "intermediate_size": 288, "depth": 2, "num_heads": 2,
                   "out_hidden_size": 128, "deepstack_visual_indexes": [0]},
)  # fmt: skip

if len(sys.argv) > 1:
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="auto")
else:
    model = AutoModelForImageTextToText.from_config(TINY)
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

apply(model)
print(report(model))

prompt = torch.tensor([[1, 2, 3, 4]], device=model.device)
print(model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())
