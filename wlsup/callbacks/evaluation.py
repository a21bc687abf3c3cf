"""More than k-NN of a run: the pretrained encoder is judged before step 1, the fine-tuned one after; both compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from wlsup.batch import CaptionBatch, EvalSet, ImageSpec
from wlsup.callbacks.knn import KNN, When
from wlsup.callbacks.progress import progress
from wlsup.callbacks.undisturbed import undisturbed
from wlsup.evaluation.classes import examples, file_name
from wlsup.evaluation.evaluation_table import evaluation_markdown
from wlsup.evaluation.features import Features, extract_features
from wlsup.evaluation.judgement import Judgement, MetricSpec, compare, judge, protocols, shots_of
from wlsup.evaluation.knn import KNNResult
from wlsup.evaluation.pictures import denormalised
from wlsup.evaluation.retrieval import retrieval_hits, retrieval_intervals
from wlsup.evaluation.zero_shot import Prompts, class_embeddings, read_prompts, zero_shot
from wlsup.files import write_json

__all__ = ["Evaluation", "judged", "save_examples", "score_retrieval", "score_zero_shot", "sentence_embedder"]

logger = logging.getLogger("wlsup")


def judged(
    module: torch.nn.Module, eval_set: EvalSet, bank: Features, queries: Features, knn: KNNResult, spec: MetricSpec
) -> Judgement:
    """Judge one encoder by one set's features, showing progress where there is work."""
    device, classes = next(module.parameters()).device, len(eval_set.class_names)
    if "probe" not in spec and "few_shot" not in spec:
        return judge(bank, queries, knn, spec, num_classes=classes, device=device)
    with progress(f"probes of {eval_set.name}") as show:
        return judge(bank, queries, knn, spec, num_classes=classes, device=device, progress=show)


def sentence_embedder(module: torch.nn.Module) -> Callable[[list[str]], Tensor] | None:
    """Return what maps sentences into the space that an approach's pictures share, None where there is none.

    It is built of the run's own text tower and trained head (as FLYP does), not of a head of its own.
    """
    head, text = getattr(module, "head", None), getattr(module, "text", None)
    learned = getattr(getattr(module, "objective", None), "contrastive_weight", True)
    if not learned or not hasattr(head, "embed_captions") or not callable(text):
        return None
    return lambda sentences: head.embed_captions(text(sentences).pooled)


def score_zero_shot(
    module: torch.nn.Module, eval_set: EvalSet, prompts: Prompts | None = None, *, batch_size: int = 256
) -> dict[str, Any] | None:
    """Classify a set's queries by its class names, None for an approach without a shared space.

    Args:
        module: an approach.
        eval_set: queries and class names; its bank is not looked at.
        prompts: None for the set's own.
        batch_size: pictures a forward pass.

    Returns:
        `zero_shot`'s result with "templates" and "prompts", the number of sentences a class and their file.
    """
    embed = sentence_embedder(module)
    if embed is None:
        return None
    prompts = prompts or read_prompts(eval_set.name)

    def pictures(images: Tensor) -> Tensor:
        return module.embed(CaptionBatch(images, ["a"] * len(images), list(map(str, range(len(images))))))[0]

    with undisturbed(module), progress(f"zero-shot of {eval_set.name}") as show:
        classes = class_embeddings(embed, eval_set.class_names, prompts)
        device = next(module.parameters()).device
        found = extract_features(pictures, eval_set.test, batch_size=batch_size, device=device, progress=show)
    result = zero_shot(found.features, found.labels, classes)
    return result | {"templates": len(prompts.templates), "prompts": prompts.source}


def score_retrieval(module: torch.nn.Module, batches: Iterable[CaptionBatch]) -> dict[str, Any] | None:
    """Return recall of held-out pairs in both directions, None for an approach without a shared space."""
    device, pairs = next(module.parameters()).device, []
    with undisturbed(module):
        for batch in batches:
            if (embedded := module.embed(batch.to(device))) is None:
                return None
            pairs.append([part.float().cpu() for part in embedded])
    if not pairs:
        return None
    image, text = (torch.cat(part) for part in zip(*pairs, strict=True))
    hits = retrieval_hits(image, text)
    recall = {
        name: {str(k): float(each.mean()) for k, each in by_k.items()} for name, by_k in hits.items()
    }  # as JSON has its keys
    limits = {name: {str(k): limit for k, limit in by_k.items()} for name, by_k in retrieval_intervals(hits).items()}
    return {"pairs": len(image), **recall, "ci95": limits}


def save_examples(
    folder: Path,
    eval_set: EvalSet,
    rows: Sequence[dict[str, Any]],
    before: Judgement,
    after: Judgement,
    spec: ImageSpec,
) -> list[str]:
    """Write pictures of the most helped and most hurt classes below ``folder``/classes/<set>/; return their names.

    Of a helped class those that k-NN newly gets right, of a hurt one those that it newly gets wrong.
    """
    from PIL import Image

    place = folder / "classes" / file_name(eval_set.name)
    if place.is_dir():
        shutil.rmtree(place)  # of an earlier evaluation: ranks have changed
    written = []
    for kind, rank, name, queries in examples(rows, before.correct, after.correct, before.labels):
        for number, query in enumerate(queries, start=1):
            picture = denormalised(eval_set.test[int(before.indices[query])][0], spec)
            path = place / f"{kind}-{rank}-{file_name(name)}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            written.append(str(path.relative_to(folder)))
    return written


class Evaluation(Callback):
    """Compare the fine-tuned encoder with the pretrained one by more than k-NN, and write evaluation.json.

    It listens to `KNN`, whose features it uses: the encoder runs no further time, but for zero_shot and retrieval.

    Args:
        metrics: of probe, few_shot, calibration, drift, classes, zero_shot, retrieval. The two that cost nothing by
            default; an empty list turns it off. `wlsup evaluate RUN` gives the others of a finished run.
        shots: of few_shot, pictures a class.
        draws: of few_shot.
        bootstrap_resamples: of the test pictures, for intervals.
    """

    def __init__(
        self,
        metrics: list[str] | None = None,
        shots: tuple[int, ...] = (1, 5),
        draws: int = 20,
        bootstrap_resamples: int = 2000,
    ) -> None:
        chosen = ("drift", "classes") if metrics is None else tuple(metrics)
        self.spec = MetricSpec(chosen, tuple(shots), draws, bootstrap_resamples)
        self.before: dict[str, Judgement] = {}
        self.after: dict[str, Judgement] = {}
        self.results: dict[str, Any] = {}
        self._module: torch.nn.Module | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Listen to k-NN."""
        if stage != "fit":
            return
        self._module = pl_module
        for callback in trainer.callbacks:
            if isinstance(callback, KNN) and self.spec.metrics and trainer.is_global_zero:
                callback.listeners.append(self._heard)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare, write and show."""
        if not self.spec.metrics or not trainer.is_global_zero or not self.after:
            return
        sets, folder = {}, Path(trainer.default_root_dir)
        for eval_set in trainer.datamodule.eval_datasets():
            name = eval_set.name
            if name not in self.before:
                logger.warning(
                    "%s: the checkpoint has no judgement of the pretrained encoder; `wlsup evaluate RUN` makes it", name
                )
                continue
            first, second = self.before[name], self.after[name]
            sets[name] = compare(first, second, self.spec, eval_set.class_names, eval_set.domain)
            if "zero_shot" in self.spec and (found := score_zero_shot(pl_module, eval_set)) is not None:
                sets[name]["zero_shot"] = found
            if "classes" in self.spec:
                save_examples(folder, eval_set, sets[name]["classes"], first, second, pl_module.image_spec)
        if not sets:
            return
        self.results = {"sets": sets}
        if "retrieval" in self.spec and (found := score_retrieval(pl_module, trainer.datamodule.val_dataloader())):
            self.results["retrieval"] = found
        told = {"protocol": protocols(self.spec, sets, "retrieval" in self.results), **shots_of(self.spec)}
        self.results = told | self.results
        write_json(folder / "evaluation.json", self.results)
        for sink in trainer.loggers:
            if isinstance(sink, TensorBoardLogger):
                sink.experiment.add_text("evaluation", evaluation_markdown(self.results), trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What was found of the pretrained encoder: a resumed run cannot find it again."""
        return {"before": {name: found.state() for name, found in self.before.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self.before = {name: Judgement(**state) for name, state in state_dict["before"].items()}

    def _heard(self, eval_set: EvalSet, bank: Features, queries: Features, knn: KNNResult, when: When) -> None:
        if when != "along" and self._module is not None:
            found = judged(self._module, eval_set, bank, queries, knn, self.spec)
            (self.before if when == "pretrained" else self.after)[eval_set.name] = found
