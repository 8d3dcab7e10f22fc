"""Named workloads: whole packs of documents, the same for everybody who asks with the same seed."""

import numpy as np
import pytest

from sap_hf.errors import ConfigError
from sap_hf.planning import workloads

ROWS = (1, 2, 7, 100, 4096, 32768)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_lengths_sum_to_the_rows_of_the_pack(name):
    for rows in ROWS:
        for seed in range(5):
            lengths = workloads.pack(name, rows, np.random.default_rng(seed))
            assert lengths.dtype == np.int64 and lengths.ndim == 1
            assert lengths.min() >= 1 and lengths.sum() == rows


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_the_seed_decides_the_pack(name):
    def draw(seed):
        return workloads.pack(name, 65536, np.random.default_rng(seed)).tolist()

    assert draw(3) == draw(3)
    if name not in ("one", "one_row", "just_over"):
        assert draw(3) != draw(4)


def many(name, rows=1 << 22):
    return workloads.pack(name, rows, np.random.default_rng(0))


def share_between(lengths, low, high):
    return ((lengths >= low) & (lengths <= high)).mean()


@pytest.mark.parametrize("name", ["magi", "magi_uncapped"])
def test_magi_follows_its_histogram(name):
    lengths = many(name, 1 << 24)
    # Of 13,444,515 documents: 3,794,735 have 201 to 500 rows, 3,316,785 have 501 to 1024, 18,284 above 131,072.
    assert share_between(lengths, 201, 500) == pytest.approx(0.2823, abs=0.02)
    assert share_between(lengths, 501, 1024) == pytest.approx(0.2467, abs=0.02)
    assert 0 < share_between(lengths, 131073, 196608) < 0.005


def test_magi_is_cut_at_a_quarter_of_the_pack_and_magi_uncapped_is_not():
    longest = {
        name: max(workloads.pack(name, 65536, np.random.default_rng(seed)).max() for seed in range(40))
        for name in ("magi", "magi_uncapped")
    }
    assert longest["magi"] == 16384 < longest["magi_uncapped"]


def test_megatron_is_lognormal_between_128_and_8192():
    lengths = many("megatron")
    # The last document is cut to fit, so one may be shorter.
    assert (lengths < 128).sum() <= 1 and lengths.max() == 8192
    # exp(ln(1024) - 1.5**2 / 2)
    assert np.median(lengths) == pytest.approx(332, rel=0.1)


def test_chatqa2_has_the_published_shares():
    lengths = many("chatqa2", 1 << 25)
    for bound, share in ((1024, 0.219), (4096, 0.315), (8192, 0.404)):
        assert (lengths < bound).mean() == pytest.approx(share, abs=0.03)
    assert lengths.max() <= 32768


def test_short_has_median_400():
    assert np.median(many("short")) == pytest.approx(400, rel=0.05)


def test_the_adversarial_packs_are_what_they_say():
    assert workloads.pack("one", 1000, np.random.default_rng(0)).tolist() == [1000]
    assert workloads.pack("one_row", 7, np.random.default_rng(0)).tolist() == [1] * 7
    over = workloads.pack("just_over", 8 * 100, np.random.default_rng(0))
    assert sorted(over.tolist()) == [93] + [101] * 7
    assert workloads.pack("half", 8000, np.random.default_rng(0)).max() >= 4000
    assert workloads.pack("padding", 9000, np.random.default_rng(0))[-1] == 3000


def test_an_unknown_workload_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="magi"):
        workloads.pack("maggi", 100, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="rows=0"):
        workloads.pack("magi", 0, np.random.default_rng(0))
