"""What CapPa's decoder promises: ln V at first, causal where asked, and decoding that agrees with training."""

import math

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.models.caption_decoder import CaptionDecoder, CaptionDecoderSpec
from wlsup.objectives.captioning import parallel_attention, parallel_inputs

V, T, END = 50, 8, 3


@pytest.fixture
def decoder():
    made = CaptionDecoder(12, V, T, CaptionDecoderSpec(width=16, heads=2))
    torch.nn.init.normal_(made.predict.weight)
    return made


def causal(batch, length):
    return parallel_attention(torch.zeros(batch, dtype=torch.bool), length)


def test_the_first_loss_is_the_logarithm_of_the_vocabulary():
    decoder = CaptionDecoder(12, V, T, CaptionDecoderSpec(width=16, heads=2))
    logits = decoder(torch.randint(V, (2, T)), causal(2, T), torch.randn(2, 5, 12))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(V, (2 * T,)))
    assert float(loss) == pytest.approx(math.log(V), abs=1e-6)


def test_no_biases(decoder):
    assert not [name for name, _ in decoder.named_parameters() if name.endswith("bias")]


def test_word_after_word_no_later_word_changes_an_earlier_prediction(decoder):
    inputs, memory = torch.randint(V, (2, T)), torch.randn(2, 5, 12)
    for position in range(1, T):
        other = inputs.clone()
        other[:, position:] = torch.randint(V, (2, T - position))
        one, two = (decoder(given, causal(2, T), memory) for given in (inputs, other))
        assert torch.allclose(one[:, :position], two[:, :position], atol=1e-6)


def test_the_picture_is_read_and_its_tokens_have_no_order(decoder):
    inputs, memory = torch.randint(V, (1, T)), torch.randn(1, 5, 12)
    one = decoder(inputs, causal(1, T), memory)
    assert not torch.allclose(one, decoder(inputs, causal(1, T), memory + 1), atol=1e-3)
    assert torch.allclose(one, decoder(inputs, causal(1, T), memory.flip(1)), atol=1e-5)


def test_decoding_word_after_word_is_what_the_whole_pass_says(decoder):
    memory = torch.randn(3, 5, 12)
    said = decoder.generate(memory, end_id=-1)
    shifted = parallel_inputs(said, torch.zeros(3, dtype=torch.bool), decoder.mask_id, decoder.start_id)
    assert torch.equal(decoder(shifted, causal(3, T), memory).argmax(-1), said)
    assert said.shape == (3, T)


def test_decoding_stops_when_every_caption_has_ended(decoder):
    with torch.no_grad():
        decoder.norm.weight.zero_()
    # All logits are equal: token 0 is the likeliest everywhere.
    assert decoder.generate(torch.randn(3, 5, 12), end_id=0).shape == (3, 1)


def test_decoding_all_at_once_is_one_pass_over_mask_tokens(decoder):
    memory = torch.randn(3, 5, 12)
    all_at_once = torch.ones(3, dtype=torch.bool)
    inputs = parallel_inputs(torch.zeros(3, T, dtype=torch.int64), all_at_once, decoder.mask_id, decoder.start_id)
    wanted = decoder(inputs, parallel_attention(all_at_once, T), memory).argmax(-1)
    assert torch.equal(decoder.generate(memory, END, parallel=True), wanted)


def test_what_cannot_be_is_refused(decoder):
    with pytest.raises(WlsupError, match="multiple of the heads"):
        CaptionDecoderSpec(width=10, heads=4)
    with pytest.raises(WlsupError, match="9 tokens do not fit a caption decoder of 8"):
        decoder(torch.zeros(1, 9, dtype=torch.int64), causal(1, 9), torch.randn(1, 5, 12))
