"""The fast decoder gives the logits of the model itself, for every kind of layer, aligned and ragged rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcore.inference.decode import Decoder, can_pack
from lmcore.model.state import DecodeState
from tests.inference.tiny import small_config, small_model

MAMBA = {"d_state": 16, "head_dim": 16}
MOE = {"num_experts": 4, "top_k": 2, "d_expert": 16}
LAYERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "no qk_norm, untied": {"qk_norm": False, "tie_embeddings": False},
    "headwise gate": {"gate": "headwise"},
    "elementwise gate": {"gate": "elementwise", "num_kv_heads": 4},
    "windows": {"pattern": "AW", "window": 16},
    "mamba and experts": {"pattern": "AM", "ffn": "de", "mamba": MAMBA, "moe": MOE},
    "routed mamba, resonance": {"pattern": "RF", "mamba": MAMBA},
    "depth routing": {"depth": "-m"},
    "no feed-forward": {"pattern": "AM", "ffn": "-", "mamba": MAMBA},
}
PACKABLE = {
    torch.float64: False,
    torch.float32: True,
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),  # needs AVX-512 on x86
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_equals_the_model(layers: str, dtype: torch.dtype) -> None:
    if layers == "depth routing" and dtype == torch.bfloat16:
        pytest.skip("rounding lets its router choose other tokens")
    model = small_model(small_config(250, context_length=64, **LAYERS[layers]), dtype=dtype)
    assert can_pack(model) == PACKABLE[dtype]
    tokens = torch.randint(0, 250, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder = Decoder(model)
        states, references = [], []
        for row, length in enumerate((9, 9, 4)):  # two rows that are aligned, and one that is shorter
            states.append(model.init_state(1, 40))
            references.append(model.init_state(1, 40))
            hidden = decoder.read(tokens[row : row + 1, :length], states[-1])
            expected = model.trunk(tokens[row : row + 1, :length], state=references[-1])
            assert (hidden - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
        for members in ((0, 1), (0, 1, 2)):
            state = DecodeState.concatenate([states[m].select(torch.tensor([0])) for m in members])
            reference = DecodeState.concatenate([references[m].select(torch.tensor([0])) for m in members])
            assert (state.lengths is None) == (len(members) == 2)
            for step in range(9, 21):
                fast = decoder(tokens[list(members), step], state)
                slow = model(tokens[list(members), step : step + 1], state=reference)[:, -1]
                assert fast.dtype == slow.dtype
                assert (fast - slow).abs().max() <= TOLERANCE[dtype] * slow.abs().max()
                assert state.length == reference.length
            if state.lengths is not None:
                assert torch.equal(state.lengths, reference.lengths)
            # The states stay interchangeable.
            after = model(tokens[list(members), 21:], state=state)
            expected = model(tokens[list(members), 21:], state=reference)
            assert (after - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_a_decoder_is_kept_until_the_weights_change() -> None:
    model = small_model(small_config(250), dtype=torch.float32)
    first = Decoder.of(model)
    assert Decoder.of(model) is first
    names = set(model.state_dict())
    with torch.no_grad():
        model.norm.weight.mul_(2)
    second = Decoder.of(model)
    assert second is not first
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(second.logits(second.read(tokens)), model(tokens), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
