"""What config.json says and no key of GGUF can: llama.cpp takes something else for granted.

convert_hf_to_gguf.py writes such files without a word; they load, and answer differently. Source: load_arch_hparams and
the graphs of llama.cpp's src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlxquant.families.gguf_hparams import Hparams, read_hparams, whole
from mlxquant.families.gguf_keys import architecture
from mlxquant.families.gguf_table import module_of_config

_GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new")
_SILU = ("silu", "swish")
_MAX_LAYERS = 4096


def unsaid(config: Mapping[str, Any]) -> tuple[str, ...]:
    """One line for each setting of this model that a GGUF file cannot carry and llama.cpp would run otherwise; empty
    for nearly every published model. Raises as `model_keys` does."""
    arch, hparams = architecture(config), read_hparams(config, module_of_config(config))
    return tuple(line for check in (_activation, _rope, _window, *_CHECKS.get(arch, ())) for line in check(hparams))


def _differs(name: str, found: Any, taken: Any) -> str:
    return f"{name} is {found!r:.60}, which GGUF cannot say: llama.cpp takes {taken}"


def _activation(hparams: Hparams) -> Iterator[str]:
    known = _GELU if hparams.model_type.startswith("gemma") else _SILU
    name = next((n for n in ("hidden_activation", "hidden_act") if hparams.values.get(n)), None)
    if name and (found := hparams.values[name]) not in known:
        yield _differs(name, found, known[-1] if known is _GELU else known[0])


def _rope(hparams: Hparams) -> Iterator[str]:
    kind, silent = hparams.rope["rope_type"], hparams.model_type in ("gemma", "gemma2")
    carried = ("default", "linear", "yarn", "longrope", "su")
    llama3 = hparams.model_type in ("llama", "mistral", "mixtral", "smollm3") and kind.lower() == "llama3"
    if (silent and kind != "default") or not (kind in carried or llama3):
        yield _differs("rope_type", kind, "no rope scaling")
    if silent and hparams.rope["rope_theta"] != 10000:
        yield _differs("rope_theta", hparams.rope["rope_theta"], "10000")
    part = hparams.rope.get("partial_rotary_factor")
    if part not in (None, 1, 1.0) and hparams.model_type not in ("phi3", "qwen3_next"):
        yield _differs("partial_rotary_factor", part, "1")


def _window(hparams: Hparams) -> Iterator[str]:
    """Of those families whose architecture has none, where it is shorter than the context."""
    window = hparams.values.get("sliding_window")
    if hparams.model_type in ("mistral", "mixtral", "phi3"):
        used = True
    else:
        used = hparams.model_type.startswith("qwen") and bool(hparams.values.get("use_sliding_window"))
    if used and isinstance(window, int) and window < hparams.integer("max_position_embeddings"):
        yield _differs("sliding_window", window, "full attention")


def _no_rope_layers(hparams: Hparams) -> Iterator[str]:
    layers = min(hparams.integer("num_hidden_layers"), _MAX_LAYERS)
    every = whole("no_rope_layer_interval", hparams.values.get("no_rope_layer_interval", 4), 1)
    found = hparams.values.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if found != [int(i % 4 != 3) for i in range(layers)]:
        yield _differs("no_rope_layers", found, "every fourth layer without rope")


def _query_scale(layers_27b: int) -> Callable[[Hparams], Iterator[str]]:
    def check(hparams: Hparams) -> Iterator[str]:
        taken = hparams.head_dim
        if hparams.integer("num_hidden_layers") == layers_27b:
            taken = hparams.integer("hidden_size") // hparams.integer("num_attention_heads", 1)
        if (found := hparams.values.get("query_pre_attn_scalar", 256)) != taken:
            yield _differs("query_pre_attn_scalar", found, taken)

    return check


def _layer_types(period: int, default: int) -> Callable[[Hparams], Iterator[str]]:
    """Layers see everything once in `period` layers; a silent config means once in `default`."""

    def check(hparams: Hparams) -> Iterator[str]:
        layers = min(hparams.integer("num_hidden_layers"), _MAX_LAYERS)
        every = whole("sliding_window_pattern", hparams.values.get("sliding_window_pattern") or default, 1)
        found = hparams.values.get("layer_types") or _kinds(every, layers)
        if every != 1 and found != _kinds(period, layers):
            yield _differs("layer_types", found, f"full attention in every {period}th layer")

    return check


def _kinds(every: int, layers: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def _top_k_norm(taken: bool) -> Callable[[Hparams], Iterator[str]]:
    def check(hparams: Hparams) -> Iterator[str]:
        if (found := bool(hparams.values.get("norm_topk_prob", hparams.model_type == "qwen3_next"))) != taken:
            yield _differs("norm_topk_prob", found, taken)

    return check


def _swiglu(hparams: Hparams) -> Iterator[str]:
    if (found := hparams.values.get("swiglu_limit", 7.0)) != 7:
        yield _differs("swiglu_limit", found, "7")


def _delta_net(hparams: Hparams) -> Iterator[str]:
    """llama.cpp reads one width for both, and does not load the file."""
    key = hparams.values.get("linear_key_head_dim")
    if (found := hparams.values.get("linear_value_head_dim")) != key:
        yield _differs("linear_value_head_dim", found, f"linear_key_head_dim, {key}")


_CHECKS: dict[str, tuple[Callable[[Hparams], Iterator[str]], ...]] = {
    "smollm3": (_no_rope_layers,),
    "gemma2": (_query_scale(46), _layer_types(2, 2)),
    "gemma3": (_query_scale(62), _layer_types(6, 6)),
    "gpt-oss": (_layer_types(2, 2), _swiglu),
    "qwen2moe": (_top_k_norm(False),),
    "qwen3moe": (_top_k_norm(True),),
    "qwen3next": (_top_k_norm(True), _delta_net),
}
