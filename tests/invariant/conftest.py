"""Every rank of these tests needs transformers and trl: the fork server loads them once for all."""

from tests.hf.conftest import _one_thread  # noqa: F401
