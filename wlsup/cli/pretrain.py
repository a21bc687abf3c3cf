"""``wlsup pretrain``: a ViT by MAE on pictures alone, saved so that ``--model.encoder.weights DIR`` loads it."""

from __future__ import annotations

import logging

from wlsup.cli.configuration import configure, train
from wlsup.cli.logs import log_to_terminal

__all__ = ["run"]

logger = logging.getLogger("wlsup")


def run(arguments: list[str]) -> int:
    """Pretrain, and save encoder and decoder under the run's folder as ``model/``."""
    log_to_terminal()
    from wlsup.approaches.mae import MAEPretraining
    from wlsup.data.image_datamodule import ImageDataModule
    from wlsup.models.mae import save_mae

    cli = configure(MAEPretraining, ImageDataModule, arguments, "pretrain")
    train(cli)
    if cli.trainer.is_global_zero:
        folder = cli.run_dir / "model"
        save_mae(cli.model.mae, folder)
        logger.info("encoder and decoder in %s: --model.encoder.weights %s", folder, folder)
    return 0
