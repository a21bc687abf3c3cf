"""What masking saves, and what a whole MAE step costs beside transformers and lightly.

Run:  python benchmarks/mae.py [--json]

One thread, fp32, fused attention (torch's scaled_dot_product_attention) everywhere. Each pair times the baseline and
right after it the candidate, in CPU time of the process, which a busy machine disturbs less than the clock on the wall;
a row is the median over the pairs of candidate / baseline. A step is zero_grad, forward with fresh masks, the loss on
normalised pixels, backward and AdamW. The shapes are those of ViT-S/16 at 224 with MAE's own decoder (512 wide, 8
blocks, 16 heads). Peers that are not installed are named and left out:

    pip install transformers lightly
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wlsup.models.mae import DecoderSpec, build_mae
from wlsup.models.masking import random_masking
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.objectives.reconstruction import reconstruction_loss

Step = Callable[[], float]

SIZE, PATCH, WIDTH, DEPTH, HEADS = 224, 16, 384, 12, 6
ARCHITECTURE = f"vit(img_size={SIZE},patch_size={PATCH},embed_dim={WIDTH},depth={DEPTH},num_heads={HEADS})"
DECODER = DecoderSpec(width=512, depth=8, heads=16)
MASK_RATIO = 0.75


def seconds(step: Step) -> float:
    """Time one call, in CPU time."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def compare(baseline: Step, candidate: Step, pairs: int) -> dict[str, float]:
    """Interleave the two, the baseline re-timed before every candidate."""
    for step in (baseline, candidate):
        step()
    times = [(seconds(baseline), seconds(candidate)) for _ in range(pairs)]
    return {
        "ratio": statistics.median(after / before for before, after in times),
        "baseline_ms": 1e3 * statistics.median(before for before, _ in times),
        "candidate_ms": 1e3 * statistics.median(after for _, after in times),
    }


def encoder_steps(images: torch.Tensor) -> tuple[Step, Step]:
    """Forward and backward of the encoder, whole and at MASK_RATIO."""
    encoder: VisionEncoder = build_vision(VisionSpec(architecture=ARCHITECTURE, pretrained=False))

    def step(masked: bool) -> float:
        encoder.zero_grad(set_to_none=True)
        ids_keep = random_masking(len(images), (SIZE // PATCH) ** 2, MASK_RATIO)[0] if masked else None
        loss = encoder(images, ids_keep=ids_keep).tokens.square().mean()
        loss.backward()
        return loss.item()

    return lambda: step(False), lambda: step(True)


def training_step(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Step:
    """A whole step: zero_grad, forward, backward, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def ours(images: torch.Tensor) -> Step:
    """The suite's own masked autoencoder."""
    mae = build_mae(VisionSpec(architecture=ARCHITECTURE, pretrained=False), DECODER).train()

    def loss() -> torch.Tensor:
        output = mae(images, mask_ratio=MASK_RATIO, predict_kept=False)
        return reconstruction_loss(output.prediction, images, output.mask, PATCH)

    return training_step(mae, loss)


def transformers_step(images: torch.Tensor) -> Step:
    """The peer: transformers' ViTMAEForPreTraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        decoder_hidden_size=DECODER.width,
        decoder_num_hidden_layers=DECODER.depth,
        decoder_num_attention_heads=DECODER.heads,
        decoder_intermediate_size=4 * DECODER.width,
        image_size=SIZE,
        patch_size=PATCH,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).train()
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    return training_step(model, lambda: model(images).loss)


def lightly_step(images: torch.Tensor) -> Step:
    """The peer: lightly's modules, put together as its MAE example does: it predicts removed patches only."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0
    )

    class LightlyMAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.embed = nn.Linear(WIDTH, DECODER.width)
            self.decoder = MaskedVisionTransformerDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                embed_dim=DECODER.width,
                depth=DECODER.depth,
                num_heads=DECODER.heads,
            )
            self.predict = nn.Linear(DECODER.width, PATCH * PATCH * 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            batch, length = len(images), self.backbone.sequence_length
            idx_keep, idx_mask = utils.random_token_mask((batch, length), mask_ratio=MASK_RATIO)
            encoded = self.embed(self.backbone.encode(images, idx_keep=idx_keep))
            tokens = utils.repeat_token(self.decoder.mask_token, (batch, length))
            tokens = utils.set_at_index(tokens, idx_keep, encoded.type_as(tokens))
            predicted = self.predict(utils.get_at_index(self.decoder(tokens), idx_mask))
            # One less: the class token is not among the patches.
            target = utils.get_at_index(utils.patchify(images, PATCH), idx_mask - 1)
            return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target))

    model = LightlyMAE().train()
    model.backbone.mask_token.requires_grad_(False)  # unused: the encoder sees no mask tokens
    return training_step(model, lambda: model(images))


def main() -> int:
    """Print the table, or with --json the same as one JSON object; exits with 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs a row (default: 9)")
    parser.add_argument("--batch", type=int, default=4, help="pictures a step (default: 4)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, SIZE, SIZE)
    rows, absent = [], []

    def add(name: str, bar: float, baseline: Step, candidate: Step) -> None:
        row = {"name": name, "bar": bar, **compare(baseline, candidate, options.pairs)}
        rows.append({**row, "met": row["ratio"] <= bar})

    add(f"encoder forward+backward at mask ratio {MASK_RATIO} / whole", 0.29, *encoder_steps(images))
    own = ours(images)
    for library, make in (("transformers", transformers_step), ("lightly", lightly_step)):
        try:
            peer = make(images)
        except ImportError as error:
            absent.append(f"{library}: {error}")
            continue
        version = importlib.metadata.version(library)
        add(f"MAE training step, wlsup / {library} {version}", 1.0, peer, own)
        del peer

    report = {
        "batch": options.batch,
        "pairs": options.pairs,
        "torch": torch.__version__,
        "rows": rows,
        "absent": absent,
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        setting = f"batch {options.batch}, 1 thread, fp32, torch {torch.__version__}, {options.pairs} pairs"
        print(f"ViT-S/16@{SIZE}, {setting}\n")
        print(f"{'':62} {'baseline':>10} {'ours':>10} {'ratio':>7} {'bar':>7}")
        for row in rows:
            verdict = "met" if row["met"] else "MISSED"
            print(
                f"{row['name']:62} {row['baseline_ms']:7.0f} ms {row['candidate_ms']:7.0f} ms "
                f"{row['ratio']:6.3f}x {row['bar']:6.2f}x {verdict}"
            )
        for line in absent:
            print(f"left out, not installed: {line}")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
