"""Keye-VL through transformers' Auto classes, without `trust_remote_code`.

    python examples/transformers_auto.py [model]     # a directory or a Hub id

Without a model it makes a tiny checkpoint with random weights, whose answers mean nothing.
"""

import sys
import tempfile

from PIL import Image
from transformers import AutoModel, AutoProcessor

from keye_model.demo_checkpoint import build
from keye_model.integrations.transformers import register

register()
path = sys.argv[1] if len(sys.argv) > 1 else build(tempfile.mkdtemp())
model = AutoModel.from_pretrained(path, torch_dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(path)

picture = Image.new("RGB", (168, 112), (20, 90, 160))
image = {"type": "image", "image": picture}
messages = [{"role": "user", "content": [image, {"type": "text", "text": "Describe this image."}]}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
new = output[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new, skip_special_tokens=True)[0])
