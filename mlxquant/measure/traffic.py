"""Bytes that one decoded token must read, and how fast this machine could read them: decode's upper limit."""

from __future__ import annotations

import time
from typing import Any

from mlxquant.machine import Machine


def bytes_per_token(model: Any, config: dict[str, Any]) -> int:
    """Weight bytes read for one token, (shape: a number).

    All parameters count, but for an untied input embedding and one for all layers (one row is read) and experts that
    are not asked: of (experts, ...) stacks only the active share.
    """
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    text = config.get("text_config")
    merged = config | (text if isinstance(text, dict) else {})
    active = active_share(merged)
    tied = not any("lm_head" in name for name, _ in tree_flatten(model.parameters()))
    total = 0.0
    for name, module in tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module)):
        size = sum(array.nbytes for _, array in tree_flatten(module.parameters()))
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and (not tied or "per_layer" in name):
            continue
        total += size * (active if "Switch" in type(module).__name__ else 1.0)
    return int(total)


def active_share(config: dict[str, Any]) -> float:
    """Experts asked for one token over all of them; 1 for a dense model."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[k] for k in keys if isinstance(config.get(k), int)), 0)
    asked = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    used = next((config[k] for k in asked if isinstance(config.get(k), int)), 0)
    return used / experts if experts and used else 1.0


def bandwidth_bytes_per_s(machine: Machine) -> tuple[float, str]:
    """(bytes per second, where the number is from): published for a Mac's chip, else measured."""
    if machine.bandwidth_bytes_per_s:
        return machine.bandwidth_bytes_per_s, f"published for {machine.chip}"
    return measured_read_bandwidth(), "measured, reading 256 MiB with all cores"


def measured_read_bandwidth(megabytes: int = 256) -> float:
    """Best of five sums over an array larger than any cache, the array split over the cores.

    numpy's sum of float64 is limited by memory, not arithmetic, and releases the GIL.
    """
    import os
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    values = np.ones(megabytes * 2**20 // 8)
    parts = np.array_split(values, os.cpu_count() or 1)
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - began)
    return values.nbytes / best
