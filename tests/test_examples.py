"""Examples of the kernels run as they are, and give what they say."""

import runpy
from pathlib import Path

import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_varlen_attention(capsys):
    names = runpy.run_path(str(EXAMPLES / "varlen_attention.py"))
    assert capsys.readouterr().out == "attention of 3 images at head_dim 72: (1016, 16, 72)\n"
    q, k, v = (names[name].split(names["lengths"])[1].transpose(0, 1).float() for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
    out = names["out"].split(names["lengths"])[1]
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-8)
