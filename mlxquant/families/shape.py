"""A model's dimensions, read from a config.json that nobody has vouched for.

Values mean what they mean to stock mlx-lm: where a key is missing its default counts (known.py), because the
folder we write is read by it. Every number is checked for type and range before anything is sized by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.config_reader import MAX_DIM, Reader
from mlxquant.families.known import FACTS

Mixer = Literal["full", "sliding", "linear", "ssm", "none"]
Ffn = Literal["dense", "moe", "none"]

# Gated delta nets beside every few layers of attention.
_DELTA_NETS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")

_GEMMA4 = ("gemma4", "gemma4_text")
# Short convolutions between layers of attention.
_LFM2 = ("lfm2", "lfm2_moe")
# Latent attention.
_DEEPSEEK = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")

# Far above any model, far below what would make a plan take minutes.
_MAX_LAYERS, _MAX_EXPERTS = 1024, 65536

_NEMOTRON_BLOCKS = {
    "full_attention": "*", "attention": "*", "linear_attention": "M", "mamba": "M", "conv": "M", "moe": "E",
    "mlp": "-",
}  # fmt: skip
_NEMOTRON_KINDS: dict[str, tuple[Mixer, Ffn]] = {
    "*": ("full", "none"),
    "M": ("ssm", "none"),
    "E": ("none", "moe"),
    "-": ("none", "dense"),
}


@dataclass(frozen=True)
class ModelShape:
    """What a family's tensors and caches are sized by. Counts are elements; 0 or None where the family has no
    such part.

    module: the file in mlx_lm/models that runs it (mistral -> llama). mixers, ffns: one entry per layer.
    tied: the embedding is the output head in mlx-lm's eyes (gemma3: unless the source holds lm_head.weight).
    modalities: "text", and "vision" or "audio" where the config describes parts that are not converted.
    Recurrent layers (linear, ssm): conv_channels x conv_kernel, state_heads x state_key x state_value is
    their state (lfm2 has the convolution alone).
    global_head_dim, global_kv_heads: of full layers where they differ from those of sliding ones (gemma4).
    shared_kv_layers: so many last layers read the keys and values of the last layer of their kind before them; with
    wide_shared_ffn their feed-forward part is twice as wide. keys_are_values: full layers have no v_proj, though their
    caches hold both. per_layer_size: columns that a token's row in a second embedding, of per_layer_vocab_size rows,
    has for each layer. altup_inputs: hidden states side by side, laurel_rank: of a low-rank path beside attention
    (gemma3n).
    """

    model_type: str
    module: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int | None
    tied: bool
    mixers: tuple[Mixer, ...]
    ffns: tuple[Ffn, ...]
    sliding_window: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    moe_latent_size: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    conv_channels: int = 0
    conv_kernel: int = 0
    state_heads: int = 0
    state_key: int = 0
    state_value: int = 0
    global_head_dim: int = 0
    global_kv_heads: int = 0
    shared_kv_layers: int = 0
    keys_are_values: bool = False
    wide_shared_ffn: bool = False
    per_layer_size: int = 0
    per_layer_vocab_size: int = 0
    altup_inputs: int = 0
    laurel_rank: int = 0
    modalities: tuple[str, ...] = ("text",)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads config.json. SourceError names the key that is missing or wrong; UnsupportedError an unknown
        family."""
        reader = Reader.open(config)
        module, facts = reader.module, FACTS[reader.module]
        reader.check_required()
        hidden, heads = reader.integer("hidden_size"), _heads(reader)
        head_dim = reader.optional("head_dim") if facts.head_dim != "derived" else None
        pairs = _layer_kinds(reader)
        experts = _experts(reader)
        if not experts and any(ffn == "moe" for _, ffn in pairs):
            raise SourceError("config.json has layers with experts, and does not say how many experts")
        return cls(
            model_type=reader.model_type,
            module=module,
            hidden_size=hidden,
            layers=len(pairs),
            heads=heads,
            kv_heads=reader.optional("num_key_value_heads") or heads,
            head_dim=head_dim or max(1, hidden // heads),
            intermediate_size=_ffn_width(reader),
            vocab_size=reader.integer("vocab_size"),
            context_length=reader.optional("max_position_embeddings"),
            tied=_tied(reader),
            mixers=tuple(mixer for mixer, _ in pairs),
            ffns=tuple(ffn for _, ffn in pairs),
            sliding_window=reader.optional("sliding_window") if any(m == "sliding" for m, _ in pairs) else None,
            experts=experts,
            experts_per_token=_experts_per_token(reader, experts) if experts else 0,
            moe_intermediate_size=_moe_width(reader) if experts else 0,
            shared_intermediate_size=_shared_width(reader) if experts else 0,
            moe_latent_size=(reader.optional("moe_latent_size") or 0) if module == "nemotron_h" else 0,
            modalities=_modalities(config),
            **_latents(reader),
            **_gemma(reader, len(pairs)),
            **_recurrent(reader),
        )


def flags(config: Mapping[str, Any], keys: tuple[str, ...]) -> set[str]:
    """Those of `keys` that config.json sets to true; SourceError for anything but true, false or null."""
    reader = Reader.open(config)
    return {key for key in keys if reader.flag(key)}


def _heads(reader: Reader) -> int:
    return reader.integer("num_heads" if reader.module == "mamba2" else "num_attention_heads")


def _tied(reader: Reader) -> bool:
    rule = FACTS[reader.module].tie
    if rule == "present":
        return reader.raw("tie_word_embeddings") is None or reader.flag("tie_word_embeddings")
    return rule == "always" or (rule == "config" and reader.flag("tie_word_embeddings"))


def _ffn_width(reader: Reader) -> int:
    """gemma3n states one for each layer; lfm2 one that its model cuts to two thirds, and rounds up."""
    if reader.module == "gemma3n" and isinstance(reader.raw("intermediate_size"), list):
        return _one_width(reader.sequence("intermediate_size", int, reader.integer("num_hidden_layers")) or [])
    if reader.module != "lfm2":
        return reader.integer("intermediate_size")
    width = reader.optional("block_ff_dim") or reader.integer("intermediate_size")
    if not reader.flag("block_auto_adjust_ff_dim"):
        return width
    factor, multiple = reader.raw("block_ffn_dim_multiplier"), reader.integer("block_multiple_of")
    if type(factor) not in (int, float) or not 0 < factor < 1024:
        raise SourceError(f"config.json: block_ffn_dim_multiplier is {factor!r:.60}, expected a number from 0 to 1024")
    return max(1, -(-int(factor * int(2 * width / 3)) // multiple)) * multiple


def _one_width(widths: list[Any]) -> int:
    if len(set(widths)) != 1 or not 0 < widths[0] <= MAX_DIM:
        found = f"{widths!r:.60}"
        raise UnsupportedError(f"config.json: intermediate_size is {found}, expected the same width for each layer")
    return int(widths[0])


def _experts(reader: Reader) -> int:
    if reader.module in _GEMMA4 and not reader.flag("enable_moe_block"):
        return 0
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if reader.raw(key) is not None:
            return reader.integer(key, low=0, high=_MAX_EXPERTS)
    return 0


def _experts_per_token(reader: Reader, experts: int) -> int:
    key = "top_k_experts" if reader.module in _GEMMA4 else "num_experts_per_tok"
    return reader.optional(key, high=experts) or 0


def _moe_width(reader: Reader) -> int:
    """mixtral, olmoe, granitemoe and gpt_oss name the experts' width intermediate_size."""
    own = reader.module in (
        "qwen2_moe",
        "qwen3_moe",
        *_DELTA_NETS,
        *_GEMMA4,
        *_DEEPSEEK,
        "glm4_moe",
        "lfm2_moe",
        "nemotron_h",
    )
    return reader.integer("moe_intermediate_size" if own else "intermediate_size")


def _shared_width(reader: Reader) -> int:
    if reader.module in ("qwen2_moe", *_DELTA_NETS):
        return reader.integer("shared_expert_intermediate_size")
    shared = reader.optional("n_shared_experts", low=0)
    if reader.module == "nemotron_h":
        return reader.integer("moe_shared_expert_intermediate_size") if shared else 0
    return reader.integer("moe_intermediate_size") * shared if shared else 0


def _latents(reader: Reader) -> dict[str, Any]:
    if reader.module not in _DEEPSEEK:
        return {}
    keys = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return {key: reader.integer(key) for key in keys} | {"q_lora_rank": reader.optional("q_lora_rank") or 0}


def _gemma(reader: Reader, layers: int) -> dict[str, Any]:
    """What gemma3n and gemma4 have beyond others."""
    if reader.module == "gemma3n":
        keys = {"altup_inputs": "altup_num_inputs", "laurel_rank": "laurel_rank"}
        keys |= {"per_layer_size": "hidden_size_per_layer_input", "per_layer_vocab_size": "vocab_size_per_layer_input"}
        shared = reader.integer("num_kv_shared_layers", low=0, high=layers - 1)
        return {name: reader.integer(key) for name, key in keys.items()} | {"shared_kv_layers": shared}
    if reader.module not in _GEMMA4:
        return {}
    same = reader.flag("attention_k_eq_v")
    per_layer = reader.optional("hidden_size_per_layer_input", low=0) or 0
    return {
        "global_head_dim": reader.optional("global_head_dim", low=0) or reader.integer("head_dim"),
        "global_kv_heads": (reader.optional("num_global_key_value_heads") if same else None)
        or reader.integer("num_key_value_heads"),
        "shared_kv_layers": reader.integer("num_kv_shared_layers", low=0, high=layers - 1),
        "keys_are_values": same,
        "wide_shared_ffn": reader.flag("use_double_wide_mlp"),
        "per_layer_size": per_layer,
        "per_layer_vocab_size": reader.integer("vocab_size_per_layer_input") if per_layer else 0,
    }


def _recurrent(reader: Reader) -> dict[str, Any]:
    if reader.module in _DELTA_NETS:
        key, value = reader.integer("linear_key_head_dim"), reader.integer("linear_value_head_dim")
        key_heads, heads = reader.integer("linear_num_key_heads"), reader.integer("linear_num_value_heads")
        channels, kernel = 2 * key * key_heads + value * heads, reader.integer("linear_conv_kernel_dim")
    elif reader.module in ("mamba2", "nemotron_h"):
        names = ("num_heads", "head_dim") if reader.module == "mamba2" else ("mamba_num_heads", "mamba_head_dim")
        heads, value = (reader.integer(name) for name in names)
        key = reader.optional("ssm_state_size") or reader.integer("state_size")
        channels, kernel = heads * value + 2 * reader.integer("n_groups") * key, reader.integer("conv_kernel")
    elif reader.module in _LFM2:
        channels, kernel, heads, key, value = reader.integer("hidden_size"), reader.integer("conv_L_cache"), 0, 0, 0
    else:
        return {}
    sizes = {"conv_channels": channels, "conv_kernel": kernel, "state_heads": heads}
    return sizes | {"state_key": key, "state_value": value}


def _modalities(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("text", *(kind for kind in ("vision", "audio") if config.get(f"{kind}_config")))


def _layer_kinds(reader: Reader) -> list[tuple[Mixer, Ffn]]:
    if reader.module == "nemotron_h":
        return [_NEMOTRON_KINDS[char] for char in _nemotron_pattern(reader)]
    count = reader.integer("num_hidden_layers", high=_MAX_LAYERS)
    return list(zip(_mixers(reader, count), _ffns(reader, count), strict=True))


def _nemotron_pattern(reader: Reader) -> str:
    pattern = reader.raw("hybrid_override_pattern")
    if pattern is None:
        blocks = reader.sequence("layers_block_type", str) or reader.sequence("layer_types", str) or []
        pattern = "".join(_NEMOTRON_BLOCKS.get(block, "?") for block in blocks)
    pattern = "".join(pattern) if isinstance(pattern, list) and all(isinstance(c, str) for c in pattern) else pattern
    if not isinstance(pattern, str) or not 0 < len(pattern) <= _MAX_LAYERS or set(pattern) - set(_NEMOTRON_KINDS):
        found = f"{pattern!r:.60}"
        raise SourceError(
            f"config.json: hybrid_override_pattern is {found}, expected a string of 'M', '*', '-' and 'E'"
        )
    return pattern


def _mixers(reader: Reader, count: int) -> list[Mixer]:
    module = reader.module
    if module == "mamba2":
        return ["ssm"] * count
    if module in _DELTA_NETS:
        every = reader.integer("full_attention_interval")
        return ["linear" if (i + 1) % every else "full" for i in range(count)]
    if module in ("gemma3", "gemma3_text", "cohere2"):
        every = reader.integer("sliding_window_pattern")
        return ["sliding" if (i + 1) % every else "full" for i in range(count)]
    if module in _GEMMA4 and reader.raw("layer_types") is None:
        every = reader.integer("sliding_window_pattern")
        return ["full" if i % every == every - 1 else "sliding" for i in range(count)]
    if module == "olmo3" and reader.raw("layer_types") is None:
        return ["sliding" if (i + 1) % 4 else "full" for i in range(count)]
    if module in _LFM2:
        return _lfm2_mixers(reader, count)
    if module not in ("llama", "smollm3", "gpt_oss", "olmo3", "ministral3", "mistral3", "gemma3n", *_GEMMA4):
        return ["full"] * count
    types = reader.sequence("layer_types", str, count)
    if types is None:  # gpt_oss alternates, starting with a window
        return ["sliding" if module == "gpt_oss" and i % 2 == 0 else "full" for i in range(count)]
    if unknown := Counter(types) - Counter({"full_attention": count, "sliding_attention": count}):
        raise UnsupportedError(f"config.json: layer_types has {', '.join(map(repr, unknown))}, which {module} has not")
    return ["sliding" if kind == "sliding_attention" else "full" for kind in types]


def _lfm2_mixers(reader: Reader, count: int) -> list[Mixer]:
    """Attention where full_attn_idxs, or else layer_types, say so; convolutions elsewhere."""
    places = reader.sequence("full_attn_idxs", int)
    if places is None:
        types = reader.sequence("layer_types", str, count) or []
        places = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if not places or not all(0 <= place < count for place in places):
        found = f"{places!r:.60}"
        raise SourceError(
            f"config.json: full_attn_idxs is {found}, expected layers from 0 to {count - 1}, one at least"
        )
    return ["full" if i in set(places) else "linear" for i in range(count)]


def _ffns(reader: Reader, count: int) -> list[Ffn]:
    module = reader.module
    if module == "mamba2":
        return ["none"] * count
    if not _experts(reader):
        return ["dense"] * count
    if module in ("qwen3_moe", "qwen3_next"):
        step, dense = (
            reader.integer("decoder_sparse_step"),
            set(reader.sequence("mlp_only_layers", int) or ()),
        )
        return ["dense" if i in dense or (i + 1) % step else "moe" for i in range(count)]
    if module == "lfm2_moe":
        first = reader.integer("num_dense_layers", low=0)
        return ["dense" if i < first else "moe" for i in range(count)]
    if module in _DEEPSEEK or module == "glm4_moe":
        first, step = reader.integer("first_k_dense_replace", low=0), reader.optional("moe_layer_freq") or 1
        return ["moe" if i >= first and i % step == 0 else "dense" for i in range(count)]
    return ["moe"] * count
