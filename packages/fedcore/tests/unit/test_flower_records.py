"""Trees through Flower's records and messages, bit for bit; the engine over nodes in this process."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from polymodal.nested import difference

pytest.importorskip("flwr")

from fedcore import RoundError, Simulation
from fedcore.algorithms import ALGORITHMS, create
from fedcore.flower import InProcessGrid, attach, client_app, remote_clients, to_record, to_tree
from fedcore.flower.nodes import Nodes
from fedcore.flower.protocol import Answer, Order, ProtocolError, plain
from fedcore.flower.records import Encoder
from flwr.app import ArrayRecord, RecordDict


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_flower{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


engines = _load("_engines")


# ------------------------------------------------------------------ records

EVERY = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64,
]  # fmt: skip


def bits(value):
    return bytes(value.contiguous().view(-1).view(torch.uint8).numpy()) if value.numel() else b""


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(EVERY),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_tensor_comes_back_with_its_bits(dtype, shape, seed):
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))  # NaNs of all kinds
    raw = raw % 2 if dtype == torch.bool else raw
    value = raw.clone().view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    back = to_tree(to_record({"a": value}))["a"]
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert bits(back) == bits(value)


def test_what_is_special_among_tensors():
    tree = {
        "": torch.tensor(-0.0),
        "slope": torch.arange(12.0).view(3, 4).t(),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "strided": torch.arange(10)[::3],
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }
    back = to_tree(to_record(tree))
    assert list(back) == list(tree)
    for name, value in tree.items():
        assert torch.equal(back[name], value.detach()), name
        assert not back[name].requires_grad
    assert math.copysign(1, back[""]) == -1
    assert to_tree(to_record({})) == {}
    assert to_tree(None) == {}


def test_tensors_of_a_record_start_where_torch_starts_them():
    """Matrix products can differ in the last bit with the place of a tensor in its cache line."""
    for size in (3, 17, 1000):
        back = to_tree(to_record({"a": torch.randn(size)}))["a"]
        assert back.data_ptr() % 64 == torch.empty(size).data_ptr() % 64


def test_flower_reads_our_records_and_we_read_its_own():
    theirs = ArrayRecord({"w": torch.randn(2, 3)})
    assert np.array_equal(to_record(to_tree(theirs))["w"].numpy(), theirs["w"].numpy())


def test_a_tensor_is_turned_to_bytes_once():
    encoder, shared = Encoder(), torch.ones(3)
    assert encoder.record({"a": shared})["a"] is encoder.record({"b": shared})["b"]


def test_pickled_objects_and_unknown_formats_are_refused():
    record = to_record({"a": torch.ones(2, dtype=torch.bfloat16)})
    record["a"].dtype = "Tensor"
    with pytest.raises(ValueError, match="unknown number format 'Tensor'"):
        to_tree(record)
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    record["a"].stype, record["a"].data = "numpy.ndarray", buffer.getvalue()
    with pytest.raises(ValueError, match="pickle"):
        to_tree(record)


def test_messages_of_others_are_refused():
    for content in (RecordDict(), plain({"schema_version": 99})):
        with pytest.raises(ProtocolError):
            Order.from_content(content)
        with pytest.raises(ProtocolError):
            Answer.clients(content)


# ------------------------------------------------------------------ the engine over nodes in this process


def over_grid(sim, nodes=2, **options):
    """The same simulation on nodes in this process, whose models and data are a second copy."""
    twin = options.pop("twin")
    grid = InProcessGrid(client_app(lambda context: twin.federation), nodes)
    attach(sim, grid, options.pop("timeout", 5.0))
    return grid


def both(algorithm, model=engines.mlp, data=engines.clients, nodes=2, rounds=None, **options):
    serial = engines.simulate(algorithm, model(), data(), **options)
    other, twin = (engines.simulate(algorithm, model(), data(), **options) for _ in range(2))
    over_grid(other, nodes, twin=twin)
    rows = engines.run(serial, rounds), engines.run(other, rounds)
    assert not difference(engines.state(serial), engines.state(other))
    assert rows[0] == rows[1]
    return other


QUICK = ("fedavg", "scaffold", "fedmuon", "ilora", "dp_fedpgn", "dp_scaffold")
"""one of each kind; all others are run by ``-m slow``"""
NAMES = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ALGORITHMS.names()]


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_has_the_bits_of_serial(name):
    both(create(name, lr=0.05), rounds=3, **engines.federation_of(name))


@pytest.mark.parametrize("nodes", [1, 3, 6, 9])
def test_the_number_of_nodes_changes_no_bit(nodes):
    both(create("fedmoswa", lr=0.05, option="I"), nodes=nodes)


def test_buffers_counters_frozen_weights_and_dropout():
    def model():
        torch.manual_seed(4)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 3)
        )

    sim = both(create("scaffold", lr=0.05), model, lambda: engines.clients((7, 12, 5, 9, 12, 6)))
    assert int(sim.buffers["1.num_batches_tracked"]) > 0
    both(create("fedadamw", lr=0.01), engines.Convolution, weighting="samples")


def test_ranks_and_weights_that_move():
    class Moving(type(create("fedavg"))):
        """Adds the round to a frozen weight, more of it for larger ranks."""

        shifts_base = True

        def base_shift(self, server, params, ctx, client):
            return {"frozen.weight": torch.full((8, 8), 0.01 * client.rank * ctx.round)}

        def evaluation_shift(self, server, params):
            return {}

    sim = both(Moving(lr=0.05), lambda: lambda rank: engines.Convolution(), ranks=[1, 2, 1, 2, 1, 2])
    assert sim.ranks == [1, 2, 1, 2, 1, 2]


def test_all_uploads_at_once():
    class Listed(type(create("scaffold"))):
        reduction = "list"

        def server_step(self, server, params, reduced, ctx):
            total = {name: sum(weight * kept[name] for _, weight, kept in reduced) for name in reduced[0][2]}
            return super().server_step(server, params, total, ctx)

    both(Listed(lr=0.05))


def test_the_plan_is_the_servers():
    """Seeds, batches and epochs of the node's own federation are not used."""
    serial, other = (engines.simulate(create("fedavg", lr=0.05), seed=3) for _ in range(2))
    twin = engines.simulate(create("fedavg", lr=0.05), seed=8, batch_size=2, local_epochs=1)
    over_grid(other, twin=twin)
    assert engines.run(serial) == engines.run(other)


# ------------------------------------------------------------------ state


def scaffold(**options):
    sim, twin = (engines.simulate(create("scaffold", lr=0.05), **options) for _ in range(2))
    return sim, over_grid(sim, twin=twin)


def test_states_are_kept_by_nodes_and_sent_down_once():
    sim, grid = scaffold(cohorts=[[0, 1], [0, 2], [0, 1]])
    sent = []
    grid.before = lambda message: sent.append({n for n in message.content if n.endswith(".state")})
    engines.run(sim)
    assert not any(sent), "the nodes have made them and kept them"
    kept = {n for context in grid.contexts.values() for n in context.state if n.startswith("fedcore.states.")}
    assert kept == {f"fedcore.states.{i}" for i in (0, 1, 2)}
    for context in grid.contexts.values():
        for name in kept & set(context.state):
            state = to_tree(context.state[name])
            assert not difference(state, dict(sim.client_states[int(name.rpartition(".")[2])]))


def test_a_resumed_run_has_the_same_bits_and_sends_states_down():
    whole = engines.simulate(create("scaffold", lr=0.05))
    engines.run(whole)
    first, _ = scaffold()
    engines.run(first, 2)
    rest, grid = scaffold()
    rest.load_state_dict(first.state_dict())
    sent = []
    grid.before = lambda message: sent.extend(n for n in message.content if n.endswith(".state"))
    engines.run(rest, 2)
    assert not difference(engines.state(whole), engines.state(rest))
    assert sorted(set(sent)) == [f"{i}.state" for i in range(6)], "those of the first two rounds, once"
    assert len(sent) == 6


def test_a_simulation_that_goes_back_on_the_same_nodes_has_the_same_bits():
    """The nodes have newer states by then, and must not use them."""
    cohorts = [[0, 1, 2, 3, 4, 5]] * 4
    whole = engines.simulate(create("scaffold", lr=0.05), cohorts=cohorts)
    engines.run(whole)
    sim, _ = scaffold(cohorts=cohorts)
    sim.round()
    sim.round()
    kept = copy.deepcopy(sim.state_dict())
    sim.round()
    sim.load_state_dict(kept)
    sim.round()
    sim.round()
    assert not difference(engines.state(whole), engines.state(sim))


def test_a_round_that_is_given_up_leaves_states_as_they_were():
    class Fragile(type(create("scaffold"))):
        broken = False

        def server_step(self, server, params, reduced, ctx):
            flat, server = super().server_step(server, params, reduced, ctx)
            return (flat * math.nan if type(self).broken else flat), server

    sim, twin = (engines.simulate(Fragile(lr=0.05)) for _ in range(2))
    over_grid(sim, twin=twin)
    sim.round()
    sim.round()
    Fragile.broken = True
    with pytest.raises(RoundError, match="not finite"):
        sim.round()
    Fragile.broken = False
    sim.round()
    sim.round()
    whole = engines.simulate(create("scaffold", lr=0.05))
    engines.run(whole)
    assert not difference(engines.state(whole), engines.state(sim))


def test_a_node_that_forgot_a_state_drops_its_client_once(caplog):
    sim, grid = scaffold(cohorts=[[0, 1]] * 3)
    sim.round()
    for context in grid.contexts.values():
        context.state = RecordDict()
    with pytest.raises(RoundError, match="lost the state of client 0"):
        sim.round()
    assert sim.round()["clients"] == 2, "the server sends its copy"


# ------------------------------------------------------------------ nodes that fail


def test_a_node_that_goes_in_a_round_is_missing_in_that_round_alone(caplog):
    """As if its clients' data could not be read in the serial engine."""

    class Unread:
        broken = False

        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def batch(self, indices, generator):
            if Unread.broken:
                raise OSError("gone")
            return self.dataset[indices]

    sim, grid = scaffold()
    serial = engines.simulate(
        create("scaffold", lr=0.05), data=[d if i % 2 else Unread(d) for i, d in enumerate(engines.clients())]
    )
    lost = next(n for n, context in grid.contexts.items() if context.node_config["partition-id"] == 0)

    def leave(message):
        if message.metadata.message_type == "train":
            grid.offline = {lost}

    rows = []
    for round in range(4):
        grid.before = leave if round == 1 else lambda message: None
        Unread.broken = round == 1
        rows.append((sim.round(), serial.round()))
        grid.offline = set()
    assert [row["clients"] for row, _ in rows] == [3, 3, 6, 2]
    assert all(row["loss"] == other["loss"] and row["clients"] == other["clients"] for row, other in rows)
    assert not difference(engines.state(serial), engines.state(sim))
    assert "client 4 dropped: node" in caplog.text
    assert "no answer within 5 s" in caplog.text


def test_a_node_whose_app_raises_and_a_client_that_fails_are_dropped(caplog):
    sim, grid = scaffold(cohorts=[[0, 1, 2]] * 2)

    def fail(message):
        if message.metadata.message_type == "train" and "1.params" in message.content:
            raise RuntimeError("no space left")

    grid.before = fail
    assert sim.round()["clients"] == 2
    assert "no space left" in caplog.text


def test_a_node_that_is_not_there_and_one_that_takes_over(caplog):
    sim, twin = (engines.simulate(create("fedavg", lr=0.05)) for _ in range(2))
    grid = over_grid(sim, nodes=2, twin=twin)
    lost = next(n for n, context in grid.contexts.items() if context.node_config["partition-id"] == 1)
    grid.offline = {lost}
    assert sim.round()["clients"] == 2
    assert "no connected node hosts client 1" in caplog.text
    grid.offline = set()
    assert sim.round()["clients"] == 4, "a node that came later is asked then"


def test_another_algorithm_or_other_data_is_said(caplog):
    sim = engines.simulate(create("fedavg", lr=0.05))
    over_grid(sim, twin=engines.simulate(create("fedavg", lr=0.1)))
    with pytest.raises(RoundError, match=r"the node runs FedAvg\(lr=0.1,"):
        sim.round()
    sim = engines.simulate(create("fedavg", lr=0.05))
    over_grid(sim, twin=engines.simulate(create("fedavg", lr=0.05), data=engines.clients((8, 12, 6, 9, 12, 1))))
    sim.round()
    assert "client 0 has 8 samples here, 7 on the server" in caplog.text


def test_nodes_without_a_partition_or_with_different_counts_are_said(caplog):
    sim, grid = scaffold()
    for context in grid.contexts.values():
        del context.node_config["partition-id"]
    with pytest.raises(RoundError, match="no connected node hosts client"):
        sim.round()
    assert "--node-config 'partition-id=0 num-partitions=2'" in caplog.text
    sim, grid = scaffold()
    next(iter(grid.contexts.values())).node_config["num-partitions"] = 5
    with pytest.raises(UserError, match="nodes disagree"):
        sim.round()


def test_an_upload_that_is_not_finite_and_one_that_cannot_be_read(caplog):
    class Broken(type(create("fedavg"))):
        def decode(self, upload):
            return {"delta": upload["delta"] * math.inf} if upload["delta"][0] > 0 else {"delta": upload["sum"]}

    sim, twin = (engines.simulate(Broken(lr=0.05)) for _ in range(2))
    over_grid(sim, twin=twin)
    with pytest.raises(RoundError, match="not finite|cannot be used"):
        sim.round()


# ------------------------------------------------------------------ data that the nodes alone have


def test_a_server_without_data():
    data = engines.clients()
    serial, twin = engines.simulate(create("fedmoswa", lr=0.05)), engines.simulate(create("fedmoswa", lr=0.05))
    nodes = Nodes(InProcessGrid(client_app(lambda context: twin.federation), 3))
    nodes.wait(3)
    clients = remote_clients(nodes, (torch.zeros(6), torch.tensor(0)))
    assert [len(client) for client in clients] == [len(d) for d in data]
    sim = Simulation(
        engines.mlp(), clients, create("fedmoswa", lr=0.05), batch_size=4, local_epochs=2, cohorts=engines.COHORTS,
        rounds=4,
    )  # fmt: skip
    attach(sim, nodes)
    assert engines.run(serial) == engines.run(sim)
    assert not difference(engines.state(serial), engines.state(sim))
    del nodes.samples[0]
    with pytest.raises(UserError, match="a node is missing"):
        remote_clients(nodes, None)


def test_waiting_for_nodes_that_do_not_come():
    nodes = Nodes(InProcessGrid(client_app(lambda context: engines.simulate(create("fedavg")).federation), 1))
    with pytest.raises(UserError, match="1 of 2 nodes are connected after 0 s; start flower-supernode there"):
        nodes.wait(2, timeout=0.0, poll=0.0)


# ------------------------------------------------------------------ Flower's own face


def test_a_strategy_runs_the_same_rounds():
    from fedcore.flower import FlowerStrategy

    serial, sim, twin = (engines.simulate(create("scaffold", lr=0.05)) for _ in range(3))
    engines.run(serial)
    grid = InProcessGrid(client_app(lambda context: twin.federation), 2)
    strategy = FlowerStrategy(sim)
    result = strategy.start(grid, strategy.arrays(), num_rounds=4)
    assert not difference(engines.state(serial), engines.state(sim))
    assert not difference(to_tree(result.arrays), dict(serial.params))
    assert result.train_metrics_clientapp[4]["clients"] == 2


def test_a_strategy_passes_errors_on():
    from fedcore.flower import FlowerStrategy

    sim = engines.simulate(create("fedavg", lr=0.05))
    strategy = FlowerStrategy(sim)
    twin = engines.simulate(create("fedavg", lr=0.1))
    with pytest.raises(RoundError, match="the node runs"):
        strategy.start(InProcessGrid(client_app(lambda context: twin.federation), 2), strategy.arrays(), num_rounds=1)


# ------------------------------------------------------------------ the package


def test_importing_turns_off_what_would_be_sent_and_loads_neither_flower_nor_torch():
    code = (
        "import os, sys, fedcore.flower; "
        "assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0' and os.environ['FLWR_DISABLE_UPDATE_CHECK'] == '1'; "
        "assert not {'flwr', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, "fedcore.flower")
    with pytest.raises(UserError, match=r"pip install 'polymodal-fedcore\[flower\]'"):
        engines.simulate(create("fedavg"), engine="flower")
