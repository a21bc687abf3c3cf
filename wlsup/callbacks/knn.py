"""k-NN before step 1, along the way and at the end: what captions did to the encoder, set by set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from wlsup.batch import EvalSet
from wlsup.callbacks.progress import progress
from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features, shared_features
from wlsup.evaluation.knn import KNNResult, knn_accuracy
from wlsup.evaluation.statistics import Interval, mean_of_intervals, paired_bootstrap

__all__ = ["KNN", "When", "domain_intervals", "domain_means", "evaluate_knn", "features_of", "score_knn"]

logger = logging.getLogger("wlsup")

When = Literal["pretrained", "along", "finetuned"]
Listener = Callable[[EvalSet, Features, Features, KNNResult, When], None]


def features_of(
    module: torch.nn.Module, eval_set: EvalSet, *, batch_size: int = 256, num_workers: int = 0
) -> tuple[Features, Features]:
    """Return a set's bank and queries as ``module.features`` sees them, in eval mode and fp32; the mode is put back.

    Several processes share the work, whole batches at a time, and all get all of it: to the bit what one process gets.

    Args:
        module: has ``features(images (B, 3, H, W)) -> (B, D)``.
        eval_set: bank and queries.
        batch_size: pictures a forward pass.
        num_workers: loader processes.
    """
    device = next(module.parameters()).device
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        parts = []
        for part in ("train", "test"):
            with progress(f"features of {eval_set.name}, {part}") as show:
                parts.append(
                    shared_features(
                        module.features,
                        getattr(eval_set, part),
                        batch_size=batch_size,
                        num_workers=num_workers,
                        device=device,
                        progress=show,
                    )
                )
    finally:
        for child, training in modes:
            child.training = training
    for part in parts:
        for reason in part.skipped:
            logger.warning("%s: left out %s", eval_set.name, reason)
    return parts[0], parts[1]


def score_knn(
    bank: Features,
    queries: Features,
    num_classes: int,
    *,
    k: int = 20,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> KNNResult:
    """Score features by DINO's protocol; a bank smaller than the headline k votes whole."""
    k = min(k, len(bank.labels))
    return knn_accuracy(bank, queries, k=k, ks=ks, temperature=temperature, num_classes=num_classes)


def evaluate_knn(
    module: torch.nn.Module,
    eval_set: EvalSet,
    *,
    k: int = 20,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    batch_size: int = 256,
    num_workers: int = 0,
) -> KNNResult:
    """Score one set by DINO's protocol with ``module.features``, in eval mode and fp32; the mode is put back after.

    Args:
        module: has ``features(images (B, 3, H, W)) -> (B, D)``.
        eval_set: bank and queries.
        k: the headline k.
        ks: further k, as far as the bank allows.
        temperature: of the vote.
        batch_size: pictures a forward pass.
        num_workers: loader processes.

    Returns:
        Accuracies, and which queries were right at the headline k.
    """
    bank, queries = features_of(module, eval_set, batch_size=batch_size, num_workers=num_workers)
    return score_knn(bank, queries, len(eval_set.class_names), k=k, ks=ks, temperature=temperature)


def domain_means(entries: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean delta in domain and out of domain, None where there is no such set."""
    means: dict[str, float | None] = {}
    for domain, name in (("in", "in_domain_delta"), ("out", "out_of_domain_delta")):
        deltas = [entry["delta"] for entry in entries.values() if entry["domain"] == domain]
        means[name] = sum(deltas) / len(deltas) if deltas else None
    return means


def domain_intervals(entries: dict[str, dict[str, Any]]) -> dict[str, list[float] | None]:
    """Return the 95 % intervals of `domain_means`, made of the sets' own (over test pictures, for this seed)."""
    intervals: dict[str, list[float] | None] = {}
    for domain, name in (("in", "in_domain_ci95"), ("out", "out_of_domain_ci95")):
        found = [Interval(one["delta"], *one["ci95"]) for one in entries.values() if one["domain"] == domain]
        intervals[name] = list(mean_of_intervals(found)[1:]) if found else None
    return intervals


class KNN(Callback):
    """Evaluate the pretrained encoder before step 1 and the fine-tuned one after, and log every difference.

    Source: Caron et al. 2021 (DINO), appendix "k-NN classification": cosine similarity, votes weighted by
    exp(similarity / 0.07), k = 20 the headline.

    Args:
        k: the headline k.
        ks: every k reported, as far as the bank allows.
        temperature: of the vote.
        every_n_epochs: also evaluate along training, every so many epochs; 0 evaluates at the start and the end only.
        batch_size: pictures a forward pass.
        num_workers: loader processes.
        bootstrap_resamples: of the test pictures, for each delta's 95 % interval.
    """

    def __init__(
        self,
        k: int = 20,
        ks: tuple[int, ...] = (10, 20, 100, 200),
        temperature: float = 0.07,
        every_n_epochs: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        bootstrap_resamples: int = 10_000,
    ) -> None:
        if k < 1 or any(other < 1 for other in ks):
            raise WlsupError(f"knn.k and knn.ks must be at least 1, not {k} and {tuple(ks)}.")
        self.k, self.ks, self.temperature = k, tuple(ks), temperature
        self.every_n_epochs, self.bootstrap_resamples = every_n_epochs, bootstrap_resamples
        self.batch_size, self.num_workers = batch_size, num_workers
        self.sets: list[EvalSet] = []
        self.pretrained: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.listeners: list[Listener] = []
        """Called with each set's features and result: other measures need not run the encoder again."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the pretrained encoder, unless a checkpoint brought the scores."""
        self.sets = trainer.datamodule.eval_datasets()
        missing = [eval_set for eval_set in self.sets if eval_set.name not in self.pretrained]
        if missing and trainer.ckpt_path:
            raise WlsupError(
                f"The checkpoint has no pretrained k-NN score for {', '.join(s.name for s in missing)}, and the "
                "encoder is trained by now. Resume with the run's own eval_sets."
            )
        start = pl_module if getattr(pl_module, "identity_at_start", True) else pl_module.pretrained()
        for eval_set in missing:
            result = self._evaluate(start, eval_set, "pretrained")
            self.pretrained[eval_set.name] = {"accuracy": dict(result.accuracy), "correct": result.correct}
        if missing:
            _log(trainer, self.baseline_metrics() | _limits({name: [0.0, 0.0] for name in self.pretrained}))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score along the way, where asked."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0 and epoch != trainer.max_epochs:
            self._compare(trainer, pl_module, "along")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score the fine-tuned encoder."""
        self._compare(trainer, pl_module, "finetuned")

    def baseline(self) -> dict[str, float]:
        """Return the pretrained encoder's accuracy at the headline k, by set."""
        return {name: score["accuracy"][self._k(score["accuracy"])] for name, score in self.pretrained.items()}

    def state_dict(self) -> dict[str, Any]:
        """The pretrained scores: a resumed run cannot compute them again."""
        return {"pretrained": self.pretrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the pretrained scores over."""
        self.pretrained = state_dict["pretrained"]

    def _k(self, accuracy: dict[int, float]) -> int:
        return self.k if self.k in accuracy else max(accuracy)

    def _evaluate(self, module: torch.nn.Module, eval_set: EvalSet, when: When) -> KNNResult:
        bank, queries = features_of(module, eval_set, batch_size=self.batch_size, num_workers=self.num_workers)
        classes = len(eval_set.class_names)
        result = score_knn(bank, queries, classes, k=self.k, ks=self.ks, temperature=self.temperature)
        for listener in self.listeners:
            listener(eval_set, bank, queries, result, when)
        return result

    def _compare(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, when: When) -> None:
        for eval_set in self.sets:
            before = self.pretrained[eval_set.name]
            result = self._evaluate(pl_module, eval_set, when)
            self.results[eval_set.name] = self._entry(eval_set, before["accuracy"], before["correct"], result)
        scores = {name: entry["finetuned"] for name, entry in self.results.items()}
        metrics = self._metrics(scores, {name: entry["delta"] for name, entry in self.results.items()})
        limits = {name: entry["ci95"] for name, entry in self.results.items()}
        _log(trainer, metrics | _limits(limits))

    def _entry(
        self, eval_set: EvalSet, accuracy: dict[int, float], correct: Tensor, result: KNNResult
    ) -> dict[str, Any]:
        k = result.k
        delta, low, high = paired_bootstrap(correct, result.correct, resamples=self.bootstrap_resamples)
        return {
            "domain": eval_set.domain,
            "k": k,
            "temperature": self.temperature,
            "train": result.train,
            "test": result.test,
            "pretrained": accuracy[k],
            "finetuned": result.accuracy[k],
            "delta": delta,
            "ci95": [low, high],
            "accuracy_by_k": {
                str(other): {"pretrained": accuracy[other], "finetuned": result.accuracy[other]}
                for other in result.accuracy
            },
            **left_out(eval_set, result),
        }

    def baseline_metrics(self) -> dict[str, float]:
        """Return what is logged before step 1: the pretrained scores, and differences of zero."""
        return self._metrics(self.baseline(), dict.fromkeys(self.pretrained, 0.0))

    def _metrics(self, scores: dict[str, float], deltas: dict[str, float]) -> dict[str, float]:
        means = domain_means({s.name: {"domain": s.domain, "delta": deltas[s.name]} for s in self.sets})
        return {
            **{f"knn/{name}": score for name, score in scores.items()},
            **{f"knn_delta/{name}": delta for name, delta in deltas.items()},
            **{f"summary/{name}": mean for name, mean in means.items() if mean is not None},
        }


def left_out(eval_set: EvalSet, result: KNNResult) -> dict[str, dict[str, int]]:
    """Return, as "left_out", how many pictures of bank and queries could not be read; nothing where all could."""
    lost = {"train": len(eval_set.train) - result.train, "test": len(eval_set.test) - result.test}
    return {"left_out": lost} if any(lost.values()) else {}


def _limits(intervals: dict[str, list[float]]) -> dict[str, float]:
    return {
        f"knn_delta_{side}/{name}": limits[position]
        for name, limits in intervals.items()
        for position, side in enumerate(("low", "high"))
    }


def _log(trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
    for sink in trainer.loggers:
        sink.log_metrics(metrics, step=trainer.global_step)
