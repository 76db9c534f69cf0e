"""The shared contract of method tables, held by the table of federated algorithms."""

from fedcore.algorithm import Algorithm
from fedcore.algorithms import ALGORITHMS
from polymodal import checks

OPTIONS = {row.name: {"lr": 0.05} for row in ALGORITHMS}
TIER_1 = {"fedswa", "fedmoswa", "fedadamw", "fedmuon", "ilora", "dp_fedpgn"}
TIER_2 = {
    *("fedavg", "fedprox", "scaffold", "fedcm", "fedsam", "fedasam", "mofedsam", "fedlesam", "fedacg", "feddyn"),
    *("local_adamw", "local_muon", "agg_v", "fedlada", "fedadam"),
    *("dp_fedavg", "dp_fedsam", "fed_smp", "dp_blur", "dp_scaffold", "dp_fedcm"),
    *("fedit", "ffa_lora", "rolora", "flora", "flexlora", "hetlora", "fedex_lora", "lora_fair"),
}
TIER_3 = {
    *("fedgamma", "fednsam", "fedspeed", "server_swa", "agg_vm", "fedyogi", "fedadagrad"),
    *("fedcm_adamw", "scaffold_adamw", "local_adam", "agg_m", "lora_head", "dp_mofedsam"),
}


def test_table_of_algorithms():
    checks.check_registry(ALGORITHMS, (), OPTIONS, base=Algorithm)
    checks.check_registry(ALGORITHMS, (), base=Algorithm)


def test_table_has_the_promised_names_in_their_tiers():
    tiers = {row.name: next(tag for tag in row.tags if tag.startswith("tier")) for row in ALGORITHMS}
    promised = {"tier1": TIER_1, "tier2": TIER_2, "tier3": TIER_3}
    assert tiers == {name: tier for tier, names in promised.items() for name in names}


def test_tags_say_what_is_trained():
    adapted = {row.name for row in ALGORITHMS if ALGORITHMS.load(row.name).adapters}
    assert adapted == {row.name for row in ALGORITHMS if "lora" in row.tags}
    private = {row.name for row in ALGORITHMS if ALGORITHMS.load(row.name).private}
    assert private == {row.name for row in ALGORITHMS if "dp" in row.tags}


def test_tag_state_says_what_clients_keep():
    kept = {row.name: ALGORITHMS.load(row.name).keeps_state for row in ALGORITHMS}
    assert {name for name, keeps in kept.items() if keeps} == {row.name for row in ALGORITHMS if "state" in row.tags}
