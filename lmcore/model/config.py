"""The architecture of a model as data: one frozen `ModelConfig` composes every mechanism.

Three tiled strings say what each layer is made of; layer i takes letter i modulo the length of the string:

    pattern  the sequence mixer    A attention   W sliding-window attention   M Mamba-2   R routed Mamba   F resonance
    ffn      the feed-forward      d dense SwiGLU   e mixture of experts   - none
    depth    depth routing         - every token passes   m Mixture-of-Depths

Sections (`moe`, `mamba`, `resonance`, `mod`, `mtp`) hold the settings of one mechanism each. No mechanism knows
another. A zero (or "auto") means "derive"; after validation every field holds the derived number, so that a saved
config is
complete:

    ModelConfig(vocab_size=50257, d_model=768, num_layers=12, num_heads=12).d_ff == 2048
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from lmcore.config import Config

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this: matrix kernels like it. Padding rows are never trained nor sampled."""

MIXERS = "AWMRF"
FEED_FORWARDS = "de-"
DEPTHS = "-m"


class LayerKind(NamedTuple):
    """What one layer is made of (letters as in the module docstring)."""

    mixer: str
    ffn: str
    depth: str


class MoEConfig(Config):
    """Mixture of experts, for layers whose `ffn` letter is e."""

    num_experts: int = Field(8, ge=1)
    """Routed experts per layer."""
    top_k: int = Field(2, ge=1)
    """Experts that each token visits."""
    d_expert: int = Field(0, ge=0)
    """Inner width of one expert; 0 = d_ff / top_k, rounded up to a multiple of 64."""
    num_shared: int = Field(0, ge=0)
    """Experts that every token visits besides the routed ones (one SwiGLU of this many times d_expert)."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores, in fp32."""
    route_norm: bool | None = None
    """Normalise the top-k weights to sum 1. Default: yes for top_k > 1; with top_k = 1 it would stop the gradient."""
    route_scale: float = Field(1.0, gt=0)
    """Multiplier of the routed experts' weights."""
    bias_rate: float = Field(1e-3, ge=0)
    """Step of the selection bias that balances experts without a loss; 0 = off."""
    balance_weight: float = Field(0.0, ge=0)
    """Weight of the Switch balance loss (1 when uniform, num_experts when collapsed)."""
    z_weight: float = Field(1e-3, ge=0)
    """Weight of the router z-loss, mean(logsumexp(logits)^2)."""
    capacity_factor: float = Field(0.0, ge=0)
    """0 = dropless. Otherwise an expert serves at most ceil(factor * tokens * top_k / num_experts) tokens per batch."""


class MambaConfig(Config):
    """Mamba-2 and routed Mamba, for layers whose `pattern` letter is M or R."""

    d_state: int = Field(64, ge=1)
    """State size per channel."""
    head_dim: int = Field(64, ge=1)
    """Channels that share one decay."""
    expand: int = Field(2, ge=1)
    """Inner width as a multiple of d_model."""
    num_groups: int = Field(1, ge=1)
    """Groups of heads that share B and C."""
    conv_width: int = Field(4, ge=2)
    """Taps of the causal depthwise convolution."""
    chunk_size: int = Field(64, ge=1)
    """Chunk of the scan: 64 measures best on CPUs, 256 is usual on GPUs. It changes speed, not results."""
    num_experts: int = Field(8, ge=1)
    """Experts of the projections in routed Mamba (R)."""
    top_k: int = Field(1, ge=1)
    """Experts per token in routed Mamba."""
    balance_weight: float = Field(1e-3, ge=0)
    """Weight of the balance loss of routed Mamba."""
    kernels: Literal["torch", "mamba-ssm", "fla"] = "torch"
    """The scan of several tokens on CUDA: pure torch, or Triton kernels of mamba-ssm or of flash-linear-attention."""


class ResonanceConfig(Config):
    """Resonance (a bank of damped oscillators), for layers whose `pattern` letter is F."""

    num_kernels: int = Field(0, ge=0)
    """Independent kernels; channels are divided among them. 0 = num_heads."""
    num_resonators: int = Field(32, ge=1)
    """Oscillators per kernel."""
    conv_width: int = Field(4, ge=2)
    """Taps of the causal depthwise convolution in front."""


class ModConfig(Config):
    """Mixture-of-Depths, for layers whose `depth` letter is m."""

    capacity: float = Field(0.5, gt=0, le=1)
    """Share of the tokens that passes through the block while training."""
    predictor_weight: float = Field(0.1, ge=0)
    """Weight of the loss of the causal predictor (it reaches the predictor only)."""


class MtpConfig(Config):
    """Multi-token prediction: extra heads that predict further ahead while training, and draft while generating."""

    depths: int = Field(0, ge=0, le=16)
    """Extra tokens predicted at each position; 0 = off."""
    kind: Literal["sequential", "parallel"] = "sequential"
    """sequential: each head builds on the one before and sees the token between (DeepSeek-V3);
    parallel: independent heads on the shared trunk (Gloeckle et al.)."""
    weight: float = Field(0.3, ge=0)
    """Weight of the mean loss of the extra heads."""


def _auto(value: Any) -> Any:
    return 0 if value == "auto" else value


class ModelConfig(Config):
    """The architecture of one language model."""

    vocab_size: int = Field(0, ge=0)
    """True vocabulary: ids are 0 .. vocab_size-1. 0 = the tokenizer's, filled in by the trainer."""
    d_model: int = Field(512, ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(8, ge=1, le=10_000)
    """Layers of the trunk."""
    num_heads: int = Field(8, ge=1)
    """Query heads."""
    num_kv_heads: int = Field(0, ge=0)
    """Key/value heads (grouped-query attention); 0 = num_heads."""
    head_dim: int = Field(0, ge=0)
    """Size of a head; 0 = d_model / num_heads."""
    d_ff: int = Field(0, ge=0)
    """Inner width of the dense feed-forward; 0 = 8/3 d_model, rounded up to a multiple of 64."""
    context_length: int = Field(2048, ge=1)
    """Length of the sequences that the model is trained on."""
    pattern: str = "A"
    """Mixer of each layer, tiled: A attention, W sliding window, M Mamba-2, R routed Mamba, F resonance."""
    ffn: str = "d"
    """Feed-forward of each layer, tiled: d dense, e experts, - none."""
    depth: str = "-"
    """Depth routing of each layer, tiled: - none, m Mixture-of-Depths."""
    window: int = Field(0, ge=0)
    """Positions that a W layer sees, its own included."""
    rope_theta: Annotated[float, BeforeValidator(_auto)] = Field(0.0, ge=0)
    """Base of the rotary angles; auto = at least 10,000 and enough for context_length (see rotary.py)."""
    gate: Literal["none", "headwise", "elementwise"] = "none"
    """Sigmoid gate on the attention output."""
    qk_norm: bool = True
    """RMSNorm of queries and keys, before the rotation."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding as the output head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the embedding and of each branch's output, while training."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial matrices; those that write to the residual stream get it / sqrt(2 layers)."""
    moe: MoEConfig = MoEConfig()
    mamba: MambaConfig = MambaConfig()
    resonance: ResonanceConfig = ResonanceConfig()
    mod: ModConfig = ModConfig()
    mtp: MtpConfig = MtpConfig()

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of VOCAB_MULTIPLE."""
        return _round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer of the trunk."""
        return tuple(
            LayerKind(*(letters[i % len(letters)] for letters in (self.pattern, self.ffn, self.depth)))
            for i in range(self.num_layers)
        )

    @property
    def mtp_layer(self) -> LayerKind:
        """The kind of the block inside a multi-token-prediction head: that of the last layer, without depth routing."""
        return self.layers[-1]._replace(depth="-")

    @property
    def gate_dim(self) -> int:
        """Rows of the gate inside the fused attention projection."""
        return {"none": 0, "headwise": self.num_heads, "elementwise": self.num_heads * self.head_dim}[self.gate]

    @property
    def mamba_inner(self) -> int:
        """Inner width of a Mamba mixer."""
        return self.mamba.expand * self.d_model

    @property
    def mamba_heads(self) -> int:
        """Heads of a Mamba mixer."""
        return self.mamba_inner // self.mamba.head_dim

    @model_validator(mode="after")
    def _derive_and_check(self) -> ModelConfig:
        _check_letters("pattern", self.pattern, MIXERS, self.num_layers)
        _check_letters("ffn", self.ffn, FEED_FORWARDS, self.num_layers)
        _check_letters("depth", self.depth, DEPTHS, self.num_layers)
        mixers, ffns = {k.mixer for k in self.layers}, {k.ffn for k in self.layers}
        if self.head_dim == 0 and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}; change one or give head_dim"
            )
        derived: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.d_model // self.num_heads,
            "d_ff": self.d_ff or _round_up(-(-8 * self.d_model // 3), 64),
        }
        if mixers & set("AW"):
            if self.num_heads % derived["num_kv_heads"]:
                raise ValueError(
                    f"num_heads {self.num_heads} is not a multiple of num_kv_heads {derived['num_kv_heads']}"
                )
            if derived["head_dim"] % 2:
                raise ValueError(f"head_dim {derived['head_dim']} is odd; rotary positions need pairs")
        if "W" in mixers and self.window == 0:
            raise ValueError("a pattern with W needs window (positions that a layer sees)")
        if mixers & set("MR"):
            if self.mamba_inner % self.mamba.head_dim:
                raise ValueError(
                    f"mamba.expand * d_model = {self.mamba_inner} is not a multiple of mamba.head_dim "
                    f"{self.mamba.head_dim}"
                )
            if self.mamba_heads % self.mamba.num_groups:
                raise ValueError(
                    f"{self.mamba_heads} Mamba heads are not a multiple of mamba.num_groups {self.mamba.num_groups}"
                )
        if "R" in mixers and self.mamba.top_k > self.mamba.num_experts:
            raise ValueError(f"mamba.top_k {self.mamba.top_k} exceeds mamba.num_experts {self.mamba.num_experts}")
        kernels = self.resonance.num_kernels or self.num_heads
        if "F" in mixers and self.d_model % kernels:
            raise ValueError(f"d_model {self.d_model} is not a multiple of resonance.num_kernels {kernels}")
        derived["resonance"] = _with(self.resonance, num_kernels=kernels)
        if "e" in ffns:
            if self.moe.top_k > self.moe.num_experts:
                raise ValueError(f"moe.top_k {self.moe.top_k} exceeds moe.num_experts {self.moe.num_experts}")
            if self.moe.top_k == 1 and self.moe.route_norm:
                raise ValueError("moe.route_norm with top_k 1 gives the router no gradient; leave it out")
        norm = self.moe.top_k > 1 if self.moe.route_norm is None else self.moe.route_norm
        d_expert = self.moe.d_expert or _round_up(-(-derived["d_ff"] // self.moe.top_k), 64)
        derived["moe"] = _with(self.moe, route_norm=norm, d_expert=d_expert)
        if self.rope_theta == 0:
            from lmcore.model.rotary import auto_theta

            derived["rope_theta"] = auto_theta(derived["head_dim"], self.context_length)
        self.__dict__.update(derived)  # the model is frozen for its users; this is still its construction
        return self


def _with(section: Any, **changes: Any) -> Any:
    return section.model_copy(update=changes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_letters(name: str, letters: str, known: str, num_layers: int) -> None:
    if not letters or set(letters) - set(known):
        raise ValueError(f"{name} {letters!r} may hold the letters {', '.join(known)} only")
    if len(letters) > num_layers:
        raise ValueError(f"{name} {letters!r} has {len(letters)} letters for {num_layers} layers")
