"""Cross-modal reprogramming: a frozen vision classifier made to classify captions."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.errors import WlsupError
from wlsup.models.caption_tokens import load_tokenizer
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan
from wlsup.ranks import global_sum, mean_over_ranks, processes
from wlsup.reprogramming.classifier import FrozenClassifier
from wlsup.reprogramming.control import compared, train_alike
from wlsup.reprogramming.cross_modal import (
    PatchProgram,
    TextProgramSpec,
    TokenProgram,
    encode_tokens,
    open_base_image,
)
from wlsup.reprogramming.label_map import LabelMap, LabelMapSpec, build_label_map
from wlsup.reprogramming.labels import MINI_GROUNDS, WordLabels
from wlsup.reprogramming.pictures import LabelledPart, eval_set_of, fit_classifier, paired_points
from wlsup.reprogramming.pixels import Pixels

__all__ = ["CrossModalReprogramming", "ReprogrammedReader"]

_log = logging.getLogger("wlsup")

_CALIBRATION = 256
"""Pictures on which the statistics of patch tokens are measured."""

_PENALTY = 1e-4
"""The published factor, which says nothing in token space."""


class ReprogrammedReader(nn.Module):
    """A frozen vision classifier that reads: a program from tokens to its input, and a label map behind it.

    Args:
        classifier: stays as it is.
        program: writes token ids into pixels or patch tokens.
        label_map: of its output.
        slots: of `encode_tokens`.
        canvas: (1, 3, S, S) normalised, what lies beside appended tokens; None: the mean colour.
    """

    def __init__(
        self,
        classifier: FrozenClassifier,
        program: PatchProgram | TokenProgram,
        label_map: LabelMap,
        slots: str = "replace",
        canvas: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.classifier, self.program, self.label_map, self.slots = classifier, program, label_map, slots
        self.register_buffer("canvas", canvas, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, slots) token ids -> (B, classes) logits, the share of values clamped, and the patches' squares summed."""
        if isinstance(self.program, PatchProgram):
            images, clamped, squares = self.program(ids)
            return self.label_map(self.classifier(images)), clamped, squares
        features = encode_tokens(self.classifier.encoder, self.program(ids), self.slots, self.canvas)
        zero = features.new_zeros(())
        return self.label_map(self.classifier.read(features)), zero, zero

    @torch.no_grad()
    def assign(self) -> None:
        """Settle the label map by the classifier's logits on the base picture, grey where there is none."""
        base = self.program.bare() if isinstance(self.program, PatchProgram) else self.canvas
        if base is None:
            size = self.classifier.encoder.image_spec.size
            base = self.program.weight.new_zeros(1, 3, size, size)
        self.label_map.assign(self.classifier(base)[0])


class CrossModalReprogramming(Approach):
    """A frozen vision classifier classifies captions that are written into its pixels or its patch tokens.

    The classifier is the pretrained encoder with a linear head, fitted once, on ``source``'s training split, before the
    first step. Then the program trains: an embedding of every token of the vocabulary. No text model has a part in it.

    Captions have no labels, so a rule gives them: a caption belongs to the class whose words it contains, as
    ``classes`` says; one with words of none or several teaches nothing and counts nowhere. The question is therefore
    not whether captions can be classified (the rule does it), but whether a network that has only seen pictures can be
    made to read. The encoder stays as it is, and so does its k-NN accuracy.

    Source: Neekhara et al. 2022, "Cross-modal Adversarial Reprogramming"; token space is ours.

    Args:
        encoder: the frozen vision encoder.
        source: eval set that the frozen classifier tells apart; one of the data module's.
        labels: its number of classes.
        classes: class name -> words of its captions; the default names ten grounds of the mini world's scenes.
        program: pixels or tokens, and how.
        label_map: what the classifier's labels mean.
        optimizer: optimizer and schedule; Adam, as published, is AdamW without weight decay.
        regularizer: of the encoder; 0 by design here, since nothing in it trains.
        lr: of the program; 1e-3 is the published one, for 100,000 steps.
        penalty: factor of the norm of a batch's patches over its size, in input space; 1e-4 is the published one.
        probe_pictures: at most so many of ``source``'s training pictures fit the head.
        compare: also train the same program, on the same captions, for a random network of the same architecture.

    Raises:
        WlsupError: classes without words, a tokenizer, picture or label map that does not fit, or a penalty of patches
            in token space.
    """

    name = "cross_modal_reprogramming"
    summary = "captions written into a frozen vision classifier's pixels or tokens, which then classifies them"
    untouched = True
    cacheable = "pooled"  # nothing of a picture is looked at

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        source: str = "mini_shapes",
        labels: int = 10,
        classes: dict[str, list[str]] | None = None,
        program: TextProgramSpec = TextProgramSpec(),
        label_map: LabelMapSpec = LabelMapSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 1e-2,
        penalty: float = _PENALTY,
        probe_pictures: int = 5000,
        compare: bool = True,
    ) -> None:
        super().__init__(optimizer, regularizer)
        if program.space == "token" and penalty not in (0, _PENALTY):
            raise WlsupError("penalty is of program.space: input, whose patches it holds small: leave it out.")
        self.vision_spec, self.program_spec, self.label_map_spec = encoder, program, label_map
        self.source, self.labels, self.probe_pictures = source, labels, probe_pictures
        self.lr, self.penalty, self.compare = lr, penalty, compare
        self.word_labels = WordLabels(MINI_GROUNDS if classes is None else classes)
        vision = build_vision(encoder)
        self.slots = vision.grid_size[0] * vision.grid_size[1]
        self.tokenizer = load_tokenizer(program.tokenizer, min(program.max_length, self.slots))
        self.net = self._around(vision)
        self._initial = {n: p.detach().clone() for n, p in self._trained(self.net).named_parameters()}
        self._seen: list[list[str]] = []  # captions of each micro-batch, of all processes
        self._ends: list[int] = []  # how many micro-batches there were when each epoch ended

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

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The vision encoder and the tokenizer, whose ids the program embeds."""
        return {**super().bases, "tokenizer": self.tokenizer.base}

    def prepare(self, datamodule: Any) -> None:
        """Fit the frozen classifier's head, unless a checkpoint brought it, and measure its patch tokens.

        Args:
            datamodule: has the set ``source`` among its eval sets.

        Raises:
            WlsupError: it is not there, or has another number of classes than was said.
        """
        source = eval_set_of(datamodule, self.source, self.labels, "model.labels")
        if not self.net.classifier.labels:
            self._ready(self.net, source)

    def on_fit_start(self) -> None:
        """Prepare on the device of the run."""
        self.prepare(self.trainer.datamodule)

    @staticmethod
    def kept(images: Tensor) -> VisionOutput:
        """(B, 3, H, W) -> nothing of them: a feature cache then spares reading pictures, and encodes none."""
        nothing = images.new_empty(len(images), 0)
        return VisionOutput(nothing, nothing[..., None], 0)

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Classification of the captions that belong to a class; the pictures are not looked at."""
        if self.training and self.compare:
            self._seen.append(batch.captions)
        return self._losses(self.net, batch.captions)

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Measure how many held-out captions are classified rightly, against chance and a random network.

        Returns:
            See `Approach.measure`; nothing where no pairs are held out, or none belongs to a class.
        """
        captions = [caption for batch in datamodule.val_dataloader() for caption in batch.captions]
        labels = self.word_labels(captions) if captions else torch.empty(0)
        labelled = int((labels >= 0).sum())
        if not labelled:
            return {}
        truths, note = labels[labels >= 0], ""
        chance = 100 * float(truths.bincount().max() / labelled)  # of always naming the most frequent class
        with torch.inference_mode(False):
            right = {f"this program, {self.program_spec.space} space": self._right(self.net, captions)}
            if self.compare and self._seen:
                source = eval_set_of(datamodule, self.source, self.labels, "model.labels")
                random, failed = compared(lambda: self._right(self._random_network(source), captions))
                note = f"{failed}. "
                if random is not None:
                    right["the same program, a random network"] = random
                    note = f"This program against the random network's: {paired_points(*right.values())}. "
        rows = [
            {
                "what": what,
                "value": 100 * float(answers.float().mean()),
                "unit": "%",
                "chance": chance,
                "n": len(answers),
            }
            for what, answers in right.items()
        ]
        return {
            "title": f"Accuracy of a frozen classifier of {self.source} that reads {labelled} held-out captions in "
            f"{len(self.word_labels)} classes",
            "rows": rows,
            "note": f"{note}Classes are given by words ({', '.join(self.word_labels.names)}); "
            f"{len(captions) - labelled} of {len(captions)} captions have words of none or several and are left out. "
            "The encoder is untouched by design.",
            "protocol": "caption-classes:v1 top-1 over the held-out captions that words give one class",
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the head and the label map beside what trains."""
        super().on_save_checkpoint(checkpoint)
        classifier = self.net.classifier
        checkpoint["reprogramming"] = {
            "head": (classifier.weight.cpu(), classifier.bias.cpu()),
            "assigned": getattr(self.net.label_map, "assigned", None),
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

    def _around(self, encoder: VisionEncoder) -> ReprogrammedReader:
        spec, vocabulary, size = self.program_spec, len(self.tokenizer), encoder.image_spec.size
        label_map = build_label_map(self.label_map_spec, len(self.word_labels), self.labels)
        base = None if spec.base_image is None else open_base_image(spec.base_image, size)
        if spec.space == "input":
            program = PatchProgram(vocabulary, encoder.image_spec, encoder.patch_size, base, spec.alpha)
            return ReprogrammedReader(FrozenClassifier(encoder), program, label_map)
        program = TokenProgram(vocabulary, encoder.embed_dim, spec.match)
        canvas = None if base is None else Pixels(encoder.image_spec).normalised(base[None])[0]
        return ReprogrammedReader(FrozenClassifier(encoder), program, label_map, spec.slots, canvas)

    def _ready(self, net: ReprogrammedReader, source: Any) -> None:
        fit_classifier(net.classifier, source, self.probe_pictures, self.device)
        if isinstance(net.program, TokenProgram):
            images, _ = next(LabelledPart(source.train).batches(_CALIBRATION))
            net.program.calibrate(net.classifier.encoder, images.to(self.device))
        net.assign()

    def _losses(self, net: ReprogrammedReader, captions: list[str]) -> dict[str, Tensor]:
        labels = self.word_labels(captions)
        chosen = [caption for caption, label in zip(captions, labels.tolist(), strict=True) if label >= 0]
        share = torch.tensor(len(chosen) / len(captions), device=self.device)
        many = torch.tensor(len(chosen), device=self.device)
        if chosen:
            ids = self.tokenizer(chosen, length=self.slots, device=self.device).ids
            logits, clamped, squares = net(ids)
            total = F.cross_entropy(logits, labels[labels >= 0].to(self.device), reduction="sum")
        else:  # nothing to learn from, and still a loss of all that trains, which the other ranks' gradients ask for
            total = squares = 0 * sum(p.sum() for p in self._trained(net).parameters())
            clamped = total.detach()
        loss = mean_over_ranks(total, many)
        # The published regulariser: the norm of all the batch's patches together over B, not the mean of their norms.
        everyones, number = global_sum(torch.stack([squares, many.to(squares.dtype)]))
        root = torch.where(everyones > 0, everyones.clamp(min=1e-30).sqrt(), everyones)  # whose slope at 0 is infinite
        norm = root / number.clamp(min=1)
        return {
            "loss": loss + self.penalty * norm,
            "classification": loss,
            "penalty": norm.detach(),
            "clamped": mean_over_ranks(clamped.detach() * many, many),
            "labelled": share,
        }

    @torch.no_grad()
    def _right(self, net: ReprogrammedReader, captions: list[str]) -> Tensor:
        """Return which of the captions that belong to a class are classified rightly, (n,) bool."""
        labels = self.word_labels(captions)
        chosen = [caption for caption, label in zip(captions, labels.tolist(), strict=True) if label >= 0]
        answers = []
        for start in range(0, len(chosen), 256):
            ids = self.tokenizer(chosen[start : start + 256], length=self.slots, device=self.device).ids
            answers.append(net(ids)[0].argmax(-1).cpu())
        return torch.cat(answers) == labels[labels >= 0]

    def on_train_epoch_end(self) -> None:
        """Hear from the other processes which captions they trained on, for the control."""
        world, _ = processes()
        if self.compare and world > 1:
            everyones: list[list[list[str]]] = [[] for _ in range(world)]
            begin = self._ends[-1] if self._ends else 0
            dist.all_gather_object(everyones, self._seen[begin:])
            joined = zip(*everyones, strict=True)
            self._seen[begin:] = [[text for part in parts for text in part] for parts in joined]
        self._ends.append(len(self._seen))

    def _steps(self, parts: int) -> list[list[list[str]]]:
        """Return the captions of each step: of ``parts`` micro-batches, or as many as were left when an epoch ended."""
        spans = zip([0, *self._ends], [*self._ends, len(self._seen)], strict=True)
        return [self._seen[i : min(i + parts, end)] for begin, end in spans for i in range(begin, end, parts)]

    def _loss(self, net: ReprogrammedReader, captions: list[str]) -> Tensor:
        return self._losses(net, captions)["loss"]

    @staticmethod
    def _trained(net: ReprogrammedReader) -> nn.ModuleDict:
        return nn.ModuleDict({"program": net.program, "label_map": net.label_map})

    def _random_network(self, source: Any) -> ReprogrammedReader:
        """Train the same program for a random network, from the same start on the same captions."""
        trainer, cuda = self.trainer, [self.device] if self.device.type == "cuda" else []
        steps = self._steps(trainer.accumulate_grad_batches)
        _log.info("training the same program for a random network, %d steps", trainer.global_step)
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            net = self._around(build_vision(replace(self.vision_spec, pretrained=False))).to(self.device).eval()
            net.requires_grad_(False)
            parts = self._trained(net)
            parts.load_state_dict(self._initial, strict=False)
            self._ready(net, source)
            train_alike(
                parts,
                TrainPlan([Train("*", self.lr)]),
                self.optimizer_spec,
                trainer,
                self.regularizer.spec.ema,
                # A resumed run no longer has the captions from before: it goes round those that it has.
                lambda step: [partial(self._loss, net, captions) for captions in steps[step % len(steps)]],
            )
        return net.eval()
