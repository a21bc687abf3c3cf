"""full: the contrastive loss alone, in the whole encoder, unless reconstruction is given a weight."""

import torch

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.objectives.two_branch import ObjectiveSpec

Full = approach_class("full")


def test_the_objective_is_contrast_alone_and_reconstruction_where_it_has_a_weight():
    batch = CaptionBatch(torch.randn(3, 3, 64, 64), ["a red square", "two stars", "a ring"], ["a", "b", "c"])
    assert set(Full().losses(batch)) == {"loss", "contrastive"}
    assert set(Full(objective=ObjectiveSpec()).losses(batch)) == {"loss", "contrastive", "reconstruction"}


def test_every_weight_of_the_encoder_trains_but_positions_and_the_decoder_only_where_it_is_used():
    for objective, decoder in ((ObjectiveSpec(reconstruction_weight=0.0), False), (ObjectiveSpec(), True)):
        approach = Full(objective=objective)
        trained = set(approach.plan.trained_names(approach))
        encoder = {name for name, _ in approach.named_parameters() if name.startswith("mae.encoder.")}
        assert encoder - trained == {"mae.encoder.backbone.pos_embed"}
        assert any(name.startswith("mae.decoder.") for name in trained) == decoder
