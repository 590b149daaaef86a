"""Our layers against the layers of vLLM whose place they take, and what is refused."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import custom_op
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from keye_kernels.integrations import vllm as layers
from keye_model.integrations import vllm as models


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch):
    """What vLLM's layers want around them; a registry of foreign layers of the test's own."""
    monkeypatch.setattr(custom_op, "op_registry_oot", registry := {})
    monkeypatch.setattr(layers, "op_registry_oot", registry)
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        yield


def pair(cls, *args, **kwargs):
    """A layer of vLLM, and ours as vLLM builds it, with the same weights."""
    theirs = cls(*args, **kwargs)
    with layers.our_layers():
        ours = cls(*args, **kwargs)
    assert type(theirs) is cls
    assert type(ours).__name__ == f"Keye{cls.__name__.removeprefix('MM')}"
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["heads split", "heads joined"])
@pytest.mark.parametrize(
    ("batch", "lengths", "max_seqlen"),
    [
        pytest.param(1, [5, 9, 2], torch.tensor(9), id="packed"),
        pytest.param(1, [5, 9, 2], torch.tensor(0), id="packed, longest unknown"),
        pytest.param(2, [8, 8], None, id="packed in two rows"),
        pytest.param(2, None, None, id="one sequence per row"),
    ],
)
def test_encoder_attention(batch, lengths, max_seqlen, flat):
    theirs, ours = pair(MMEncoderAttention, 4, 72, scale=0.1, num_kv_heads=2)
    qkv = torch.randn(batch, 16 // batch, 8, 72)  # q and k are views with gaps, as in the tower
    q, k, v = (x.flatten(2) if flat else x for x in qkv.split([4, 2, 2], dim=2))
    if lengths is not None:
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        want = torch.cat(
            [
                theirs(*(x.reshape(1, 16, *x.shape[2:])[:, a:b] for x in (q, k, v)))
                for a, b in itertools.pairwise(starts)
            ],
            dim=1,
        ).reshape(q.shape)
        assert_same(ours(q, k, v, starts, max_seqlen), want)
    else:
        assert_same(ours(q, k, v), theirs(q, k, v))


def test_encoder_attention_compiles():
    """In a compiled encoder the longest length cannot be read, and need not be."""
    _, ours = pair(MMEncoderAttention, 2, 72)
    q, k, v = torch.randn(3, 1, 8, 2, 72)
    starts, longest = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor(5)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(compiled(q, k, v, starts, longest), ours(q, k, v, starts, longest))


def test_encoder_attention_takes_plain_lengths():
    """Where vLLM would prepare them for FlashInfer."""
    starts = torch.tensor([0, 4, 9]).numpy()
    flashinfer = AttentionBackendEnum.FLASHINFER
    layers.op_registry_oot["MMEncoderAttention"] = layers.KeyeEncoderAttention
    cpu = torch.device("cpu")
    assert MMEncoderAttention.maybe_compute_seq_lens(flashinfer, starts, cpu) is None
    found = MMEncoderAttention.maybe_recompute_cu_seqlens(flashinfer, starts, 144, 1, cpu)
    assert found.tolist() == [0, 4, 9]


def test_encoder_attention_refuses_odd_heads():
    with (
        layers.our_layers(),
        pytest.raises(NotImplementedError, match=r"a multiple of 8 up to 256 .* got 36"),
    ):
        MMEncoderAttention(4, 36)


def test_encoder_attention_refuses_fp8(monkeypatch):
    def fp8(layer):
        layer.fp8_enabled = True

    monkeypatch.setattr(MMEncoderAttention, "_init_fp8_state", fp8)
    with layers.our_layers(), pytest.raises(NotImplementedError, match="must not be 'fp8'"):
        MMEncoderAttention(4, 72)


@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 64)], ids=["rows", "heads"])
def test_rms_norm(shape):
    theirs, ours = pair(RMSNorm, 64, eps=1e-5)
    x = torch.randn(*shape[:-1], 128)[..., :64]
    assert_same(ours(x), theirs(x.clone()))
    residual = torch.randn(shape)
    want = theirs(x.clone(), residual.clone())  # which may reuse its arguments
    for got, one in zip(ours(x, residual), want, strict=True):
        assert_same(got, one)


def test_rms_norm_keeps_what_it_does_not_serve():
    with layers.our_layers():
        norms = [RMSNorm(64, var_hidden_size=32), RMSNorm(64, has_weight=False)]
        norms.append(RMSNorm(64, dtype=torch.bfloat16))
    plain = [RMSNorm(64, var_hidden_size=32), RMSNorm(64, has_weight=False)]
    x = torch.randn(5, 64)
    for norm, other in zip(norms, plain, strict=False):
        assert_same(norm(x), other(x))
    [row] = layers.report(torch.nn.ModuleList([*norms, RMSNorm(64), GemmaRMSNorm(64)]))
    assert (row.layer, row.replaced, row.modules) == ("RMSNorm", 0, 4)
    for reason in ("part of the channels", "no weight", "bfloat16", "RMSNorm of vLLM: not asked"):
        assert reason in str(row)


def test_silu_and_mul():
    theirs, ours = pair(SiluAndMul)
    x = torch.randn(2, 3, 128)[..., :64]
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("interleaved", [False, True], ids=["contiguous", "interleaved"])
@pytest.mark.parametrize("axes", [1, 3])
def test_mrope(axes, interleaved):
    section = [8, 12, 12]
    theirs, ours = pair(
        MRotaryEmbedding, 64, 64, 128, 1e6, True, torch.float32, section, interleaved
    )
    positions = torch.randint(0, 100, (3, 7) if axes == 3 else (7,))
    q, k = torch.randn(7, 4 * 64), torch.randn(7, 2 * 64)
    want = theirs.forward_native(positions, q.clone(), k.clone())
    for got, one in zip(ours(positions, q, k), want, strict=True):
        assert_same(got, one)


def test_mrope_keeps_scaled_frequencies():
    build = (64, 64, 128, 1e6, True, torch.float32, [8, 12, 12])
    theirs, ours = pair(MRotaryEmbedding, *build, scaling_factor=4.0)
    positions, q, k = torch.randint(0, 100, (3, 7)), torch.randn(7, 128), torch.randn(7, 64)
    want = theirs.forward_native(positions, q.clone(), k.clone())
    for got, one in zip(ours(positions, q, k), want, strict=True):
        assert_same(got, one)
    assert layers.kept_because(ours) == "its frequencies are scaled (YaRN)"
    with layers.our_layers():
        partial = MRotaryEmbedding(64, 32, 128, 1e6, True, torch.float32, [4, 6, 6])
        plain = MRotaryEmbedding(64, 64, 128, 1e6, True, torch.float32)
    assert layers.kept_because(partial) == "it turns a part of the channels, or adjacent pairs"
    assert layers.kept_because(plain) == "it has no mrope_section"


def test_mrope_refuses_offsets():
    _, ours = pair(MRotaryEmbedding, 64, 64, 128, 1e6, True, torch.float32, [8, 12, 12])
    q = torch.randn(7, 64)
    with pytest.raises(NotImplementedError, match="takes a key and no offsets"):
        ours(torch.zeros(3, 7, dtype=torch.int64), q, None)


def test_layers_are_replaced_only_if_named(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    layers.register()
    assert layers.op_registry_oot == {}
    monkeypatch.setenv("VLLM_PLUGINS", "other,keye_kernels")
    layers.register()
    layers.register()  # vLLM may call it again
    assert set(layers.op_registry_oot) == {r.layer.__name__ for r in layers._REPLACEMENTS}
    with layers.our_layers():
        pass
    assert len(layers.op_registry_oot) == len(layers._REPLACEMENTS)


def test_somebody_elses_layer_stays(monkeypatch):
    class Theirs(RMSNorm):
        pass

    monkeypatch.setenv("VLLM_PLUGINS", "keye_kernels")
    layers.op_registry_oot["RMSNorm"] = Theirs
    layers.register()
    assert layers.op_registry_oot["RMSNorm"] is Theirs
    [row] = layers.report(RMSNorm(64))
    assert "0 of 1" in str(row)
    assert f"replaced by {__name__}.Theirs before" in row.note


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "only the definition of rms_norm runs here"), ("xpu", "not on xpu")],
)
def test_layers_stay_where_ours_would_be_slower(monkeypatch, device, reason):
    monkeypatch.setattr(layers.current_platform, "device_type", device)
    monkeypatch.setattr(
        layers, "backends", lambda _: {r.op: _only_reference() for r in layers._REPLACEMENTS}
    )
    monkeypatch.setattr(layers._backends, "_default", "auto")
    with layers.our_layers():
        norm = RMSNorm(64)
    assert type(norm) is RMSNorm
    [row] = layers.report(norm)
    assert reason in row.note


def _only_reference():
    return layers._backends.ServedBy("reference", {"triton": "no GPU"})


def test_other_releases_are_refused(monkeypatch):
    monkeypatch.setattr(layers.vllm, "__version__", "0.40.1")
    message = "vllm must be release 0.32 or 0.33 .* got 0.40.1"
    with pytest.raises(RuntimeError, match=message), layers.our_layers():
        pass
    for plugin, register in (("keye_kernels", layers.register), ("keye_model", models.register)):
        monkeypatch.setenv("VLLM_PLUGINS", plugin)
        with pytest.raises(RuntimeError, match=message):
            register()


def test_other_releases_keep_their_own_model(monkeypatch):
    """A plugin that was found, not named, must not break vLLM for other models."""
    calls, warnings = [], []
    monkeypatch.setattr(layers.vllm, "__version__", "0.40.1")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *_: calls.append(1))
    monkeypatch.setattr(models.logger, "warning", lambda _, error: warnings.append(str(error)))
    models.register()
    assert calls == []
    assert "must be release 0.32 or 0.33" in warnings[0]


def test_page_lists_the_layers():
    page = Path(__file__).parent.parent.parent / "docs" / "integrate.md"
    section = page.read_text().partition("**Layers.**")[2].partition("**Releases.**")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section, re.MULTILINE)
    assert rows == [(r.layer.__name__, r.op) for r in layers._REPLACEMENTS]
