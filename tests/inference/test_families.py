"""Exported models give transformers' own classes the logits that ours give; importing is the inverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import LmError
from lmcore.inference import families
from lmcore.inference.export import export_model, load_averaged
from lmcore.inference.import_model import import_model
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training import tensors
from lmcore.training.checkpoint import Snapshot, load_model, model_tensors, save
from tests.inference.tiny import documents, make_run, make_set

MOE = {"num_experts": 4, "top_k": 2, "d_expert": 32, "bias_rate": 0.0}
SIGMOID = MOE | {"score": "sigmoid", "bias_rate": 1e-3}
MAMBA = {"d_state": 16, "head_dim": 16}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"qk_norm": False}),
    "llama-untied": ("llama", {"qk_norm": False, "tie_embeddings": False, "head_dim": 32}),
    "mistral": ("mistral", {"qk_norm": False, "pattern": "W", "window": 8}),
    # llama's class refuses heads that do not divide the width.
    "mistral-heads": ("mistral", {"qk_norm": False, "num_heads": 3, "num_kv_heads": 1, "head_dim": 16}),
    "qwen3": ("qwen3", {}),
    "qwen3-windows": ("qwen3", {"pattern": "AW", "window": 8}),
    "qwen3_moe": ("qwen3_moe", {"ffn": "de", "moe": MOE}),
    "qwen3_moe-raw-weights": ("qwen3_moe", {"ffn": "e", "moe": MOE | {"route_norm": False}}),
    "qwen3_moe-windows": ("qwen3_moe", {"ffn": "de", "moe": MOE, "pattern": "W", "window": 8}),
    "dots1": ("dots1", {"ffn": "ddee", "moe": SIGMOID | {"num_shared": 1, "route_scale": 1.7}}),
    "dots1-no-shared": ("dots1", {"ffn": "e", "moe": SIGMOID}),
    "qwen3_next": ("qwen3_next", {"gate": "elementwise"}),
    "qwen3_next-headwise": ("qwen3_next", {"gate": "headwise", "ffn": "e", "moe": MOE}),
    "qwen3_next-shared": ("qwen3_next", {"gate": "elementwise", "ffn": "ed", "moe": MOE | {"num_shared": 2}}),
    "granitemoehybrid": ("granitemoehybrid", {"pattern": "AM", "qk_norm": False, "mamba": MAMBA}),
    "granitemoehybrid-experts": (
        "granitemoehybrid",
        {"pattern": "MA", "ffn": "e", "moe": MOE, "qk_norm": False, "mamba": MAMBA},
    ),
    "granitemoehybrid-shared": (
        "granitemoehybrid",
        {"ffn": "e", "moe": MOE | {"num_shared": 1}, "qk_norm": False},
    ),
    "granitemoehybrid-groups": (
        "granitemoehybrid",
        {"pattern": "AM", "qk_norm": False, "mamba": MAMBA | {"num_groups": 4}},
    ),
    "mamba2": ("mamba2", {"pattern": "M", "ffn": "-", "mamba": MAMBA}),
    "mamba2-groups": ("mamba2", {"pattern": "M", "ffn": "-", "mamba": MAMBA | {"num_groups": 4}}),
}


def build(**settings: Any) -> LanguageModel:
    """A model in which every tensor, norms and biases included, has something to say."""
    defaults: dict[str, Any] = {"d_model": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
    config = ModelConfig(vocab_size=250, context_length=64, rope_theta=12345.0, **(defaults | settings))
    model = LanguageModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias") and config.moe.score == "sigmoid":
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


@pytest.mark.parametrize("row", ROWS)
def test_transformers_computes_the_same_logits(row: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    family, settings = ROWS[row]
    model = build(**settings)
    assert families.choose(model.config, biased="sigmoid" in str(settings)) == family
    theirs = families.to_hf_tensors(model_tensors(model), model.config, family)
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf_config(model.config, family)))
    chunks, _ = tensors.tensor_chunks(theirs, {"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    other, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(told.values()), told  # nothing missing, nothing unexpected
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, expected = model(tokens), other.eval()(tokens).logits
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5 * ours.abs().max()
    # And back, from the configuration as we write it and as transformers does.
    for hf in (families.to_hf_config(model.config, family), other.config.to_dict()):
        name, config = families.from_hf_config(hf, "config.json")
        assert name == family
        again = LanguageModel(config).eval()
        again.load_state_dict(families.from_hf_tensors(theirs, config, family, "here"), strict=False)
        with torch.inference_mode():
            assert (again(tokens) - ours).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pattern": "AR", "mamba": MAMBA}, "routed Mamba"),
        ({"pattern": "AF"}, "resonance"),
        ({"depth": "-m"}, "Mixture-of-Depths"),
        ({"mtp": {"depths": 1}}, "multi-token heads"),
        ({"pattern": "AM", "mamba": MAMBA}, "qk_norm: true"),
        ({"pattern": "M", "qk_norm": False, "mamba": MAMBA}, "no attention layer"),
        ({"pattern": "AW", "window": 8, "qk_norm": False}, "windows in some layers only"),
        ({"ffn": "d-"}, "ffn -"),
        ({"ffn": "e", "moe": SIGMOID, "gate": "headwise"}, "gate: headwise"),
        ({"ffn": "ed", "moe": SIGMOID}, "moe.score: sigmoid"),
    ],
)
def test_what_no_family_carries_is_named(settings: dict[str, Any], named: str) -> None:
    config = ModelConfig(vocab_size=250, d_model=64, num_layers=4, num_heads=4, **settings)
    with pytest.raises(LmError) as refused:
        families.choose(config)
    assert named in refused.value.message
    assert refused.value.code == 2


def test_a_selection_bias_that_is_not_zero_is_an_obstacle() -> None:
    config = ModelConfig(vocab_size=250, d_model=64, num_layers=2, num_heads=4, ffn="e", moe=MOE)
    assert families.choose(config, biased=False) == "qwen3_moe"
    with pytest.raises(LmError, match="selection bias"):
        families.choose(config, biased=True)


def test_multi_token_heads_can_be_left_out() -> None:
    config = ModelConfig(vocab_size=250, d_model=64, num_layers=2, num_heads=4, mtp={"depths": 1})
    assert families.choose(config, drop_mtp=True) == "qwen3"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "the architecture gpt2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, "rope_type: yarn"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type: llama3"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"sliding_window": 128}, "sliding_window: 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: linear"),
        ({"something_new": 1}, "something_new"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is 1e-6, but must be a number"),
    ],
)
def test_foreign_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    config = ModelConfig(vocab_size=250, d_model=64, num_layers=2, num_heads=4, qk_norm=False)
    with pytest.raises(LmError) as refused:
        families.from_hf_config(families.to_hf_config(config, "llama") | changes, "config.json")
    assert named in refused.value.message


def test_missing_unknown_and_impossible_tensors_are_refused() -> None:
    model = build(qk_norm=False)
    theirs = families.to_hf_tensors(model_tensors(model), model.config, "llama")
    without = {name: t for name, t in theirs.items() if name != "model.norm.weight"}
    with pytest.raises(LmError, match=r"model\.norm\.weight is missing"):
        families.from_hf_tensors(without, model.config, "llama", "here")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    with pytest.raises(LmError, match=r"q_proj\.bias has no place"):
        families.from_hf_tensors(theirs | bias, model.config, "llama", "here")
    shared = build(gate="elementwise", ffn="e", moe=MOE | {"num_shared": 1})
    theirs = families.to_hf_tensors(model_tensors(shared), shared.config, "qwen3_next")
    theirs["model.layers.0.mlp.shared_expert_gate.weight"] += 1
    with pytest.raises(LmError, match=r"shared_expert_gate\.weight is not zero"):
        families.from_hf_tensors(theirs, shared.config, "qwen3_next", "here")


# ---------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    return make_run(root / "runs" / "tiny", make_set(root / "set", documents()))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_check_and_import_again(run: Path, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    report = export_model(run, tmp_path / "out", dtype=dtype, check=True)
    assert report.family == "qwen3"
    assert report.steps == (3,)
    assert report.logit_difference is not None
    assert report.logit_difference < 1e-5
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "lmshards.json")
    back = import_model(tmp_path / "out", tmp_path / "again")
    assert back.family == "qwen3"
    original, again = load_model(run, device="cpu"), load_model(tmp_path / "again", device="cpu")
    assert again.model.config == original.model.config
    assert again.tokenizer is not None
    assert original.tokenizer is not None
    assert again.tokenizer.sha256 == original.tokenizer.sha256
    for name, tensor in model_tensors(original.model).items():
        other = model_tensors(again.model)[name]
        assert torch.equal(other, tensor if dtype == "fp32" else tensor.bfloat16().float())
    assert again.state["imported_from"]["family"] == "qwen3"


def test_transformers_generates_what_we_generate(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from lmcore.inference.generate import complete
    from lmcore.inference.sampling import SamplingConfig

    transformers.utils.logging.set_verbosity_error()
    export_model(run, tmp_path / "out")
    loaded = load_model(run, device="cpu")
    (ours,) = complete(loaded, ["one two"], SamplingConfig(max_tokens=20, temperature=0, ignore_eos=True))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    tokens = tokenizer("one two", return_tensors="pt")
    theirs = other.generate(**tokens, max_new_tokens=20, min_new_tokens=20, do_sample=False, temperature=None)
    assert theirs[0, tokens["input_ids"].shape[1] :].tolist() == ours.tokens
    assert other.generation_config.eos_token_id == tokenizer.eos_token_id == 256


def test_the_card_tells_where_the_model_comes_from(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "val", "loss": 5.5, "bits_per_byte": 7.9}\n'
        '{"step": 9, "kind": "val", "loss": 1.0, "bits_per_byte": 1.0}\n'  # after the checkpoint: not its result
    )
    export_model(run, tmp_path / "out")
    (run / "metrics.jsonl").unlink()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "out" / "lmshards.json").read_text())
    manifest = json.loads((run.parent.parent / "set" / "train" / "manifest.json").read_text())
    assert f"| {manifest['n_tokens']:,} | {manifest['n_docs']:,} |" in card
    assert manifest["dataset_id"][:16] in card
    assert "| 1 | 5.5000 | 7.9000 |" in card
    assert "| 9 |" not in card
    assert record["data"][0]["dataset_id"] == manifest["dataset_id"]
    assert record["checkpoints"][0]["step"] == 3
    assert record["files"].keys() == {f.name for f in (tmp_path / "out").iterdir()} - {"lmshards.json"}


def test_averaging_is_the_mean_of_the_newest(run: Path, tmp_path: Path) -> None:
    data = run.parent.parent / "set"
    many = make_run(tmp_path / "many", data, seed=0, step=1)
    for seed, step in ((1, 2), (2, 3)):
        make_run(tmp_path / "many", data, seed=seed, step=step)
    one, two, three = (
        tensors.read_tensors(many / "checkpoints" / f"step-0000000{n}" / "model.safetensors") for n in (1, 2, 3)
    )
    found, identities = load_averaged(many, "last:2")
    assert [entry["step"] for entry in identities] == [3, 2]
    for name, tensor in model_tensors(found.model).items():
        torch.testing.assert_close(tensor, (two[name] + three[name]) / 2, rtol=1e-6, atol=1e-9)
    older, identities = load_averaged(many / "checkpoints" / "step-00000002", "last:2")
    assert [entry["step"] for entry in identities] == [2, 1]
    name = "embedding.weight"
    torch.testing.assert_close(model_tensors(older.model)[name], (one[name] + two[name]) / 2)
    for wrong, message in (("last:4", "asks for 4"), ("first:2", "expected last:N")):
        with pytest.raises(LmError, match=message):
            load_averaged(many, wrong)


def test_one_file_carries_every_model(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    report = export_model(run, tmp_path / "deep" / "model.safetensors", kind="safetensors")
    weights = safetensors.load_file(report.out)
    expected = model_tensors(load_model(run, device="cpu").model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with safetensors.safe_open(report.out, "pt") as file:
        metadata = file.metadata()
    assert ModelConfig.model_validate(json.loads(metadata["model_config"])) == load_model(run).model.config
    assert json.loads(metadata["lmshards"])["checkpoints"][0]["step"] == 3


def test_an_existing_directory_is_never_overwritten_unless_it_is_an_export(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for replace in (False, True):
        with pytest.raises(LmError, match="already exists") as refused:
            export_model(run, tmp_path / "mine", replace=replace)
        assert refused.value.code == 73
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    export_model(run, tmp_path / "out")
    assert export_model(run, tmp_path / "out").unchanged
    with pytest.raises(LmError, match="already exists"):
        export_model(run, tmp_path / "out", dtype="bf16")
    export_model(run, tmp_path / "out", replace=True, dtype="bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_imports_that_cannot_be_trusted_are_refused(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(LmError, match=r"pytorch_model\.bin is a pickle, which is never opened"):
        import_model(tmp_path / "out", tmp_path / "x")
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(LmError, match="not a file beside it"):
        import_model(tmp_path / "out", tmp_path / "x")
    with pytest.raises(LmError, match=r"no config\.json here"):
        import_model(tmp_path, tmp_path / "x")
    with pytest.raises(LmError, match="not a directory"):
        import_model("./nowhere", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_weights_in_several_files(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    whole = tensors.read_tensors(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        chunks, _ = tensors.tensor_chunks({name: whole[name] for name in some})
        (tmp_path / "out" / file).write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    weight_map = {name: file for file, some in parts.items() for name in some}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_model(tmp_path / "out", tmp_path / "again")
    expected = model_tensors(load_model(run, device="cpu").model)
    found = model_tensors(load_model(tmp_path / "again", device="cpu").model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_without_tokenizer_is_exported_without_one(run: Path, tmp_path: Path) -> None:
    loaded = load_model(run, device="cpu")
    state = loaded.state | {"tokenizer_sha256": None}
    weights = model_tensors(loaded.model)
    save(tmp_path / "checkpoints", Snapshot(3, weights, {}, state, loaded.config.to_yaml().encode(), None))
    export_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert import_model(tmp_path / "out", tmp_path / "again").tokenizer is None


def test_a_tokenizer_larger_than_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    Tokenizer.train(documents(), 300).save(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(LmError, match="the tokenizer has ids up to"):
        import_model(tmp_path / "out", tmp_path / "x")


def test_the_command_offers_every_family() -> None:
    from lmcore.tools.export import Family

    assert [choice.value for choice in Family] == ["auto", *families.FAMILIES]


def test_widths_that_transformers_cannot_multiply_are_named_by_number_format() -> None:
    moe = MOE | {"d_expert": 12}
    config = ModelConfig(vocab_size=250, d_model=64, num_layers=2, num_heads=4, ffn="e", moe=moe)
    assert families.choose(config) == "qwen3_moe"
    with pytest.raises(LmError, match=r"moe\.d_expert: 12 .* multiple of 8"):
        families.choose(config, item_size=2)


def test_experts_are_trained_on_as_their_configuration_says() -> None:
    moe = MOE | {"balance_weight": 0.02, "z_weight": 1e-3}
    config = ModelConfig(vocab_size=250, d_model=64, num_layers=2, num_heads=4, ffn="e", moe=moe)
    hf = families.to_hf_config(config, "qwen3_moe")
    assert hf["router_aux_loss_coef"] == 0.02
    back = families.from_hf_config(hf | {"router_aux_loss_coef": 0.5}, "config.json")[1].moe
    assert (back.balance_weight, back.z_weight, back.bias_rate) == (0.5, 0.0, 0.0)
