"""Zero-shot: CLIP's rule by hand, chance for what knows nothing, prompts for every set."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from wlsup.data.evalsets import eval_set_names
from wlsup.errors import WlsupError
from wlsup.evaluation.zero_shot import Prompts, class_embeddings, read_prompts, zero_shot


def test_a_class_is_the_mean_of_its_sentences_directions():
    table = {"a cat": torch.tensor([2.0, 0.0]), "the cat": torch.tensor([0.0, 1.0]), "a sea lion": torch.ones(2)}
    table["the sea lion"] = -torch.ones(2) * torch.tensor([1.0, -1.0])
    prompts = Prompts(("a {}", "the {}"), {"lion": "sea lion"}, "here")
    found = class_embeddings(lambda sentences: torch.stack([table[s] for s in sentences]), ["cat", "lion"], prompts)
    # unit first, then the mean: (1, 0) and (0, 1) give the diagonal; (1, 1) and (-1, 1) give (0, 1)
    assert torch.allclose(found, torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.0, 1.0]]), atol=1e-6)


def test_the_nearest_class_is_named_with_an_interval_and_chance_beside_it():
    classes = torch.eye(4)
    labels = torch.arange(100) % 4
    pictures = normalize(classes[labels] + 0.2, dim=1)
    pictures[:10] = classes[(labels[:10] + 1) % 4]
    found = zero_shot(pictures, labels, classes)
    assert (found["accuracy"], found["chance"], found["n"]) == (0.9, 0.25, 100)
    assert found["ci95"] == pytest.approx([0.8256343, 0.9447709], abs=1e-6)  # Wilson's of 90 in 100
    collapsed = zero_shot(torch.ones(100, 4) / 2, labels, classes)
    assert collapsed["accuracy"] == 0.25


def test_noise_stays_at_chance():
    generator = torch.Generator().manual_seed(0)
    pictures = normalize(torch.randn(2000, 16, generator=generator), dim=1)
    classes = normalize(torch.randn(10, 16, generator=generator), dim=1)
    found = zero_shot(pictures, torch.randint(10, (2000,), generator=generator), classes)
    assert found["ci95"][0] <= found["chance"] <= found["ci95"][1]


@pytest.mark.parametrize("name", eval_set_names())
def test_every_set_has_prompts_of_its_own_with_the_class_in_each(name):
    prompts = read_prompts(name)
    assert prompts.source == f"{name}.txt"
    assert all("{}" in template for template in prompts.templates)
    assert len(set(prompts.templates)) == len(prompts.templates)
    assert all("some class" in sentence for sentence in prompts.of("some_class"))


def test_a_set_of_ones_own_has_the_default_prompts_or_a_file_of_ones_own(tmp_path):
    assert read_prompts("xrays").source == "default.txt"
    file = tmp_path / "mine.txt"
    file.write_text("# mine\nan x-ray of {}\n\nn1 = a lung\n")
    assert read_prompts("xrays", file).of("n1") == ["an x-ray of a lung"]
    for text, said in (("n1 = a lung\n", "no template"), ("an x-ray\n", "neither a template")):
        file.write_text(text)
        with pytest.raises(WlsupError, match=said):
            read_prompts("xrays", file)
    with pytest.raises(WlsupError, match="cannot be read"):
        read_prompts("xrays", tmp_path / "none.txt")


def test_what_does_not_fit_is_refused():
    with pytest.raises(WlsupError, match="one width"):
        zero_shot(torch.ones(3, 2), torch.zeros(3), torch.ones(4, 3))
    with pytest.raises(WlsupError, match="diverged"):
        zero_shot(torch.full((3, 2), math.nan), torch.zeros(3), torch.ones(4, 2))
