"""The plan gives back what was measured, and its terms follow their formulas."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wlsup.cli import main
from wlsup.cli.plan_scale import APPROACHES, ENCODERS, LANGUAGE, Cluster, Job, plan, size
from wlsup.errors import WlsupError

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks" / "approaches_gpu.json").read_text())["runs"][0]
MEASURED = {  # one H100, ViT-B/16, bf16, batch 64: pictures a second, MiB of activations
    name: (row["pictures_per_second"], row["peak_mib"])
    for row in RECORD["rows"]
    if (name := row["name"].replace(", top 4", "_top_4")) in APPROACHES and APPROACHES[name].measured
}


@pytest.mark.parametrize("approach", MEASURED)
def test_what_was_measured_comes_out_again(approach):
    speed, activations = MEASURED[approach]
    found = plan(Job(approach), Cluster(workers=10**6))
    text = 1 + 5.9e9 / (APPROACHES[approach].work * 34.9e9)  # CLIP's text encoder, which that run did not have
    assert 1e3 * 64 / found["milliseconds"]["compute"] * text == pytest.approx(speed, rel=0.05)
    assert 1024 * found["memory_gib"]["activations"] == pytest.approx(activations, rel=0.02)
    assert not found["estimated"]


def test_every_approach_has_a_plan():
    from wlsup.approaches import APPROACHES as ALL

    assert set(APPROACHES) - {"film_top_4", "bottleneck_top_4"} == set(ALL)
    assert set(MEASURED) == {name for name, approach in APPROACHES.items() if approach.measured}
    for name in APPROACHES:
        assert main(["plan-scale", name, "--json"]) == 0


def test_it_is_told_where_a_branch_is_not_planned(capsys):
    assert main(["plan-scale", "film"]) == 0
    assert "of its main branch alone" in capsys.readouterr().out
    assert main(["plan-scale", "full"]) == 0
    assert "branch alone" not in capsys.readouterr().out


def test_the_paper_preset_of_full_is_met_within_a_tenth():
    found = plan(Job("full", batch=256, precision="16"), Cluster())
    assert found["pictures_per_second"] == pytest.approx(1433, rel=0.1)
    assert 1024 * sum(found["memory_gib"].values()) == pytest.approx(18476, rel=0.1)


def test_parameters_are_the_published_ones_but_for_embeddings_and_norms():
    published = {"vit_small": 22e6, "vit_base": 86e6, "vit_large": 304e6, "vit_huge": 632e6}
    for name, count in published.items():
        assert size(Job(encoder=name)).encoder == pytest.approx(count, rel=0.04)
    for name, count in {"gpt2": 124e6, "opt-1.3b": 1.3e9, "gpt-j-6b": 6.05e9, "llama-7b": 6.7e9}.items():
        assert size(Job("magma", language=name)).language == pytest.approx(count, rel=0.07)
    assert set(ENCODERS) >= set(published) and len(LANGUAGE) == 5


def test_gradients_take_twice_their_bytes_over_the_slowest_link():
    found = plan(Job("full"), Cluster(nodes=4, gpus_per_node=6, link=24, workers=10**6))
    trained = found["parameters"]["trained"]
    rate = 0.8e9 * 24 / 6  # six GPUs share their node's link
    assert found["milliseconds"]["all-reduce"] == pytest.approx(1e3 * 2 * 23 / 24 * 4 * trained / rate)
    alone = plan(Job("full"), Cluster(workers=10**6))
    assert alone["milliseconds"]["all-reduce"] == alone["milliseconds"]["all-gather"] == 0
    assert alone["efficiency"] == 1


def test_slower_links_and_more_nodes_never_help():
    shares = [
        plan(Job("full"), Cluster(n, 4, link=link))["efficiency"] for n, link in ((1, 25), (2, 25), (8, 25), (8, 2))
    ]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] > 0


def test_fsdp_divides_language_model_and_experts_and_gathers_weights():
    cluster = Cluster(2, 4)
    for experts, mixture in ((0, "adapters"), (8, "adapters"), (8, "ffn")):
        job = Job("magma_moe" if experts else "magma", language="gpt-j-6b", experts=experts, mixture=mixture)
        whole, apart = plan(job, cluster), plan(replace(job, strategy="fsdp"), cluster)
        model, mixture = size(job), size(job).trained_experts / max(size(job).expert_layers, 1)
        kept = (4 * model.encoder + 2 * 50_400 * 4096) / 2**30  # the encoder and the words' embeddings
        unit = max(2 * 12 * 4096**2, 4 * mixture) / 2**30  # one is whole at a time
        rest = whole["memory_gib"]["weights"] - kept
        assert apart["memory_gib"]["weights"] == pytest.approx(kept + rest / 8 + unit)
        for part, held in (("gradients", 4), ("optimizer", 8)):
            saved = held * model.trained_experts * 7 / 8 / 2**30
            saved -= 4 * mixture / 2**30 if part == "gradients" else 0
            assert apart["memory_gib"][part] == pytest.approx(whole["memory_gib"][part] - saved)
    job = Job("magma", language="gpt-j-6b")
    whole, apart = plan(job, cluster), plan(replace(job, strategy="fsdp"), cluster)
    assert apart["memory_gib"]["activations"] == whole["memory_gib"]["activations"]
    assert apart["milliseconds"]["all-gather"] > whole["milliseconds"]["all-gather"] == 0
    assert whole["memory_gib"]["weights"] > 11  # GPT-J's weights in half precision


def test_experts_cost_memory_and_only_spread_ones_an_all_to_all():
    dense = plan(Job("magma", language="gpt2"), Cluster(2, 4))
    mixed = plan(Job("magma_moe", language="gpt2", experts=8, mixture="ffn"), Cluster(2, 4))
    spread = plan(Job("magma_moe", language="gpt2", experts=8, mixture="ffn", shard_experts=True), Cluster(2, 4))
    assert mixed["memory_gib"]["weights"] > spread["memory_gib"]["weights"] > dense["memory_gib"]["weights"]
    for kept in ("gradients", "optimizer"):  # of spread experts each GPU keeps an eighth
        assert spread["memory_gib"][kept] < mixed["memory_gib"][kept] / 2
    assert spread["milliseconds"]["all-reduce"] < mixed["milliseconds"]["all-reduce"] / 2
    assert mixed["milliseconds"]["all-to-all"] == 0 < spread["milliseconds"]["all-to-all"]


def test_experts_are_counted_as_the_approach_makes_them():
    magma, adapters, copies = (
        size(job)
        for job in (
            Job("magma", language="gpt2"),
            Job("magma_moe", language="gpt2", experts=4, k=2),
            Job("magma_moe", language="gpt2", experts=4, k=1, mixture="ffn"),
        )
    )
    assert adapters.trained_experts == 2 * (magma.trained - adapters.trained)  # 4 of half the channels
    assert adapters.trained_experts == pytest.approx(7_156_224, rel=0.02)  # docs/approaches/magma_moe.md
    assert copies.trained_experts == pytest.approx(113_356_800, rel=0.002)
    assert copies.trained == adapters.trained == magma.encoder
    dense = 6 * 6 * 8 * 768**2 * (196 + 32)
    assert copies.flops - magma.flops == pytest.approx((4.1 - 2 / 3) * dense)
    assert plan(Job("magma_moe", language="gpt2", experts=4), Cluster())["estimated"]
    assert plan(Job("full", encoder="vit_huge"), Cluster())["estimated"]


def test_few_loaders_bound_the_step():
    found = plan(Job("lit"), Cluster(workers=1))
    assert found["bound_by"] == "data"
    assert found["pictures_per_second"] == pytest.approx(179)


def test_a_v100_has_no_bfloat16():
    with pytest.raises(WlsupError, match="V100 has no bf16"):
        plan(Job(precision="bf16"), Cluster(gpu="v100"))


def test_the_command_tells_memory_time_and_what_was_not_measured(capsys):
    assert main(["plan-scale", "full", "--batch", "256", "--nodes", "4", "--gpus-per-node", "6", "--gpu", "v100"]) == 0
    out = capsys.readouterr().out
    assert "4 x 6 v100" in out and "too much for 16 GB" in out and "an estimate" in out
    assert "all-reduce" in out and "efficiency" in out
    assert main(["plan-scale", "magma_moe", "--json"]) == 0
    job = json.loads(capsys.readouterr().out)["job"]
    assert (job["language"], job["experts"], job["k"], job["mixture"]) == ("gpt2", 4, 2, "adapters")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "0"], "at least 1"),
        (["magma", "--experts", "4"], "--experts is of magma_moe's experts; magma has none"),
        (["--link", "0", "--nodes", "2"], "link and intra, GB/s, must be more than 0"),
        (["--intra", "-1"], "link and intra"),
        (["magma_moe", "--k", "0"], "a --k between 1 and them"),
        (["film", "--experts", "0"], "--experts is of magma_moe's experts; film has none"),
        (["magma", "--shard-experts"], "--shard-experts is of magma_moe's experts"),
        (["--strategy", "fsdp"], "plan mae_lm, linear_map, magma"),
        (["full", "--language", "gpt2"], "full has no language model"),
        (["magma", "--language", "none"], "magma needs a --language"),
        (["magma_moe", "--experts", "0"], "at least one of --experts"),
        (["fulll"], "plan-scale --help"),
    ],
)
def test_a_mistake_is_one_message(options, said, capsys):
    assert main(["plan-scale", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
