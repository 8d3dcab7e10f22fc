"""Everything that sap_hf raises on purpose.

    SapError
    ├── ConfigError           an option or YAML key that does not exist or cannot have this value
    ├── LayoutError           numbers of processes, ranks or heads that do not fit together
    ├── DocumentError         boundaries that do not describe whole documents (cu_seqlens, position_ids, masks)
    ├── DataError             examples that cannot be packed or collated
    ├── TensorError           q, k, v whose shape, dtype or device the plan cannot use
    ├── UnsupportedAttention  a model, layer or kernel that cannot be computed exactly
    ├── UnsupportedTrainer    a trainer, or an option of it, that would be fed one shard instead of the batch
    └── BatchMismatch         ranks that share a pack were given different batches, or one of them refused its batch

A message says what was asked, what was found and what to do. It is raised on every rank alike, before the
first collective: one rank that raises alone would leave the others waiting.
"""


class SapError(Exception):
    """Root of all errors that sap_hf raises on purpose."""


class ConfigError(SapError, ValueError):
    """An option or YAML key that does not exist, or cannot have this value."""


class LayoutError(SapError, ValueError):
    """Numbers of processes, ranks or heads that do not fit together."""


class DocumentError(SapError, ValueError):
    """Boundaries that do not describe whole documents."""


class DataError(SapError, ValueError):
    """Examples that cannot be packed or collated."""


class TensorError(SapError, ValueError):
    """q, k, v whose shape, dtype or device the plan cannot use."""


class UnsupportedAttention(SapError, NotImplementedError):
    """A model, layer or kernel that cannot be computed exactly."""


class UnsupportedTrainer(SapError, NotImplementedError):
    """A trainer, or an option of it, that would silently be fed one shard instead of the batch."""


class BatchMismatch(SapError, RuntimeError):
    """Ranks that share a pack were given different batches, or one of them refused its batch."""
