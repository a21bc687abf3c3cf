"""``wlsup fit``: captions in, a k-NN table against the pretrained encoder out."""

from __future__ import annotations

from wlsup.approaches import approach_class
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.recipes import approach_named_in

__all__ = ["run"]


def run(arguments: list[str]) -> int:
    """Train one approach and print what it did to the encoder."""
    name = approach_named_in(arguments)
    log_to_terminal()
    from wlsup.cli.configuration import configure
    from wlsup.cli.training import train
    from wlsup.data.datamodule import CaptionDataModule

    cli = configure(approach_class(name), CaptionDataModule, arguments, "fit")
    return train(cli)
