"""Every rank of these tests needs transformers and trl: the fork server loads them once for all."""

from collections.abc import Iterator

import pytest

from tests import dist

dist.PRELOAD += [
    name for name in ("transformers.trainer", "trl.trainer.sft_trainer", "peft") if name not in dist.PRELOAD
]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
