"""The plan: the one place that says what trains.

A plan is an ordered list of rules, each a glob over parameter names; the first rule that matches a parameter decides
(as in big_vision, where a parameter without a schedule is frozen). From that one list follow `requires_grad`, the
train/eval mode of every module and the optimizer's groups, so that the three cannot disagree.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from wlsup.errors import WlsupError

__all__ = ["Freeze", "PlannedParameter", "Rule", "Train", "TrainIf", "TrainPlan", "plan_markdown"]


@dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose names match a glob.

    Args:
        pattern: glob over `nn.Module.named_parameters` names; ``*`` also crosses dots.
        lr: learning rate after warm-up; None freezes.
        weight_decay: decoupled weight decay (AdamW); never applied to tensors of fewer than two dimensions.
        optional: the rule may match nothing (a part that only some configurations have).
    """

    pattern: str
    lr: float | None = None
    weight_decay: float = 0.0
    optional: bool = False

    @property
    def trains(self) -> bool:
        """Whether parameters under this rule are updated."""
        return self.lr is not None

    def matches(self, name: str) -> bool:
        """Whether ``name`` falls under the glob."""
        return fnmatch.fnmatchcase(name, self.pattern)


def Train(pattern: str, lr: float, weight_decay: float = 0.0, *, optional: bool = False) -> Rule:  # noqa: N802
    """Return a rule that trains every parameter matching ``pattern``."""
    return Rule(pattern, lr=lr, weight_decay=weight_decay, optional=optional)


def TrainIf(used: object, pattern: str, lr: float, weight_decay: float = 0.0) -> Rule:  # noqa: N802
    """Return a rule that trains what is ``used``, and freezes it if no loss reaches it."""
    return Rule(pattern, lr=lr if used else None, weight_decay=weight_decay)


def Freeze(pattern: str, *, optional: bool = False) -> Rule:  # noqa: N802
    """Return a rule that keeps every parameter matching ``pattern`` as it is."""
    return Rule(pattern, optional=optional)


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter and the rule that decides about it."""

    name: str
    parameter: nn.Parameter
    rule: Rule


class TrainPlan:
    """Ordered rules over a module's parameters: what trains, at which rate, and what stays.

    Args:
        rules: the first that matches a parameter's name decides. A parameter that no rule names is an error, and so is
            a rule that decides about nothing (unless ``optional``): a freeze by a substring that silently matches
            nothing is how MAGMA's published code came to train its whole language model.

    Raises:
        WlsupError: no rule given, or a negative learning rate or weight decay.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        if not rules:
            raise WlsupError("A plan needs at least one rule: Train(pattern, lr) or Freeze(pattern).")
        for rule in rules:
            if rule.lr is not None and not rule.lr >= 0 or not rule.weight_decay >= 0:
                raise WlsupError(
                    f"Rule {rule.pattern!r}: lr and weight_decay must be >= 0, not {rule.lr} and {rule.weight_decay}."
                )
        self.rules = tuple(rules)

    def resolve(self, module: nn.Module) -> list[PlannedParameter]:
        """Return every parameter of ``module`` (shared ones once) with its rule.

        Raises:
            WlsupError: naming each parameter that no rule matches, or each rule that decides about no parameter.
        """
        planned, orphans, used = [], [], set()
        for name, parameter in module.named_parameters():
            rule = next((rule for rule in self.rules if rule.matches(name)), None)
            if rule is None:
                orphans.append(name)
                continue
            used.add(rule)
            planned.append(PlannedParameter(name, parameter, rule))
        if orphans:
            raise WlsupError(
                f"No rule of the plan names {_listed(orphans)}. Rules: {_listed([r.pattern for r in self.rules])}. "
                "Add Train(pattern, lr) or Freeze(pattern) for them."
            )
        idle = [rule.pattern for rule in self.rules if rule not in used and not rule.optional]
        if idle:
            raise WlsupError(
                f"The plan's rule {_listed(idle)} decides about no parameter: none matches, or an earlier rule takes "
                "them all. Correct the pattern, move it up, or remove it."
            )
        return planned

    def apply(self, module: nn.Module) -> None:
        """Set `requires_grad` of every parameter; call once, before the optimizer is made."""
        for planned in self.resolve(module):
            planned.parameter.requires_grad_(planned.rule.trains)

    def set_train_mode(self, module: nn.Module) -> None:
        """Put what trains into train mode and what is frozen into eval mode.

        A module is in train mode if all its parameters train; a module without parameters (dropout) follows its parent;
        a mixed module is in eval mode itself, and its children decide for themselves. The root is always in train mode.
        """
        trained = {id(p.parameter) for p in self.resolve(module) if p.rule.trains}

        def visit(child: nn.Module, parent_trains: bool) -> None:
            own = [id(p) in trained for p in child.parameters()]
            child.training = all(own) if own else parent_trains
            for grandchild in child.children():
                visit(grandchild, child.training)

        module.training = True
        for child in module.children():
            visit(child, True)

    def parameter_groups(self, module: nn.Module) -> list[dict]:
        """Return optimizer groups: one a rule and decay kind, in the rules' order.

        Returns:
            Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``; tensors of fewer than two dimensions
            (biases, norms, gates, ``logit_scale``) get no weight decay.
        """
        groups: dict[tuple[str, bool], dict] = {}
        order = {rule: position for position, rule in enumerate(self.rules)}
        for planned in sorted(self.resolve(module), key=lambda p: order[p.rule]):
            rule = planned.rule
            if not rule.trains:
                continue
            decays = planned.parameter.ndim >= 2 and rule.weight_decay > 0
            group = groups.setdefault(
                (rule.pattern, decays),
                {
                    "params": [],
                    "lr": rule.lr,
                    "weight_decay": rule.weight_decay if decays else 0.0,
                    "name": rule.pattern + ("" if decays or rule.weight_decay == 0 else " (no decay)"),
                },
            )
            group["params"].append(planned.parameter)
        return list(groups.values())

    def trained_names(self, module: nn.Module) -> list[str]:
        """Return the names of the parameters that train."""
        return [p.name for p in self.resolve(module) if p.rule.trains]

    def describe(self, module: nn.Module) -> dict:
        """Return the plan as data, for plan.json, the checkpoint and TensorBoard.

        Returns:
            ``rules`` (pattern, trains, lr, weight_decay, tensors, parameters), ``trained`` and ``total`` counts.
        """
        planned = self.resolve(module)
        rows = []
        for rule in self.rules:
            mine = [p.parameter.numel() for p in planned if p.rule is rule]
            if mine or not rule.optional:
                rows.append(
                    {
                        "pattern": rule.pattern,
                        "trains": rule.trains,
                        "lr": rule.lr,
                        "weight_decay": rule.weight_decay if rule.trains else None,
                        "tensors": len(mine),
                        "parameters": sum(mine),
                    }
                )
        trained = sum(p.parameter.numel() for p in planned if p.rule.trains)
        return {"rules": rows, "trained": trained, "total": sum(p.parameter.numel() for p in planned)}

    def summary(self, module: nn.Module) -> str:
        """Return one line in peft's manner: trained, all and the percentage between."""
        plan = self.describe(module)
        share = 100 * plan["trained"] / max(plan["total"], 1)
        patterns = ", ".join(row["pattern"] for row in plan["rules"] if row["trains"]) or "nothing"
        return f"trains {patterns}: {plan['trained']:,} of {plan['total']:,} parameters ({share:.2f} %)"


def plan_markdown(description: dict) -> str:
    """Render `TrainPlan.describe` as a Markdown table."""
    lines = ["| parameters | trains | lr | weight decay | tensors | count |", "|---|---|---|---|---:|---:|"]
    for row in description["rules"]:
        lr = f"{row['lr']:g}" if row["trains"] else "-"
        decay = f"{row['weight_decay']:g}" if row["trains"] else "-"
        state = "yes" if row["trains"] else "frozen"
        lines.append(f"| `{row['pattern']}` | {state} | {lr} | {decay} | {row['tensors']} | {row['parameters']:,} |")
    share = 100 * description["trained"] / max(description["total"], 1)
    lines.append(f"\ntrained {description['trained']:,} of {description['total']:,} parameters ({share:.2f} %)")
    return "\n".join(lines)


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + tail
