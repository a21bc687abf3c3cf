"""WiSE-FT's curve: k-NN of every set at every place between two states of an encoder, its pictures read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from wlsup.batch import EvalSet
from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features, extract_features
from wlsup.evaluation.scorers import KnnScorer, ProbeScorer, Scorer
from wlsup.evaluation.statistics import Interval, mean_of_intervals, paired_bootstrap
from wlsup.evaluation.validation import FRACTION, picture_keys, take, validation_split
from wlsup.evaluation.wise_ft import ALPHAS, check_alphas, choose_alpha, interpolate

__all__ = ["features_along", "load_tensors", "wise_ft_curve"]

_FEATURE_BYTES = 2**31
"""Of features held at once. A set that would take more is read again for the rest of the alphas."""


Show = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module's parameters and buffers of these names.

    Raises:
        WlsupError: the module has no tensor of a name.
    """
    own = module.state_dict(keep_vars=True)
    if unknown := sorted(tensors.keys() - own.keys()):
        raise WlsupError(f"The model has no tensor {unknown[0]!r}. Give a state of this run.")
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)


def features_along(
    module: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    dataset: Dataset,
    alphas: Sequence[float] = ALPHAS,
    held: Sequence[str] = (),
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[float, Features]]:
    """Yield unit features of a data set at each alpha; a batch is read once and encoded at all of them.

    Args:
        module: has ``features((B, 3, H, W)) -> (B, D)``, in eval mode; it is left in the state of the last alpha.
        start: theta_0, tensors of the module by name.
        end: theta_1.
        dataset: as `extract_features` takes it.
        alphas: the places.
        held: see `interpolate`.
        batch_size: pictures a forward pass.
        num_workers: loader processes.
        progress: called with (passes done, passes to do), a pass being a picture at an alpha.
    """
    device = next(module.parameters()).device
    start, end = ({name: tensor.to(device) for name, tensor in ends.items()} for ends in (start, end))
    if not len(dataset):
        raise WlsupError("The data set has no pictures to extract features from. Check its folder and split.")
    with torch.inference_mode():
        width = module.features(dataset[0][0][None].float().to(device)).shape[1]
    together = max(1, _FEATURE_BYTES // (4 * width * len(dataset)))
    done = 0
    for first in range(0, len(alphas), together):
        group = alphas[first : first + together]

        def extract(images: Tensor, group: Sequence[float] = group) -> Tensor:
            rows = []
            for alpha in group:
                load_tensors(module, interpolate(start, end, alpha, held))
                rows.append(nn.functional.normalize(module.features(images).float(), dim=1))
            return torch.cat(rows, dim=1)

        def show(read: int, total: int, before: int = done, many: int = len(group)) -> None:
            if progress is not None:
                progress(before + read * many, total * len(alphas))

        found = extract_features(
            extract,
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            normalize=False,  # done above, at each alpha
            progress=show,
        )
        done += len(dataset) * len(group)
        for position, alpha in enumerate(group):
            rows = found.features[:, position * width : (position + 1) * width].contiguous()
            yield alpha, Features(rows, found.labels, found.indices, found.skipped)


def wise_ft_curve(
    module: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    sets: Sequence[EvalSet],
    *,
    alphas: Sequence[float] = ALPHAS,
    held: Sequence[str] = (),
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    num_workers: int = 0,
    resamples: int = 10_000,
    probe: bool = False,
    progress: Show | None = None,
    warn: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score every set at every alpha, and choose an alpha on validation pictures of the in-domain sets.

    Source: Wortsman et al. 2022 (WiSE-FT); an encoder without a head is judged by k-NN (Caron et al. 2021) instead.

    Args:
        module: has ``features``; it comes back in the state ``end``, its modes as they were.
        start: theta_0, tensors of the module by name.
        end: theta_1.
        sets: bank and queries of each; of in-domain banks a part validates (`validation_split`).
        alphas: in [0, 1], both ends among them.
        held: see `interpolate`.
        k: of the vote.
        temperature: of the vote.
        batch_size: pictures a forward pass.
        num_workers: loader processes.
        resamples: of the queries, for each difference's 95 % interval.
        probe: also score by a linear probe.
        progress: from a description to a context that takes (done, total).
        warn: is told what was left out.

    Returns:
        What wise_ft.json holds: see docs/wise_ft.md.

    Raises:
        WlsupError: alphas as above, two ends that differ in names, or a set that cannot be scored.
    """
    grid, knn = check_alphas(alphas), KnnScorer(k, temperature)
    entries: dict[str, dict[str, Any]] = {}
    right: dict[str, list[Tensor]] = {}
    validated: dict[str, dict[str, Any]] = {}
    valid_right: dict[str, list[Tensor]] = {}
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        for eval_set in sets:

            @contextmanager
            def along(part: str, eval_set: EvalSet = eval_set) -> Iterator[Iterator[tuple[float, Features]]]:
                description = f"{eval_set.name}, {part}, at {len(grid)} alphas"
                with progress(description) if progress else nullcontext() as show:
                    yield features_along(
                        module,
                        start,
                        end,
                        getattr(eval_set, part),
                        grid,
                        held,
                        batch_size=batch_size,
                        num_workers=num_workers,
                        progress=show,
                    )

            with along("test") as found:
                queries = dict(found)
            scored = _Scored(eval_set, knn, ProbeScorer() if probe else None)
            with along("train") as found:  # scored as they come: of banks no more is held than one pass makes
                for alpha, bank in found:
                    scored.add(bank, queries[alpha])
            for reason in (*scored.skipped, *queries[grid[0]].skipped) if warn else ():
                warn(f"{eval_set.name}: left out {reason}")
            right[eval_set.name] = scored.right
            entry = {"domain": eval_set.domain, "metric": "knn", "k": min(k, scored.train), "train": scored.train}
            entry |= {"test": len(queries[grid[0]]), **_scores(scored.right, resamples)}
            if probe:
                scores = _scores(scored.probed, resamples)
                entry |= {"probe": scores["accuracy"], "probe_delta": scores["delta"], "probe_ci95": scores["ci95"]}
            entries[eval_set.name] = entry
            if eval_set.domain == "in":
                valid_right[eval_set.name] = scored.validated
                validated[eval_set.name] = scored.sizes | _scores(scored.validated, resamples)
    finally:
        load_tensors(module, end)
        for child, training in modes:
            child.training = training
    choice = choose_alpha(grid, {name: entry["accuracy"] for name, entry in validated.items()})
    if over_sets := _mean_scores(list(valid_right.values()), resamples):
        choice["validation"] |= {"delta": over_sets["delta"], "ci95": over_sets["ci95"], "by_set": validated}
    summary = {
        name: _mean_scores([right[eval_set.name] for eval_set in sets if eval_set.domain == domain], resamples)
        for domain, name in (("in", "in_domain"), ("out", "out_of_domain"))
    }
    protocol = f"wise-ft:v1 theta=(1-a)start+a*finetuned in fp32; {knn.protocol}"
    protocol += f"; {ProbeScorer().protocol}" if probe else ""
    protocol += "; ci95 of the change from alpha 0, paired bootstrap over queries"
    return {
        "alphas": list(grid),
        "sets": entries,
        **choice,
        "summary": summary,
        "held": list(held),
        "protocol": f"{protocol}; validation on {FRACTION:g} of each class of a bank",
    }


def _scores(right: list[Tensor], resamples: int) -> dict[str, list]:
    """Return accuracy, change from the first alpha and its interval, at each."""
    changes = [paired_bootstrap(right[0], at, resamples=resamples) for at in right]
    return {
        "accuracy": [int(at.sum()) / len(at) for at in right],
        "delta": [change.estimate for change in changes],
        "ci95": [[change.low, change.high] for change in changes],
    }


def _mean_scores(sets: list[list[Tensor]], resamples: int) -> dict[str, list] | None:
    """Return the same of the mean over sets, the intervals made of theirs as in results.json; None of no set."""
    if not sets:
        return None
    by_set = [_scores(right, resamples) for right in sets]
    means: dict[str, list] = {"accuracy": [], "delta": [], "ci95": []}
    for position in range(len(sets[0])):
        mean = mean_of_intervals([Interval(one["delta"][position], *one["ci95"][position]) for one in by_set])
        means["accuracy"].append(sum(one["accuracy"][position] for one in by_set) / len(by_set))
        means["delta"].append(mean.estimate)
        means["ci95"].append([mean.low, mean.high])
    return means


class _Scored:
    """Which queries of one set are right, alpha by alpha; and of an in-domain set, which validation pictures.

    Attributes:
        right: (m,) bool at each alpha, by k-NN.
        probed: likewise by the probe.
        validated: (v,) bool at each alpha: pictures of the bank scored by the rest of it.
        sizes: of both parts of the bank.
    """

    def __init__(self, eval_set: EvalSet, knn: Scorer, probe: Scorer | None) -> None:
        self.eval_set, self.knn, self.probe = eval_set, knn, probe
        self.right: list[Tensor] = []
        self.probed: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.sizes: dict[str, int] = {}
        self.train, self.skipped = 0, []

    def add(self, bank: Features, queries: Features) -> None:
        """Score the next alpha."""
        classes = len(self.eval_set.class_names)
        self.train, self.skipped = len(bank), bank.skipped
        self.right.append(self.knn(bank, queries, classes))
        if self.probe is not None:
            self.probed.append(self.probe(bank, queries, classes))
        if self.eval_set.domain == "in":
            keys = picture_keys(self.eval_set.train)
            split = validation_split(bank.labels, [keys[row] for row in bank.indices.tolist()])
            self.sizes = {"train": len(split.bank), "validation": len(split.validation)}
            self.validated.append(self.knn(take(bank, split.bank), take(bank, split.validation), classes))
