"""``wlsup pretrain``: a ViT by MAE on pictures alone, saved so that ``--model.encoder.weights DIR`` loads it."""

from __future__ import annotations

import logging

from wlsup.cli.configuration import configure
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.training import train

__all__ = ["run"]

logger = logging.getLogger("wlsup")


def run(arguments: list[str]) -> int:
    """Pretrain, and save encoder and decoder under the run's folder as ``model/``."""
    log_to_terminal()
    from wlsup.approaches.mae import MAEPretraining
    from wlsup.data.image_datamodule import ImageDataModule
    from wlsup.models.mae import save_mae

    cli = configure(MAEPretraining, ImageDataModule, arguments, "pretrain")
    code = train(cli)
    if cli.trainer.is_global_zero and not code:
        folder = cli.run_dir / "model"
        save_mae(cli.model.mae, folder)
        logger.info("encoder and decoder in %s: --model.encoder.weights %s", folder, folder)
    return code
