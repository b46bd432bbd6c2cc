"""What is known of transformers' models, whatever the architecture.

- where things are: layers (:func:`find_blocks`), attention and FFNs in them (:func:`find_sublayer`,
  :func:`find_feed_forwards`), the task's head (:func:`find_head`)
- which model it is: :func:`fingerprint`, :func:`check_fingerprint`
- a forward pass: what adapted layers share (:class:`ForwardContext`), masks (:class:`SparseMask`), auxiliary losses
  (:class:`AuxiliaryLosses`), passes that run a part of the layers (:class:`PartialPasses`)
- its loss without all of its logits at once (:func:`language_model_loss`, :func:`deferred_logits`)
- its linear layers by oneDNN (:func:`use_onednn`)
- labels (:class:`Labels`, :class:`LabelState`), and tensors in a lower precision (:func:`quantize`,
  :func:`cast_for_saving`)
"""

from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.auxiliary_loss import AuxiliaryLosses
from sparsepeft.models.blocks import Block, find_blocks, is_norm, named_modules, unwrap
from sparsepeft.models.context import BASE, ForwardContext, Routing
from sparsepeft.models.head_search import HeadSpec, find_head, is_language_model
from sparsepeft.models.heads import count_head_parameters
from sparsepeft.models.identity import backbone_parameters, check_fingerprint, fingerprint, is_quantized
from sparsepeft.models.labels import Labels, LabelState
from sparsepeft.models.logits import DeferredLogits, deferred_logits, language_model_loss
from sparsepeft.models.masks import SparseMask
from sparsepeft.models.onednn import use_onednn
from sparsepeft.models.partial import PartialPasses
from sparsepeft.models.quantized import cast_for_saving, dequantize, quantize
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards, find_sublayer

__all__ = [
    "BASE",
    "AdapterDict",
    "AuxiliaryLosses",
    "Block",
    "DeferredLogits",
    "FeedForward",
    "ForwardContext",
    "HeadSpec",
    "LabelState",
    "Labels",
    "PartialPasses",
    "Routing",
    "SparseMask",
    "backbone_parameters",
    "cast_for_saving",
    "check_fingerprint",
    "count_head_parameters",
    "deferred_logits",
    "dequantize",
    "find_blocks",
    "find_feed_forwards",
    "find_head",
    "find_sublayer",
    "fingerprint",
    "is_language_model",
    "is_norm",
    "is_quantized",
    "language_model_loss",
    "named_modules",
    "quantize",
    "unwrap",
    "use_onednn",
]
