"""Calibration: every rank gets the same plausible machine, its file is read back, and misuse is refused."""

import dataclasses
import itertools

import pytest
import torch
import yaml

import sap_hf
from sap_hf.cli import main
from sap_hf.planning.cost import Shape
from sap_hf.planning.hardware import find_hardware
from sap_hf.runtime import calibrate as module
from sap_hf.runtime import transport
from tests.dist import run_ranks


class Slow(transport.Transport):
    """A wire that takes 1 ms for each message and 1 us per KiB: what calibration must find again."""

    SECONDS, BYTES_PER_S = 1e-3, 1e9

    def post(self, sends, receives, group):
        pending = super().post(sends, receives, group)
        wait, size = pending.wait, sum(tensor.nbytes for _, tensor in sends)

        def late():
            wait()
            module.time.sleep(len(sends) * self.SECONDS + size / self.BYTES_PER_S)

        pending.wait = late
        return pending


def measure(rank, world, per_node, slow=False):
    module.SECONDS, module.LONG = 0.02, 0.02
    shape = Shape(2, 1, 32)
    with transport.using(Slow() if slow else transport.current()):
        return module.calibrate("here", shape, torch.device("cpu"))


def test_all_ranks_get_the_same_machine():
    found = run_ranks(measure, 2, 2, env={"LOCAL_WORLD_SIZE": "2"})
    assert found[0] == found[1]
    assert (found[0].name, found[0].ranks_per_node) == ("here", 2)


def test_two_nodes_are_measured_apart():
    found = run_ranks(measure, 4, 2, env={"LOCAL_WORLD_SIZE": "2"})[0]
    assert found.ranks_per_node == 2
    assert 0 <= found.contention < 1
    assert found.network_alone_bytes_per_s >= found.network_bytes_per_s
    assert found.node_bytes_per_s != found.network_bytes_per_s


def test_a_slow_wire_is_found():
    found = run_ranks(measure, 2, 2, True, env={"LOCAL_WORLD_SIZE": "2"})[0]
    node, message = found.node_bytes_per_s, found.message_seconds
    assert Slow.BYTES_PER_S / 8 < node < Slow.BYTES_PER_S
    # A difference of two measurements, of which a busy machine may lengthen one.
    assert message > Slow.SECONDS / 2


def contended(rank, world, slowed):
    """What is measured beside an exchange of 20 ms, of a kernel of 40 ms that loses `slowed` of its speed to it."""
    under_way = []

    class Wire(transport.Transport):
        def post(self, sends, receives, group):
            pending = super().post(sends, receives, group)
            wait, done = pending.wait, module.time.perf_counter() + 0.02
            under_way.append(done)

            def late():
                wait()
                module.time.sleep(max(done - module.time.perf_counter(), 0))
                under_way.clear()

            pending.wait = late
            return pending

    def compute():
        module.time.sleep(0.04 + (0.02 * slowed if under_way else 0))

    module.SECONDS = 0.2
    with transport.using(Wire()):
        return module._contention(compute, 1, world, 1e5, torch.device("cpu"))


def test_a_kernel_that_loses_speed_to_an_exchange_is_found():
    found = run_ranks(contended, 2, 0.5, env={"LOCAL_WORLD_SIZE": "2"})[0]
    assert 0.35 < found < 0.75
    assert run_ranks(contended, 2, 0.0, env={"LOCAL_WORLD_SIZE": "2"})[0] < 0.2


def late(rank, world, apart):
    """What a blocking exchange costs where one rank computes longer in one round, and the other one in the next."""
    rounds = itertools.count(rank)

    def compute():
        module.time.sleep(0.04 + (apart if next(rounds) % 2 else -apart))

    module.SECONDS = 0.4
    return module._blocking_seconds(compute, world, torch.device("cpu"))


def test_waiting_for_ranks_that_come_late_is_found():
    env = {"LOCAL_WORLD_SIZE": "2"}
    assert 0.01 < run_ranks(late, 2, 0.02, env=env)[0] < 0.035
    assert run_ranks(late, 2, 0.0, env=env)[0] < 0.01


def test_a_rate_and_what_a_row_costs_are_told_apart():
    rows, document, flops_per_pair, rate, tile = 2048, 256, 2048.0, 5e10, 180.0
    one, many = (
        (rows * (length + 1) / 2 + tile * rows) * flops_per_pair / rate for length in (rows, document)
    )
    found = module.rate_and_row(rows, document, one, many, flops_per_pair)
    assert found == pytest.approx((rate, tile))
    # Short documents that take no longer than their pairs, or longer than a long one: nothing is known of rows.
    for strange in (one * document / rows, 1.1 * one):
        found, row = module.rate_and_row(rows, document, one, strange, flops_per_pair)
        assert (found, row) == (pytest.approx(rows * (rows + 1) / 2 * flops_per_pair / one), 0.0)


def write(rank, world, path):
    module.SECONDS, module.LONG = 0.02, 0.02
    return main(["bench", "--calibrate", path, "--heads", "2:1", "--head-dim", "32"])


def test_the_file_is_a_hardware(tmp_path):
    path = tmp_path / "here.yaml"
    assert run_ranks(write, 2, str(path), init=False, env={"LOCAL_WORLD_SIZE": "2"}) == [0, 0]
    assert dataclasses.asdict(find_hardware(str(path))) == yaml.safe_load(path.read_text())
    assert sap_hf.plan([5, 3], cp_size=2, hardware=str(path)).hardware.name == "here"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["here.yaml"], "torchrun"),
        (["here.txt"], ".yaml"),
        (["here.yaml", "--heads", "3:2"], "multiple"),
    ],
)
def test_misuse_is_refused(arguments, reason, capsys, monkeypatch):
    if reason == "torchrun":
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", "0")
    assert main(["bench", "--calibrate", *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_one_process_has_nothing_to_send():
    assert "torchrun" in run_ranks(alone, 1)[0]


def alone(rank, world):
    try:
        module.calibrate("here", Shape(), torch.device("cpu"))
    except sap_hf.errors.LayoutError as error:
        return str(error)
