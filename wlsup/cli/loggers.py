"""The two loggers of a run, TensorBoard and metrics.csv, which a resumed run goes on writing in the same folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

__all__ = ["run_loggers"]


class _MetricsFile(CSVLogger):
    """Lightning's CSVLogger, which deletes what a folder holds, with the rows up to the resumed step kept.

    Args:
        folder: the run's.
        kept_until: steps after which a row belongs to work that is done again; None keeps nothing.
    """

    def __init__(self, folder: Path, kept_until: int | None) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)
        self._kept_until = kept_until

    @property
    def experiment(self) -> Any:
        """The writer; its first use moves the earlier rows over."""
        if self._experiment is None and self._kept_until is not None:
            rows = _rows(Path(self.log_dir) / "metrics.csv", self._kept_until)
            self._kept_until = None
            writer = super().experiment
            if rows and hasattr(writer, "metrics"):  # of rank 0; other ranks have none
                writer.metrics = rows
                writer.save()
            return writer
        return super().experiment


def run_loggers(folder: Path, resumed_step: int | None) -> list[Logger]:
    """Return TensorBoard's and the CSV logger of a run's folder.

    Args:
        folder: the run's.
        resumed_step: optimizer steps that the checkpoint holds, None for a run from the start. What was logged for
            later ones before the run was cut off is done again: TensorBoard is told to forget it.
    """
    purge = {} if resumed_step is None else {"purge_step": resumed_step + 1}
    return [
        TensorBoardLogger(folder, name="", version="", default_hp_metric=False, **purge),
        _MetricsFile(folder, resumed_step),
    ]


def _rows(path: Path, until: int) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = []
    for row in rows:
        try:
            step = int(float(row.get("step") or "nan"))
        except ValueError:  # a line that was being written when the run was cut off
            continue
        # The trainer counts from 0: its row of step M is the first that a checkpoint after M steps does not hold. What
        # callbacks measure stands at the number of steps made.
        trainers = row.get("epoch") or any(value for key, value in row.items() if key and key.startswith("lr-"))
        if step + bool(trainers) <= until:
            kept.append({key: value for key, value in row.items() if key and value not in ("", None)} | {"step": step})
    return kept
