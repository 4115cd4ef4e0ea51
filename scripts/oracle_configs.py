"""Configs of published models, and variants of them: what scripts/oracle_keys.py asks convert_hf_to_gguf.py about.

Written from memory of the published config.json files; entries that reach neither a key nor mlx-lm are left out.
`CASES[family][case]` = what differs from the family's first case; `files` and `folder` belong to general.*.
"""

from __future__ import annotations

from typing import Any

_LONG = [1.0 + 0.37 * i for i in range(48)]
_SHORT = [1.0 + 0.011 * i for i in range(48)]


def _long_rope(pairs: int, **more: Any) -> dict[str, Any]:
    return {"type": "longrope", "long_factor": _LONG[:pairs], "short_factor": _SHORT[:pairs], **more}


LLAMA3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

CARD = """---
license: other
license_name: tiny-research
license_link: https://huggingface.co/Org/Tiny-1B/blob/main/LICENSE
language:
- en
- no
- fr
pipeline_tag: text-generation
base_model: Org/Tiny-1.5B-Base
base_model_relation: finetune
datasets:
- org/some-data
- https://huggingface.co/datasets/a
library_name: transformers
tags:
- chat
- "1.0"
model_creator: Somebody
---
# Tiny

Text.
"""
GENERATION = """{"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": true, "pad_token_id": 0, "temperature": 0.7,
"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": null, "transformers_version": "4.37.0"}"""

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "Llama-3.2-1B-Instruct": {
            "folder": "Llama-3.2-1B-Instruct",
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "vocab_size": 128256,
            "files": {"README.md": CARD, "generation_config.json": GENERATION},
        },
        "Llama-3.1-8B": {
            "folder": "Meta-Llama-3.1-8B", "_name_or_path": "meta-llama/Meta-Llama-3.1-8B",
            "rope_scaling": LLAMA3 | {"factor": 8.0}, "head_dim": None, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False,
        },
        "rope_parameters of transformers 5": {
            "rope_scaling": None, "rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0},
        },
        "llama3 without its original length": {
            "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
            "max_position_embeddings": 16384,
        },
        "llama3 in heads of 128, theta 10000": {"head_dim": 128, "rope_theta": 10000, "num_attention_heads": 16},
        "llama3, factor 4, heads of 80": {
            "head_dim": 80, "rope_theta": 1234567.0, "rope_scaling": LLAMA3 | {"factor": 4, "rope_type": "LLAMA3"},
        },
        "llama3, other frequency factors": {
            "rope_scaling": LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 3.0, "factor": 10.0},
        },
        "Llama-2-7b": {
            "folder": "Llama-2-7b-hf", "head_dim": None, "hidden_size": 4096, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "rope_scaling": None, "rope_theta": None, "tie_word_embeddings": False, "vocab_size": 32000,
        },
        "Llama 1, which names no key heads": {
            "folder": "llama-7b", "head_dim": None, "num_key_value_heads": None, "rope_scaling": None,
            "rope_theta": None, "rms_norm_eps": 1e-06, "max_position_embeddings": None, "vocab_size": None,
        },
        "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "linear, new spelling": {"rope_scaling": {"rope_type": "linear", "factor": 2}},
        "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "yarn": {"rope_scaling": YARN},
        "yarn, all settings": {
            "rope_scaling": {
                "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
                "beta_slow": 1, "attention_factor": 0.9,
            },
        },
        "yarn without its original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "partial rotary is not a llama's": {"partial_rotary_factor": 0.5, "rope_scaling": None},
        "heads wider than the model": {"head_dim": 96, "rope_scaling": None},
        "biases": {"attention_bias": True, "mlp_bias": True, "rope_scaling": None},
        "SmolLM2-135M-Instruct": {
            "folder": "SmolLM2-135M-Instruct", "head_dim": None, "hidden_size": 576, "intermediate_size": 1536,
            "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "vocab_size": 49152, "is_llama_config": True,
            "files": {"README.md": "---\nlibrary_name: transformers\nlicense: apache-2.0\nlanguage:\n- en\n---\n"},
        },
        "TinyLlama-1.1B-Chat-v1.0": {
            "folder": "TinyLlama-1.1B-Chat-v1.0", "head_dim": None, "intermediate_size": 5632,
            "max_position_embeddings": 2048, "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_scaling": None,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000,
            "files": {"generation_config.json": '{"max_length": 2048, "temperature": 1, "top_k": 50}'},
        },
        "folder without a name that says anything": {
            "folder": "snapshot", "files": {"README.md": "no front matter", "generation_config.json": "{broken"},
        },
        "merge with many parents": {
            "folder": "Org-Merge-7B-v0.2-chat",
            "files": {"README.md": "---\nlicense: [mit, apache-2.0]\nbase_model:\n- a/B-7B\n- c/d\n"
                      "- https://huggingface.co/e/F-13b-instruct\ntags: merge\n---\n"},
        },
    },
    "mistral": {
        "Mistral-7B-Instruct-v0.3": {
            "folder": "Mistral-7B-Instruct-v0.3",
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
        },
        "Mistral-7B-v0.1 with its window": {
            "folder": "Mistral-7B-v0.1", "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
        },
        "Mistral-Nemo-Instruct-2407": {
            "folder": "Mistral-Nemo-Instruct-2407", "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40,
            "max_position_embeddings": 131072, "vocab_size": 131072,
        },
        "silent": {
            "num_key_value_heads": None, "rope_theta": None, "rms_norm_eps": None, "max_position_embeddings": None,
        },
    },
    "mixtral": {
        "Mixtral-8x7B-Instruct-v0.1": {
            "folder": "Mixtral-8x7B-Instruct-v0.1",
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        "silent": {"rope_theta": None, "num_local_experts": None, "num_experts_per_tok": None, "vocab_size": None},
        "with a head_dim": {"head_dim": 64},
    },
    "qwen2": {
        "Qwen2.5-1.5B-Instruct": {
            "folder": "Qwen2.5-1.5B-Instruct",
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643,
            "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
            "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 12,
            "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
            "files": {
                "README.md": "---\nlicense: apache-2.0\nlicense_link: https://huggingface.co/x/LICENSE\n"
                "language:\n\t- en\npipeline_tag: text-generation\nbase_model: Qwen/Qwen2.5-1.5B\ntags:\n- chat\n---\n",
                "generation_config.json": '{"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}',
            },
        },
        "with its window": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14},
        "with yarn": {"rope_scaling": YARN, "max_position_embeddings": 131072},
        "with a head_dim": {"head_dim": 64},
        "silent": {"num_key_value_heads": None, "rope_theta": None, "max_position_embeddings": None},
    },
    "qwen2_moe": {
        "Qwen1.5-MoE-A2.7B": {
            "folder": "Qwen1.5-MoE-A2.7B",
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "bos_token_id": 151643,
            "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
            "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        "silent": {
            "moe_intermediate_size": None, "shared_expert_intermediate_size": None, "num_experts": None,
            "num_experts_per_tok": None, "rope_theta": None,
        },
    },
    "qwen3": {
        "Qwen3-0.6B": {
            "folder": "Qwen3-0.6B",
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        "with yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        "silent": {"head_dim": None, "rope_theta": None},
        "rope_parameters for each kind of layer": {
            "layer_types": ["full_attention"] * 28, "rope_theta": None,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e6}},
        },
    },
    "qwen3_moe": {
        "Qwen3-30B-A3B": {
            "folder": "Qwen3-30B-A3B",
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
            "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
            "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        "silent": {"head_dim": None, "num_experts": None, "num_experts_per_tok": None, "rope_theta": None},
    },
    "qwen3_next": {
        "Qwen3-Next-80B-A3B-Instruct": {
            "folder": "Qwen3-Next-80B-A3B-Instruct",
            "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "attention_bias": False,
            "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
            "max_position_embeddings": 262144, "mlp_only_layers": [], "moe_intermediate_size": 512,
            "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
            "num_hidden_layers": 48, "num_key_value_heads": 2, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 10000000, "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False, "vocab_size": 151936,
        },
        "silent": {"partial_rotary_factor": None, "full_attention_interval": None, "rope_theta": None},
    },
    "gemma": {
        "gemma-2b-it": {
            "folder": "gemma-2b-it",
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False, "bos_token_id": 2,
            "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
            "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
            "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
        },
        "another theta has no key": {"rope_theta": 20000.0},
        "silent": {"head_dim": None, "num_key_value_heads": None},
    },
    "gemma2": {
        "gemma-2-2b-it": {
            "folder": "gemma-2-2b-it",
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
        },
        "gemma-2-27b": {
            "folder": "gemma-2-27b", "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864,
            "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
        },
        "silent": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None},
    },
    "gemma3_text": {
        "gemma-3-1b-it": {
            "folder": "gemma-3-1b-it",
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144,
            "files": {"generation_config.json": '{"cache_implementation": "hybrid", "top_k": 64, "top_p": 0.95}'},
        },
        "saved by transformers 5": {
            "rope_theta": None, "rope_local_base_freq": None, "sliding_window_pattern": None,
            "_sliding_window_pattern": 6,
            "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
                "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
            },
        },
        "no window": {"sliding_window_pattern": 1},
        "a cap on the logits": {"final_logit_softcapping": 20.0},
        "silent": {
            "head_dim": None, "num_attention_heads": None, "num_key_value_heads": None, "rope_theta": None,
            "rope_local_base_freq": None, "sliding_window": None, "sliding_window_pattern": None,
            "rms_norm_eps": None, "max_position_embeddings": None,
        },
    },
    "gemma3": {
        "gemma-3-4b-it": {
            "folder": "gemma-3-4b-it",
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
            "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
            "initializer_range": 0.02, "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {
                "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
            },
        },
        "gemma-3-27b-it": {
            "folder": "gemma-3-27b-it",
            "text_config": {
                "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
                "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
                "query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
    },
    "phi3": {
        "Phi-3-mini-128k-instruct": {
            "folder": "Phi-3-mini-128k-instruct",
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "bos_token_id": 1,
            "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
            "rms_norm_eps": 1e-05, "rope_scaling": _long_rope(48), "rope_theta": 10000.0, "sliding_window": 262144,
            "tie_word_embeddings": False, "vocab_size": 32064,
        },
        "su": {"rope_scaling": _long_rope(48) | {"type": "su"}},
        "rope_parameters of transformers 5": {
            "rope_scaling": None, "rope_theta": None,
            "rope_parameters": {
                "rope_type": "longrope", "long_factor": _LONG, "short_factor": _SHORT, "rope_theta": 10000.0,
                "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
            },
        },
        "Phi-3-mini-4k-instruct": {
            "folder": "Phi-3-mini-4k-instruct", "max_position_embeddings": 4096, "rope_scaling": None,
            "sliding_window": 2047,
        },
        "phi-4": {
            "folder": "phi-4", "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
            "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 250000,
            "sliding_window": None, "vocab_size": 100352,
        },
        "Phi-4-mini-instruct": {
            "folder": "Phi-4-mini-instruct", "num_attention_heads": 24, "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75, "rope_scaling": _long_rope(48), "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        "silent": {"original_max_position_embeddings": None, "num_key_value_heads": None, "rope_theta": None},
    },
    "smollm3": {
        "SmolLM3-3B": {
            "folder": "SmolLM3-3B",
            "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False,
            "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
            "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
            "no_rope_layers": [int(i % 4 != 3) for i in range(36)], "num_attention_heads": 16,
            "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
            "vocab_size": 128256,
        },
        "llama3": {"rope_scaling": LLAMA3},
        "with yarn": {"rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"}},
        "silent": {"rope_theta": None, "num_key_value_heads": None, "no_rope_layers": None, "layer_types": None},
    },
    "olmo2": {
        "OLMo-2-1124-7B-Instruct": {
            "folder": "OLMo-2-1124-7B-Instruct",
            "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False,
            "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
        },
        "with a head_dim": {"head_dim": 64, "num_key_value_heads": 8},
        "silent": {"num_key_value_heads": None, "rope_theta": None, "rms_norm_eps": None},
    },
    "granite": {
        "granite-3.3-2b-instruct": {
            "folder": "granite-3.3-2b-instruct",
            "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": False,
            "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
            "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40,
            "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "vocab_size": 49159,
        },
        "head_dim is not a granite's": {"head_dim": 128},
        "silent": {
            "attention_multiplier": None, "embedding_multiplier": None, "logits_scaling": None,
            "residual_multiplier": None, "rope_theta": None,
        },
    },
    "gpt_oss": {
        "gpt-oss-20b": {
            "folder": "gpt-oss-20b",
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
            "initial_context_length": 4096, "intermediate_size": 2880,
            "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(24)],
            "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
            "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "pad_token_id": 199999,
            "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
            "tie_word_embeddings": False, "vocab_size": 201088,
        },
        "silent": {"rope_scaling": None, "rope_theta": None, "sliding_window": None, "num_local_experts": None},
    },
}  # fmt: skip
