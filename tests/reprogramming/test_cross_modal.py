"""What cross-modal programs promise: the published layout, clamping and regulariser; tokens where patches were."""

import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.reprogramming.cross_modal import PatchProgram, TextProgramSpec, TokenProgram, encode_tokens, open_base_image

SPEC = ImageSpec(size=8, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1), resize=8)


@pytest.fixture
def encoder():
    return build_vision(VisionSpec()).eval()


def test_each_token_is_a_patch_of_pixels_row_by_row():
    program = PatchProgram(9, SPEC, 4)
    ids = torch.tensor([[5, 2, 7, 0]])
    images, clamped, squares = program(ids)
    pixels = program.pixels.of(images)[0]
    patches = torch.tanh(program.weight).view(9, 3, 4, 4)
    for slot, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        expected = (patches[ids[0, slot]] + 1) / 2
        assert torch.allclose(pixels[:, row : row + 4, column : column + 4], expected, atol=1e-6)
    assert clamped == 0
    assert torch.isclose(squares.sqrt(), patches[ids[0]].norm())
    assert program.slots == 4


def test_over_a_base_image_patches_are_added_in_normalised_space_and_clamped():
    base = torch.full((3, 8, 8), 0.9)
    program = PatchProgram(9, SPEC, 4, base, alpha=0.5)
    with torch.no_grad():
        program.weight.fill_(20.0)
    images, clamped, _ = program(torch.zeros(1, 4, dtype=torch.int64))
    # 0.9 + 0.5 * std: 1.025, 1.0 and 0.95 by channel; only the first leaves the range
    expected = torch.tensor([1.0, 1.0, 0.95]).view(3, 1, 1).expand(3, 8, 8)
    assert torch.allclose(program.pixels.of(images)[0], expected, atol=1e-5)
    assert clamped >= 1 / 3 - 1e-6
    assert torch.allclose(program.pixels.of(program.bare())[0], base, atol=1e-6)


def test_patches_that_do_not_fill_the_canvas_are_refused():
    with pytest.raises(WlsupError, match="must be a multiple"):
        PatchProgram(9, SPEC, 3)


def test_tokens_get_mean_and_deviation_of_the_networks_own(encoder):
    program = TokenProgram(500, encoder.embed_dim)
    ids = torch.arange(500).view(10, 50)
    with pytest.raises(WlsupError, match="calibrate"):
        program(ids)
    images = torch.randn(4, 3, 64, 64)
    program.calibrate(encoder, images)
    own = encoder.backbone.patch_embed(images).reshape(-1, encoder.embed_dim)
    assert torch.allclose(program.mean, own.mean(0), atol=1e-5)
    assert torch.allclose(program.std, own.std(0), atol=1e-5)
    wide = 3 + torch.randn(4, 64, encoder.embed_dim) * torch.linspace(1, 9, encoder.embed_dim)
    program.calibrate(SimpleNamespace(backbone=SimpleNamespace(patch_embed=lambda images: wide)), images)
    tokens = program(ids).reshape(-1, encoder.embed_dim)
    assert ((tokens.mean(0) - program.mean).abs() < 0.3 * program.std).all()
    assert ((tokens.std(0) / program.std - 1).abs() < 0.3).all()
    raw = TokenProgram(500, encoder.embed_dim, match="none")
    assert torch.equal(raw(ids), torch.tanh(raw.weight[ids]))


def test_patch_embeddings_given_as_tokens_are_the_picture(encoder):
    images = torch.randn(2, 3, 64, 64)
    tokens = encoder.backbone.patch_embed(images).reshape(2, 64, -1)
    before = copy.deepcopy(encoder.state_dict())
    assert torch.equal(encode_tokens(encoder, tokens), encoder.features(images))
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert torch.equal(encode_tokens(encoder, tokens), encoder.features(images))  # and no hook is left
    with pytest.raises(WlsupError, match="pad them"):
        encode_tokens(encoder, tokens[:, :5])


def test_appended_tokens_stand_behind_the_patches_with_positions(encoder):
    images, seen = torch.randn(1, 3, 64, 64), []
    handle = encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    tokens = torch.randn(2, 3, encoder.embed_dim)
    encode_tokens(encoder, tokens, "append", images)
    encoder.features(images)
    handle.remove()
    skip = encoder.num_prefix_tokens
    assert seen[0].shape[1] == seen[1].shape[1] + 3
    assert torch.equal(seen[0][:1, : skip + 64], seen[1])
    assert torch.allclose(
        seen[0][:, -3:] - tokens, encoder.backbone.pos_embed[:, skip : skip + 3].expand(2, -1, -1), atol=1e-6
    )
    swapped = encode_tokens(encoder, tokens.flip(1), "append", images)
    assert not torch.allclose(swapped, encode_tokens(encoder, tokens, "append", images), atol=1e-4)
    with pytest.raises(WlsupError, match="cut them"):
        encode_tokens(encoder, torch.randn(1, 65, encoder.embed_dim), "append")


@pytest.mark.parametrize("slots", ["replace", "append"])
def test_gradient_checkpointing_changes_no_gradient(slots):
    tokens, gradients = torch.randn(2, 64, 96), []
    for checkpointing in (False, True):
        encoder = build_vision(VisionSpec(gradient_checkpointing=checkpointing)).eval().requires_grad_(False)
        own = tokens.clone().requires_grad_(True)
        encode_tokens(encoder, own, slots).square().sum().backward()
        gradients.append(own.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-6)


def test_appended_tokens_go_through_the_norm_before_the_blocks_as_the_patches_do():
    clip = "vit(img_size=32,patch_size=8,embed_dim=48,depth=1,num_heads=3,pre_norm=True)"
    encoder, seen = build_vision(VisionSpec(pretrained=False, architecture=clip)).eval(), []
    encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encode_tokens(encoder, 100 * torch.randn(2, 3, encoder.embed_dim), "append")
    assert seen[0].shape[1] == encoder.num_prefix_tokens + 16 + 3
    assert torch.allclose(seen[0][:, -3:].std(-1, unbiased=False), torch.ones(2, 3), atol=1e-3)


def test_gradients_reach_the_program_through_the_frozen_network(encoder):
    encoder.requires_grad_(False)
    program = TokenProgram(11, encoder.embed_dim, "none")
    encode_tokens(encoder, program(torch.randint(11, (2, 64)))).sum().backward()
    assert program.weight.grad.abs().max() > 0


def test_a_base_image_is_a_picture_file(tmp_path):
    Image.new("RGB", (20, 10), (255, 0, 51)).save(tmp_path / "red.png")
    picture = open_base_image(str(tmp_path / "red.png"), 8)
    assert torch.allclose(picture[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]), atol=1e-3)
    assert picture.shape == (3, 8, 8)
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nowhere.png"):
        with pytest.raises(WlsupError, match="program.base_image"):
            open_base_image(str(tmp_path / name), 8)


@pytest.mark.parametrize(
    ("space", "unread"),
    [
        ("input", {"slots": "append"}),
        ("input", {"match": "none"}),
        ("input", {"alpha": 0.5}),
        ("token", {"alpha": 0.5, "base_image": "red.png"}),
    ],
    ids=str,
)
def test_an_option_that_the_space_does_not_read_is_refused(space, unread):
    with pytest.raises(WlsupError, match=f"leave program.{next(iter(unread))} out"):
        TextProgramSpec(space=space, **unread)


@pytest.mark.parametrize("wrong", [{"space": "sound"}, {"slots": "between"}, {"match": "all"}, {"alpha": 0.0}], ids=str)
def test_an_unknown_setting_is_refused(wrong):
    with pytest.raises(WlsupError):
        TextProgramSpec(**wrong)
