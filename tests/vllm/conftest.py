"""Without vLLM, one module stands for all: it is skipped and says how to run them."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["test_layers.py", "test_processor.py"]
