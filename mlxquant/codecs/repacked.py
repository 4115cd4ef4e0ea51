"""What each ggml type becomes in MLX when a GGUF file is taken over instead of quantized again. Values only.

Affine groups of 32 hold most block formats with codes unchanged. Where blocks of 16 have a scale of their own, no
affine format of MLX can, and the cheapest one is taken that adds at most 3 % to the format's own error; for Q6_K that
is more than MLX's finest format can do, and 8 bits add 4 %. Q2_K gets one bit more than that rule asks for: what 2 % of
its large error did to a real model's probabilities was 5 % of what the format itself does (docs/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxquant.codecs.spec import MX_MODES, Codec, affine


@dataclass(frozen=True)
class Repacked:
    """`own`: NMSE of the ggml type on Gaussian weights; `extra`: NMSE against the decoded blocks, which repacking adds.
    Measured by `scripts/measure_repack.py`. Below 1e-6 it is the rounding of scales to float16, codes unchanged.
    """

    codec: Codec
    own: float
    extra: float

    @property
    def lossless(self) -> bool:
        """Whether codes are unchanged."""
        return self.extra < 1e-6


def _mx(mode: str) -> Codec:
    group_size, bits = MX_MODES[mode]
    return Codec(mode, bits, group_size)


REPACKED: dict[str, Repacked] = {
    "Q4_0": Repacked(affine(4, 32), 7.4e-3, 0),
    "Q4_1": Repacked(affine(4, 32), 6.1e-3, 0),
    "Q5_0": Repacked(affine(5, 32), 1.8e-3, 0),
    "Q5_1": Repacked(affine(5, 32), 1.4e-3, 0),
    "Q8_0": Repacked(affine(8, 32), 2.9e-5, 0),
    "Q4_K": Repacked(affine(4, 32), 5.1e-3, 4.1e-7),
    "Q5_K": Repacked(affine(5, 32), 1.3e-3, 4.3e-7),
    "Q6_K": Repacked(affine(8, 32), 3.1e-4, 1.2e-5),
    "Q3_K": Repacked(affine(5, 32), 2.3e-2, 6.0e-4),
    "Q2_K": Repacked(affine(6, 128), 8.8e-2, 5.3e-4),
    "IQ4_NL": Repacked(affine(8, 32), 5.6e-3, 0),
    "IQ4_XS": Repacked(affine(8, 32), 5.7e-3, 3.2e-8),
    "IQ3_S": Repacked(affine(6, 64), 1.9e-2, 4.5e-4),
    "IQ3_XXS": Repacked(affine(6, 128), 3.3e-2, 5.8e-4),
    "IQ2_S": Repacked(affine(5, 32), 6.2e-2, 1.6e-3),
    "IQ2_XS": Repacked(affine(5, 128), 9.0e-2, 2.3e-3),
    "IQ2_XXS": Repacked(affine(5, 128), 1.2e-1, 1.9e-3),
    "IQ1_S": Repacked(affine(4, 128), 2.4e-1, 5.0e-3),
    "IQ1_M": Repacked(affine(4, 32), 2.0e-1, 4.5e-3),
    "TQ1_0": Repacked(affine(2, 128), 6.5e-1, 0),
    "TQ2_0": Repacked(affine(2, 128), 6.5e-1, 0),
    "MXFP4": Repacked(_mx("mxfp4"), 1.3e-2, 0),
    "NVFP4": Repacked(_mx("nvfp4"), 1.1e-2, 0),
}
