"""A .gguf file as an mlx-lm model: through the source, layout and plan that `convert` streams from, into memory.

Where nothing is expanded, blocks are taken over as `convert` would write them; on a CPU they are decoded, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxquant.convert.gguf_source import GGUFSource
    from mlxquant.plan.plan import Plan, PlannedTensor
    from mlxquant.run.model import LoadedModel


class GGUFModel:
    """`model`: a skeleton whose zeros nobody evaluates, float until `take_over`. `fill` reads the weights."""

    def __init__(self, source: GGUFSource) -> None:
        """Raises SourceError and UnsupportedError; whatever mlx-lm's classes raise passes."""
        import mlx.core as mx
        from mlx_lm.utils import _get_classes

        from mlxquant.tensors import DTYPES

        self.source, self.plan = source, plan_for(source)
        self._dtypes = {t.name: getattr(mx, DTYPES[t.dtype].label) for t in self.plan.tensors}
        self._packed = False
        model_class, args_class = _get_classes(source.config)
        self.model = model_class(args_class.from_dict(source.config))
        zeros = [(t.name, mx.zeros(t.target.shape, dtype=self._dtypes[t.name])) for t in self.plan.tensors]
        self._load(zeros)
        self.model.eval()

    def _load(self, zeros: list[tuple[str, Any]]) -> None:
        """As mlx-lm loads a folder of this layout: a model may learn there that its head is tied (gemma3)."""
        if hasattr(self.model, "sanitize"):
            zeros = list(self.model.sanitize(dict(zeros)).items())
        self.model.load_weights(zeros, strict=True)

    def take_over(self) -> None:
        """Gives each module whose blocks are taken over its quantized form."""
        import mlx.core as mx
        import mlx.nn as nn

        from mlxquant.tensors import DTYPES

        codecs = {t.name.removesuffix(".weight"): t.codec for t in self.plan.tensors if t.codec.quantized}
        nn.quantize(self.model, class_predicate=lambda path, _: codecs[path].mlx_config() if path in codecs else False)
        parts = [part for t in self.plan.tensors if t.codec.quantized for part in t.parts]
        zeros = [(part.name, mx.zeros(part.shape, dtype=getattr(mx, DTYPES[part.dtype].label))) for part in parts]
        self.model.load_weights(zeros, strict=False)
        self._packed = True

    def fill(self, loaded: LoadedModel) -> None:
        """Reads the weights, one at a time. Raises SourceError when the file is short."""
        import mlx.core as mx

        for tensor in self.plan.tensors:
            if self._packed and tensor.repack:
                arrays = packed_arrays(self.source, tensor)
            else:
                array = gather(self.source, tensor.target)
                arrays = [(tensor.name, array.astype(mx.float32 if loaded.expanded else self._dtypes[tensor.name]))]
            mx.eval([array for _, array in arrays])
            self.model.load_weights(arrays, strict=False)


def plan_for(source: GGUFSource) -> Plan:
    """Blocks taken over; a file without any stays float."""
    from mlxquant.codecs.repacked import REPACKED
    from mlxquant.plan.plan import make_plan
    from mlxquant.plan.recipe import REPACK, settings

    if any(kind in REPACKED for kind in source.quantized.values()):
        return make_plan(source.config, source.specs, settings(recipe=REPACK), source.quantized)
    return make_plan(source.config, source.specs, settings(sets=(".*=keep",)), source.quantized)


def packed_arrays(source: GGUFSource, tensor: PlannedTensor) -> list[tuple[str, Any]]:
    """The parts of one tensor as mlx arrays. Raises SourceError."""
    import mlx.core as mx
    import numpy as np

    from mlxquant.convert.gather import chunks
    from mlxquant.convert.taken_over import block_rows, repack_named

    made = [repack_named(tensor, block_rows(source, tensor, a, b), a) for a, b in chunks(tensor.target)]
    parts = [np.concatenate(arrays) for arrays in zip(*made, strict=True)]
    return [(spec.name, mx.array(part.reshape(spec.shape))) for spec, part in zip(tensor.parts, parts, strict=True)]


def gather(source: Any, target: Any) -> Any:
    """One whole target as an mlx array in the dtype it is stored in."""
    import mlx.core as mx
    import numpy as np

    from mlxquant.convert.gather import chunks, rows

    raw = np.concatenate([rows(source, target, start, stop) for start, stop in chunks(target)])
    array = mx.array(raw.reshape(target.shape))
    return array.view(mx.bfloat16) if target.dtype == "BF16" else array
