"""Adversarial reprogramming: a frozen classifier does another task by what is painted around its pictures."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan
from wlsup.reprogramming.classifier import FrozenClassifier
from wlsup.reprogramming.control import compared, train_alike
from wlsup.reprogramming.input import InputProgram, InputSpec
from wlsup.reprogramming.label_map import FixedLabelMap, LabelMap, LabelMapSpec, build_label_map
from wlsup.reprogramming.pictures import LabelledPart, eval_set_of, fit_classifier, paired_points, split_train

__all__ = ["Reprogrammed", "ReprogrammingApproach"]

_log = logging.getLogger("wlsup")


class Reprogrammed(nn.Module):
    """A frozen classifier with a program in front of it and a label map behind it.

    Args:
        classifier: stays as it is.
        program: of its input.
        label_map: of its output.
    """

    def __init__(self, classifier: FrozenClassifier, program: InputProgram, label_map: LabelMap) -> None:
        super().__init__()
        self.classifier, self.program, self.label_map = classifier, program, label_map

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised -> (B, classes) logits of the new task, and the share of values clamped."""
        adversarial, clamped = self.program(images)
        return self.label_map(self.classifier(adversarial)), clamped

    @torch.no_grad()
    def assign(self) -> None:
        """Settle the label map by the classifier's logits on the bare canvas, with no picture in it."""
        grey = torch.full_like(self.program.weight, 0.5)[None]
        self.label_map.assign(self.classifier(self.program.pixels.normalised(grey)[0])[0])


class ReprogrammingApproach(Approach):
    """A learned program of pixels that makes a frozen classifier of one set solve another.

    The classifier is the pretrained encoder with a linear head, fitted once, on ``source``'s training split, before the
    first step (logistic regression, the same every time). Then only the program trains, on ``task``'s training split;
    its test split is for `measure` alone.

    Captions have no part in this: those of a run only set the pace, a step of labelled pictures for each batch of
    pairs. The encoder stays as it is, and so does its k-NN accuracy.

    Source: Elsayed et al. 2019, "Adversarial Reprogramming of Neural Networks", equations 1 to 4.

    Args:
        encoder: the frozen vision encoder.
        source: eval set that the frozen classifier tells apart; one of the data module's.
        labels: its number of classes.
        task: eval set that the program solves; one of the data module's.
        classes: its number of classes.
        program: the picture's size in the canvas, and what the program covers.
        label_map: what the classifier's labels mean in the task.
        optimizer: optimizer and schedule; Adam, as published, is AdamW without weight decay.
        regularizer: of the encoder; 0 by design here, since nothing in it trains.
        lr: of the program; 0.05 is the published one.
        penalty: lambda, factor of the program's squared norm.
        probe_pictures: at most so many of ``source``'s training pictures fit the head.
        compare: also train the same program, with the same budget, around a random network of the same architecture.
    """

    name = "reprogramming"
    summary = "a learned program of pixels makes a frozen classifier do another task (adversarial reprogramming)"
    untouched = True

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        source: str = "mini_shapes",
        labels: int = 10,
        task: str = "mini_digits",
        classes: int = 10,
        program: InputSpec = InputSpec(),
        label_map: LabelMapSpec = LabelMapSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 0.05,
        penalty: float = 1e-5,
        probe_pictures: int = 5000,
        compare: bool = True,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.vision_spec, self.program_spec, self.label_map_spec = encoder, program, label_map
        self.source, self.labels, self.task, self.classes = source, labels, task, classes
        self.lr, self.penalty, self.probe_pictures, self.compare = lr, penalty, probe_pictures, compare
        self.net = self._around(build_vision(encoder))
        self._initial = copy.deepcopy(self._trained(self.net))
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._learn: LabelledPart | None = None
        self._choose: LabelledPart | None = None

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder."""
        return self.net.classifier.encoder

    @property
    def plan(self) -> TrainPlan:
        """The program trains, and a linear label map where there is one; the encoder never does."""
        return TrainPlan(
            [
                Train("net.program.*", self.lr),
                Train("net.label_map.*", self.lr, optional=True),
                Freeze("net.classifier.*"),
            ]
        )

    def prepare(self, datamodule: Any) -> None:
        """Fit the frozen classifier's head, unless a checkpoint brought it, and split the task's training pictures.

        Args:
            datamodule: has both sets among its eval sets.

        Raises:
            WlsupError: a set is not there, or has another number of classes than was said.
        """
        source = eval_set_of(datamodule, self.source, self.labels, "model.labels")
        task = eval_set_of(datamodule, self.task, self.classes, "model.classes")
        if not self.net.classifier.labels:
            fit_classifier(self.net.classifier, source, self.probe_pictures, self.device)
            self.net.assign()
        self._learn, self._choose = split_train(task.train)

    def on_fit_start(self) -> None:
        """Prepare on the device of the run."""
        self.prepare(self.trainer.datamodule)

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Classification of as many labelled pictures, drawn anew, as the batch has pairs.

        Raises:
            WlsupError: not prepared.
        """
        return self._losses(self.net, len(batch))

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        """Held-out captions say nothing about the program."""

    def on_train_epoch_end(self) -> None:
        """Keep the program that is best on training pictures held out for this choice."""
        accuracy = self._validate(self.net)
        self.log("val/accuracy", accuracy, rank_zero_only=True)
        if self._best is None or accuracy > self._best[0]:
            self._best = accuracy, copy.deepcopy(self._trained(self.net))

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Measure the best program on the task's test split, against chance and a random network with the same budget.

        Returns:
            See `Approach.measure`.
        """
        source = eval_set_of(datamodule, self.source, self.labels, "model.labels")
        task = eval_set_of(datamodule, self.task, self.classes, "model.classes")
        test, note = LabelledPart(task.test), ""
        with torch.inference_mode(False), torch.no_grad():
            last = copy.deepcopy(self._trained(self.net))
            self._load(self.net, last if self._best is None else self._best[1])
            right, labels = self._right(self.net, test)
            rows = [_row(f"this program: {task.name}", right, labels)]
            if self.compare:
                random, failed = compared(lambda: self._right(self._random_network(source), test)[0])
                note = f"{failed}. "
                if random is not None:
                    rows.append(_row(f"the same program, a random network: {task.name}", random, labels))
                    note = f"This program against the random network's: {paired_points(right, random)}. "
            if isinstance(self.net.label_map, FixedLabelMap):  # a linear one means nothing before it is trained
                self._load(self.net, self._initial)
                rows.append(_row(f"no program, a grey frame: {task.name}", *self._right(self.net, test)))
            self._load(self.net, last)
            own = self._right(self.net.classifier, LabelledPart(source.test))
            rows.append(_row(f"the classifier itself: {source.name}", *own))
        return {
            "title": f"Accuracy of a frozen classifier of {source.name} reprogrammed for {task.name}, test split",
            "rows": rows,
            "note": f"{note}Captions have no part in this; the encoder is untouched by design. The program was chosen "
            "on held-out training pictures.",
            "protocol": "reprogramming:v1 top-1 of the mapped classes over the whole test split",
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the head, the label map and the best program beside what trains."""
        super().on_save_checkpoint(checkpoint)
        classifier = self.net.classifier
        checkpoint["reprogramming"] = {
            "head": (classifier.weight.cpu(), classifier.bias.cpu()),
            "assigned": getattr(self.net.label_map, "assigned", None),
            "best": self._best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("reprogramming")
        if kept is None or not len(kept["head"][1]):
            return
        self.net.classifier.set_head(*kept["head"])
        if kept["assigned"] is not None:
            self.net.label_map.assigned = kept["assigned"].to(self.device)
        self._best = kept["best"]

    def _around(self, encoder: VisionEncoder) -> Reprogrammed:
        program = InputProgram(encoder.image_spec, self.program_spec)
        label_map = build_label_map(self.label_map_spec, self.classes, self.labels)
        return Reprogrammed(FrozenClassifier(encoder), program, label_map)

    def _losses(self, net: Reprogrammed, count: int) -> dict[str, Tensor]:
        if self._learn is None:
            raise WlsupError(
                f"reprogramming learns from the labelled set {self.task!r}, not from pairs: attach a data module that "
                "has it among its eval_sets, or call prepare(datamodule)."
            )
        images, labels = self._learn.draw(count)
        logits, clamped = net(images.to(self.device))
        loss = F.cross_entropy(logits, labels.to(self.device))
        penalty = net.program.penalty()
        return {
            "loss": loss + self.penalty * penalty,
            "classification": loss,
            "penalty": penalty.detach(),
            "clamped": clamped,
            "saturated": net.program.saturation(),
        }

    def _right(self, net: nn.Module, part: LabelledPart) -> tuple[Tensor, Tensor]:
        predict = net if isinstance(net, FrozenClassifier) else lambda images: net(images)[0]
        return part.right(predict, self.device)

    @torch.no_grad()
    def _validate(self, net: Reprogrammed) -> float:
        return float(self._right(net, self._choose)[0].float().mean())

    @staticmethod
    def _trained(net: Reprogrammed) -> dict[str, Tensor]:
        state = net.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}

    @staticmethod
    def _load(net: Reprogrammed, state: dict[str, Tensor]) -> None:
        net.load_state_dict(state, strict=False)

    def _random_network(self, source: Any) -> Reprogrammed:
        """Train the same program around a random network: as many steps, pictures and choices, the same schedule."""
        trainer, cuda = self.trainer, [self.device] if self.device.type == "cuda" else []
        _log.info("training the same program around a random network, %d steps", trainer.global_step)
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            net = self._around(build_vision(replace(self.vision_spec, pretrained=False))).to(self.device).eval()
            self._load(net, self._initial)
            net.requires_grad_(False)
            fit_classifier(net.classifier, source, self.probe_pictures, self.device)
            net.assign()
            count = trainer.datamodule.batch_size * trainer.world_size
            every = max(trainer.global_step // max(trainer.current_epoch, 1), 1)
            best: list[tuple[float, dict[str, Tensor]]] = []

            def choose_at_epoch_end(step: int) -> None:
                if (step + 1) % every == 0:
                    accuracy = self._validate(net)
                    if not best or accuracy > best[-1][0]:
                        best.append((accuracy, copy.deepcopy(self._trained(net))))

            train_alike(
                nn.ModuleList([net.program, net.label_map]),
                TrainPlan([Train("*", self.lr)]),
                self.optimizer_spec,
                trainer,
                self.regularizer.spec.ema,
                lambda step: [lambda: self._losses(net, count)["loss"]] * trainer.accumulate_grad_batches,
                choose_at_epoch_end,
            )
            if best:
                self._load(net, best[-1][1])
        return net.eval()


def _row(what: str, right: Tensor, labels: Tensor) -> dict[str, Any]:
    chance = labels.bincount().max() / len(labels)  # of always naming the most frequent class
    share = 100 * float(right.float().mean())
    return {"what": what, "value": share, "unit": "%", "chance": 100 * float(chance), "n": len(right)}
