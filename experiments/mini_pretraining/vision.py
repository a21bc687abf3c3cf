"""The vision encoder: a ViT pretrained by masked reconstruction of plain scenes. No labels, no captions."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_pretraining.common import Progress, decayed, learning_rate, seed_everything
from wlsup.batch import ImageSpec
from wlsup.data.mini import MINI_EVAL_SETS, mini_eval_set, normalised, pretraining_pictures
from wlsup.evaluation.knn import knn_predict
from wlsup.models.mae import DecoderSpec, MaskedAutoencoder, build_mae, save_mae
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.objectives.reconstruction import reconstruction_loss

__all__ = ["make_vision", "measure", "neighbour_accuracies"]

ARCHITECTURE = "vit(img_size=64,patch_size=8,embed_dim=96,depth=6,num_heads=4,norm_eps=1e-6)"
SPEC = ImageSpec(size=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), resize=64)
# Seeds far from those a user would take for pictures of the pretrain split.
_PICTURE_SEED = 990_000
_K, _TEMPERATURE = 20, 0.07


def new_autoencoder(seed: int) -> MaskedAutoencoder:
    """The untrained model of the recipe."""
    seed_everything(seed)
    spec = VisionSpec(pretrained=False, architecture=ARCHITECTURE, pooling="mean")
    mae = build_mae(spec, DecoderSpec(width=64, depth=2, heads=4))
    mae.encoder.image_spec = SPEC
    return mae


@torch.no_grad()
def _features(encoder: VisionEncoder | None, images: Tensor) -> Tensor:
    """An encoder's features, or with None the pixels themselves, (n, D)."""
    if encoder is None:
        return images.flatten(1)
    encoder.eval()
    return torch.cat([encoder.features(some) for some in images.split(250)])


def neighbour_accuracies(encoder: VisionEncoder | None, names: tuple[str, ...] = MINI_EVAL_SETS) -> dict[str, float]:
    """k-NN (cosine, k = 20, T = 0.07) on the mini sets, of an encoder or, with None, of raw pixels."""
    found = {}
    for name in names:
        sets = mini_eval_set(name, SPEC)
        (bank, labels), (queries, targets) = sets.train.tensors(), sets.test.tensors()
        bank, queries = (F.normalize(_features(encoder, images), dim=1) for images in (bank, queries))
        predicted = knn_predict(bank, labels, queries, k=_K, temperature=_TEMPERATURE)
        found[name] = round(predicted.eq(targets).float().mean().item(), 4)
    return found


def measure(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """k-NN of the encoder as it lies in ``folder``, of the same one untrained, and of raw pixels."""
    return {
        "pretrained": neighbour_accuracies(build_vision(VisionSpec(weights=str(folder)))),
        "random_encoder": neighbour_accuracies(new_autoencoder(seed).encoder),
        "raw_pixels": neighbour_accuracies(None),
    }


def make_vision(
    folder: Path, *, steps: int, seed: int, batch: int = 32, peak: float = 1e-3, mask_ratio: float = 0.75
) -> dict[str, object]:
    """Pretrain the autoencoder on pictures that it sees once each, and write it to ``folder`` for `build_mae`."""
    mae = new_autoencoder(seed)
    random_encoder = neighbour_accuracies(mae.encoder)
    print(f"vision  k-NN of the random encoder {random_encoder}", flush=True)
    optimizer = torch.optim.AdamW(decayed([mae], 0.05), lr=peak, betas=(0.9, 0.95))
    progress = Progress("vision", steps)
    for step in range(steps):
        mae.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        images = normalised(pretraining_pictures(batch, _PICTURE_SEED + seed, step * batch), SPEC)
        output = mae(images, mask_ratio=mask_ratio)
        loss = reconstruction_loss(output.prediction, images, output.mask, mae.patch_size, mae.normalize_pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mae.parameters(), 1.0)
        optimizer.step()
        progress.update(step, reconstruction=loss)
        if (step + 1) % 1000 == 0 and step + 1 < steps:
            save_mae(mae, folder, torch.float16)
            print(f"vision  k-NN {neighbour_accuracies(mae.encoder)}", flush=True)
    save_mae(mae, folder, torch.float16)
    knn = measure(folder, seed)
    print(f"vision  k-NN {knn}", flush=True)
    return {
        "recipe": "MAE on plain scenes, each seen once; no augmentation, no labels, no captions",
        "architecture": ARCHITECTURE,
        "parameters": {
            "encoder": sum(p.numel() for p in mae.encoder.parameters()),
            "decoder": sum(p.numel() for p in mae.decoder.parameters()),
        },
        "pictures": steps * batch,
        "steps": steps,
        "batch": batch,
        "learning_rate": peak,
        "mask_ratio": mask_ratio,
        "normalized_pixels": mae.normalize_pixels,
        "loss": {key: round(value, 4) for key, value in progress.smooth.items()},
        "knn_protocol": f"cosine, k = {_K}, temperature = {_TEMPERATURE}, 1,000 train and 500 test pictures a set",
        "knn": knn,
        "seed": seed,
    }
