from autocompress.report.facts import DASH
from autocompress.report.search import additivity_table, phases_table


def trial(origin, spent, loss, tokens=1024, predicted=0.2, split="search"):
    return {
        "origin": origin,
        "spent": spent,
        "loss": loss,
        "tokens": tokens,
        "predicted": predicted,
        "split": split,
    }


TRIALS = [
    trial("uniform w3g64", 1000, 0.40, predicted=0.40),
    trial("ilp", 5000, 0.25, 512, 0.20),
    trial("ilp", 6000, 0.20, predicted=0.10),
    trial("refinement", 9000, 0.19, predicted=0.12),
    trial("refinement", 9500, 0.18, predicted=0.11),
    trial("refinement", 9600, 0.21, predicted=0.13),
    trial("refinement", 9900, 0.01, split="validate"),
]


def test_phases_pay_for_the_gradients_before_their_trials():
    rows = {row[0]: row[1:] for row in phases_table({"trials": TRIALS}).rows}
    assert rows["uniform w3g64"] == ("1", "1,000", "0.4000", DASH)
    assert rows["ilp"][:3] == ("2", "5,000", "0.2000")
    assert rows["ilp"][3].startswith("−50.0")
    assert rows["refinement"][:3] == ("3", "3,600", "0.1800"), "validation is not the search's"
    assert rows["refinement"][3].startswith("−10.0")


def test_losses_of_other_fidelities_are_not_compared():
    trials = [trial("ilp", 100, 0.2), trial("surrogate", 200, 0.1, tokens=512)]
    assert [row[-1] for row in phases_table({"trials": trials}).rows] == [DASH, DASH]


def test_additivity_compares_sums_with_measurements():
    rows = {row[0]: row[1:] for row in additivity_table({"trials": TRIALS}).rows}
    assert rows["uniform w3g64"] == ("1", "1.00", DASH)
    assert rows["ilp"] == ("2", "1.62", DASH)
    assert rows["refinement"][2] == "0.98"


def test_what_has_no_prediction_is_left_out():
    trials = [trial("ilp", 100, 0.2, predicted=None), trial("ilp", 200, None)]
    assert additivity_table({"trials": trials}).rows == ()
    assert phases_table({}).rows == ()
