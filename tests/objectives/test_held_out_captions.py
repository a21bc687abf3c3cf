"""What the table of a captioner promises: nats a token, a paired interval, somebody else's picture."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec
from wlsup.objectives.held_out_captions import (
    CaptionLosses,
    caption_losses,
    captioner_task,
    generated_captions,
    interval,
    likelier_row,
    loss_rows,
    next_pictures,
)

CAPTIONS = ["a red square left of a circle", "a kite", "a large blue dome on sand"]


def losses(*nats, tokens=(2.0, 3.0, 5.0)):
    return CaptionLosses(torch.tensor(nats, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64))


@pytest.fixture(scope="module")
def language():
    return LanguageModel(LanguageSpec())


def pairs(captions):
    return CaptionBatch(torch.zeros(len(captions), 3, 8, 8), captions, [f"k{i}" for i in range(len(captions))])


def test_the_mean_is_over_tokens_not_over_captions():
    assert losses(1.0, 2.0, 7.0).per_token == pytest.approx(1.0)
    (row,) = loss_rows({"it": losses(1.0, 2.0, 7.0)})
    assert row | {"ci95": None} == {"what": "it", "value": 1.0, "unit": "nats", "chance": None, "ci95": None}
    # rests of the ratio: 1 - 2, 2 - 3, 7 - 5 nats; Cochran's variance over ten tokens
    half = 1.96 * ((1 + 1 + 4) * 3 / 2) ** 0.5 / 10
    assert row["ci95"] == pytest.approx([1 - half, 1 + half])
    assert losses(1.0, tokens=(2.0,)).interval is None


def test_the_interval_is_paired_and_of_known_width():
    mean, half = interval(losses(2.0, 3.0, 10.0), losses(1.0, 2.0, 7.0))
    assert mean == pytest.approx(5 / 10)  # differences 1, 1, 3 over ten tokens
    assert half == pytest.approx(1.96 * (4 / 3) ** 0.5 * 3**0.5 / 10)
    assert interval(losses(2.0, 3.0, 8.0), losses(1.0, 2.0, 7.0))[1] == 0  # all alike: certain, whatever their spread


def test_likelier_counts_strictly():
    row = likelier_row(losses(1.0, 2.0, 7.0), losses(2.0, 2.0, 6.0))
    assert row["value"] == pytest.approx(100 / 3)
    assert row["chance"] == 50


def numbered(batch):
    """Each picture as the number that its pair's key ends in."""
    numbers = torch.tensor([float(key[1:]) for key in batch.keys])
    return VisionOutput(numbers[:, None], numbers[:, None, None])


def test_the_next_picture_is_another_pairs_also_in_a_last_batch_of_one():
    three, one = pairs(CAPTIONS), CaptionBatch(torch.zeros(1, 3, 8, 8), ["a dome"], ["k3"])
    see = next_pictures(numbered)
    moved = [see(batch) for batch in (three, one)]
    assert [seen.pooled.flatten().tolist() for seen in moved] == [[2.0, 0.0, 1.0], [0.0]]
    assert [seen.tokens.flatten().tolist() for seen in moved] == [[2.0, 0.0, 1.0], [0.0]]


def test_the_row_of_other_pictures_never_has_a_pairs_own(language):
    one = CaptionBatch(torch.zeros(1, 3, 8, 8), ["a dome"], ["k3"])
    shown = []

    def front(seen):
        shown.append(seen.pooled.flatten().tolist())
        return seen.pooled[:, None].expand(-1, 2, language.width)

    task = captioner_task(
        "it", language, numbered, front, [pairs(CAPTIONS), one], GenerationSpec(max_tokens=4), nullcontext
    )
    assert shown[:4] == [[0.0, 1.0, 2.0], [3.0], [2.0, 0.0, 1.0], [0.0]]
    assert task["rows"][3]["n"] == 4


def test_losses_are_transformers_own_of_each_caption_whatever_its_batch(language):
    start = language.embed(torch.tensor([[language.tokenizer.start_id]]))
    front = torch.randn(1, 4, language.width)
    for told, before in ((None, start), (lambda batch: front.expand(len(batch), -1, -1), front)):
        found = caption_losses(language, [pairs(CAPTIONS[:2]), pairs(CAPTIONS[2:])], told)
        for index, caption in enumerate(CAPTIONS):
            ids = language.tokenizer([caption]).ids
            with torch.no_grad():
                logits = language.model(inputs_embeds=torch.cat([before, language.embed(ids)], 1)).logits[0]
            own = F.cross_entropy(logits[before.shape[1] - 1 : -1], ids[0], reduction="sum")
            assert float(found.nats[index]) == pytest.approx(float(own), rel=1e-5)
            assert found.tokens[index] == ids.shape[1]


def test_generated_captions_stand_beside_their_pairs(language):
    said = generated_captions(language, torch.randn(2, 3, language.width), pairs(CAPTIONS), GenerationSpec())
    assert [pair["key"] for pair in said] == ["k0", "k1"]
    assert [pair["caption"] for pair in said] == CAPTIONS[:2]
    assert all(isinstance(pair["generated"], str) for pair in said)
