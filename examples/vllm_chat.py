"""Keye in vLLM, on all GPUs of the machine: python examples/vllm_chat.py MODEL PICTURE [QUESTION]

It needs keye-kernels installed beside vLLM; the code is the same as for any other model.
`vllm serve MODEL --tensor-parallel-size 2` is the same as a server.
"""

import sys

import torch
from PIL import Image
from vllm import LLM, SamplingParams


def main(model: str, picture: str, question: str = "Describe this image.") -> None:
    llm = LLM(
        model,
        max_model_len=4096,
        limit_mm_per_prompt={"image": 1, "video": 0},
        tensor_parallel_size=max(torch.cuda.device_count(), 1),
    )
    content = [
        {"type": "image_pil", "image_pil": Image.open(picture)},
        {"type": "text", "text": question},
    ]
    [output] = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=64))
    print(output.outputs[0].text)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
