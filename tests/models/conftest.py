"""Every rank of these tests needs transformers: the fork server loads it once for all."""

from tests import dist

dist.PRELOAD += [name for name in ("transformers.modeling_utils",) if name not in dist.PRELOAD]
