"""The two loggers of a run, TensorBoard and metrics.csv, which a resumed run goes on writing in the same folder."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from wlsup.files import write_text

__all__ = ["run_loggers"]

_BEFORE = ".metrics.before.csv"
"""The rows of a run that goes on, until they are written anew."""


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
        if self._experiment is not None:
            return self._experiment
        if self._kept_until is not None:
            path, until, self._kept_until = Path(self.log_dir) / "metrics.csv", self._kept_until, None
            before = path.with_name(_BEFORE)
            rows = _rows(before if before.is_file() else path, until)
            if rank_zero_only.rank == 0 and path.is_file() and not before.is_file():
                path.replace(before)  # the writer deletes what it finds
            writer = self._whole(super().experiment)
            if hasattr(writer, "metrics"):  # of rank 0; other ranks have none
                writer.metrics = rows
                writer.save()
                before.unlink(missing_ok=True)
            return writer
        return self._whole(super().experiment)

    def _whole(self, writer: Any) -> Any:
        """Have a new column's file written beside the old one, which Lightning empties first."""
        if hasattr(writer, "_rewrite_with_new_header"):
            writer._rewrite_with_new_header = partial(_rewrite, writer, Path(self.log_dir) / "metrics.csv")
        return writer


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


def _rewrite(writer: Any, path: Path, columns: list[str]) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        before, rows = list(reader.fieldnames or ()), list(reader)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    try:
        write_text(path, text.getvalue())
    except OSError:
        writer.metrics_keys = before  # the columns are new when the rows are saved again, too
        raise


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
