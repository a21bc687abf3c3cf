"""Captions of the mini world: a small grammar that says something true of a scene and never everything.

A scene has *facts*: for each object its shape, colour, size (unless medium), texture and place; relations between
objects; how many there are; the ground; the light. A caption draws a sentence pattern, the facts it mentions and the
words for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from wlsup.data.mini_render import Draws
from wlsup.data.mini_scenes import Scene
from wlsup.data.mini_words import (
    COLOUR_WORDS,
    GROUND_PHRASES,
    LIGHT_PHRASES,
    NUMBER_WORDS,
    PLACE_PHRASES,
    RELATION_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_ADJECTIVES,
    TEXTURE_SUFFIXES,
    THING_WORDS,
)

__all__ = ["MAX_WORDS", "MIN_WORDS", "Caption", "Fact", "describe", "facts_of", "place_of", "relations_of"]

MIN_WORDS, MAX_WORDS = 5, 25

# ("shape" | "colour" | "size" | "texture" | "place", object) or ("relation", object, object) or ("count",) or
# ("ground",) or ("light",)
Fact = tuple[str | int, ...]


@dataclass(frozen=True)
class Caption:
    """A sentence and the facts of the scene that it mentions."""

    text: str
    facts: frozenset[Fact]


def place_of(scene: Scene, index: int) -> str | None:
    """Where object ``index`` is on the canvas: a key of `PLACE_PHRASES`, None when it is nowhere in particular."""
    thing = scene.objects[index]
    across = "left" if thing.x < 23 else "right" if thing.x > 41 else ""
    down = "top" if thing.y < 23 else "bottom" if thing.y > 41 else ""
    if across or down:
        return f"{down} {across}".strip()
    return "middle" if abs(thing.x - 32) < 7 and abs(thing.y - 32) < 7 else None


def relations_of(scene: Scene, first: int, second: int) -> list[str]:
    """All relations that clearly hold of object ``first`` to object ``second``: keys of `RELATION_PHRASES`."""
    for pairs, forward, backward in ((scene.inside, "inside", "around"), (scene.overlap, "covering", "behind")):
        if (first, second) in pairs:
            return [forward]
        if (second, first) in pairs:
            return [backward]
    a, b = scene.objects[first], scene.objects[second]
    dx, dy = b.x - a.x, b.y - a.y
    relations = []
    if abs(dx) > 12 and abs(dy) < 0.8 * abs(dx):
        relations.append("left of" if dx > 0 else "right of")
    if abs(dy) > 12 and abs(dx) < 0.8 * abs(dy):
        relations.append("above" if dy > 0 else "below")
    apart = (dx * dx + dy * dy) ** 0.5
    gap = apart - a.radius - b.radius
    if gap < 7:
        relations.append("near")
    if apart > 36 and gap > 18:
        relations.append("far from")
    return relations


def facts_of(scene: Scene) -> frozenset[Fact]:
    """Everything a caption of ``scene`` could mention."""
    facts: set[Fact] = {("ground",), ("count",)}
    count = len(scene.objects)
    for index, thing in enumerate(scene.objects):
        facts |= {("shape", index), ("colour", index), ("texture", index)}
        if thing.size != "medium":
            facts.add(("size", index))
        if place_of(scene, index):
            facts.add(("place", index))
        facts |= {("relation", index, other) for other in range(index + 1, count) if relations_of(scene, index, other)}
    if scene.dim:
        facts.add(("light",))
    return frozenset(facts)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _filled(phrase: str, *colours: str, **named: str) -> str:
    """Put colours into a phrase, with the article that they ask for: 'on an orange background'."""
    return re.sub(r"\ba (?=[aeiou])", "an ", phrase.format(*colours, **named))


def _there_are(several: str) -> str:
    return f"there is {several}" if several.startswith("a ") else f"there are {several}"


class _Writer:
    """One caption under way: the scene, its random numbers, and the facts mentioned so far."""

    def __init__(self, scene: Scene, draws: Draws) -> None:
        self.scene, self.draws = scene, draws
        self.facts: set[Fact] = set()

    def noun(self, index: int, *, named: bool = False, spare: tuple[str, ...] = (), many: bool = False) -> str:
        """Adjectives and noun for an object, without article: 'small red star with black stripes'."""
        thing, draws = self.scene.objects[index], self.draws
        words: list[str] = []
        suffix = ""
        if thing.size != "medium" and "size" not in spare and draws.chance(0.4):
            words.append(draws.pick(SIZE_WORDS[thing.size]))
            self.facts.add(("size", index))
        generic = not named and draws.chance(0.12)
        if "texture" not in spare and draws.chance(0.12 if thing.texture == "plain" else 0.5):
            self.facts.add(("texture", index))
            if draws.chance(0.45) and TEXTURE_SUFFIXES[thing.texture]:
                suffix = " " + _filled(draws.pick(TEXTURE_SUFFIXES[thing.texture]), colour=thing.texture_colour)
            else:
                words.append(draws.pick(TEXTURE_ADJECTIVES[thing.texture]))
        if "colour" not in spare and (generic or draws.chance(0.62)):
            words.append(draws.pick(COLOUR_WORDS[thing.colour]))
            self.facts.add(("colour", index))
        if generic:
            singular, plural = draws.pick(THING_WORDS)
        else:
            singular, plural = draws.pick(SHAPE_WORDS[thing.shape])
            self.facts.add(("shape", index))
        return " ".join([*words, plural if many else singular]) + suffix

    def one(self, index: int, **options: bool) -> str:
        """`noun` with its indefinite article."""
        return _article(self.noun(index, **options))

    def ground(self) -> str:
        """Where it all is: 'on a sandy beach'."""
        self.facts.add(("ground",))
        colours = [self.draws.pick(COLOUR_WORDS[name]) for name in self.scene.ground_colours]
        return _filled(self.draws.pick(GROUND_PHRASES[self.scene.ground]), *colours)

    def place(self, index: int) -> str | None:
        """Where an object is on the canvas: 'in the top left corner'."""
        where = place_of(self.scene, index)
        if where is None:
            return None
        self.facts.add(("place", index))
        return self.draws.pick(PLACE_PHRASES[where])

    def relation(self, first: int, second: int) -> str | None:
        """How one object stands to another: 'to the left of'."""
        relations = relations_of(self.scene, first, second)
        if not relations:
            return None
        self.facts.add(("relation", min(first, second), max(first, second)))
        return self.draws.pick(RELATION_PHRASES[self.draws.pick(relations)])

    def number(self) -> str:
        """How many objects there are: 'three'."""
        self.facts.add(("count",))
        return self.draws.pick(NUMBER_WORDS[len(self.scene.objects)])

    def some(self, count: int = 1) -> list[int]:
        """``count`` different objects."""
        return self.draws.sample(range(len(self.scene.objects)), count)

    def unique(self) -> list[int]:
        """Objects that are the only one of their shape: what 'the star' can mean."""
        kinds = [thing.shape for thing in self.scene.objects]
        return [index for index, kind in enumerate(kinds) if kinds.count(kind) == 1]


# -- Sentence patterns: each returns a sentence, or None where the scene has no use for it. --------------------------


def _on_ground(w: _Writer) -> str:
    (i,) = w.some()
    verb = w.draws.pick(("", "", "lying ", "resting ", "seen ", "placed ", "standing "))
    opening = w.draws.pick(("", "", "there is ", "a picture of ", "we see ", "this is "))
    return f"{opening}{w.one(i)} {verb}{w.ground()}"


def _ground_first(w: _Writer) -> str:
    (i,) = w.some()
    verb = w.draws.pick(("lies", "sits", "rests", "appears", "can be seen", "stands"))
    return w.draws.pick((f"{w.ground()} {verb} {w.one(i)}", f"{w.ground()} there is {w.one(i)}"))


def _placed(w: _Writer) -> str | None:
    (i,) = w.some()
    place = w.place(i)
    if place is None:
        return None
    if w.draws.chance(0.3):
        return f"{place} there is {w.one(i)}"
    ground = f" {w.ground()}" if w.draws.chance(0.3) else ""
    return f"{w.one(i)}{ground} {place}" if w.draws.chance(0.7) else f"we see {w.one(i)} {place}"


def _related(w: _Writer) -> str | None:
    if len(w.scene.objects) < 2:
        return None
    i, j = w.some(2)
    relation = w.relation(i, j)
    if relation is None:
        return None
    opening = w.draws.pick(("", "", "there is ", "a picture of "))
    verb = w.draws.pick(("", "", "sitting ", "placed ")) if not relation.endswith("ing") else ""
    ground = f" {w.ground()}" if w.draws.chance(0.4) else ""
    return f"{opening}{w.one(i)} {verb}{relation} {w.one(j)}{ground}"


def _counted(w: _Writer) -> str | None:
    if len(w.scene.objects) < 2:
        return None
    things = w.draws.pick(THING_WORDS)[1]
    start = f"{w.number()} {things}"
    start = f"{start} {w.ground()}" if w.draws.chance(0.75) else _there_are(start)
    (i,) = w.some()
    tail = w.draws.pick(("one of them is", "including", "among them", "one is"))
    return f"{start} , {tail} {w.one(i, named=True)}" if w.draws.chance(0.75) else start


def _same_kind(w: _Writer) -> str | None:
    kinds = [thing.shape for thing in w.scene.objects]
    shape = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if shape is None:
        return None
    alike = [index for index, kind in enumerate(kinds) if kind == shape]
    w.facts |= {("shape", index) for index in alike}
    plural = w.draws.pick(SHAPE_WORDS[shape])[1]
    colour = w.scene.objects[alike[0]].colour
    if all(w.scene.objects[index].colour == colour for index in alike) and w.draws.chance(0.7):
        plural = f"{w.draws.pick(COLOUR_WORDS[colour])} {plural}"
        w.facts |= {("colour", index) for index in alike}
    sentence = f"{w.draws.pick(NUMBER_WORDS[len(alike)])} {plural}"
    others = [index for index in range(len(kinds)) if index not in alike]
    if others and w.draws.chance(0.6):
        sentence += f" and {w.one(w.draws.pick(others), named=True)}"
    return f"{sentence} {w.ground()}" if w.draws.chance(0.6) else _there_are(sentence)


def _listed(w: _Writer) -> str | None:
    count = len(w.scene.objects)
    if count < 2:
        return None
    picked = w.some(min(count, w.draws.pick((2, 2, 3))))
    phrases = [w.one(index) for index in picked]
    if len(set(phrases)) < len(phrases):
        return None
    ground = f" {w.ground()}" if w.draws.chance(0.5) else ""
    return f"{' , '.join(phrases[:-1])} and {phrases[-1]}{ground}"


def _stated(w: _Writer) -> str | None:
    alone = w.unique()
    if not alone:
        return None
    i = w.draws.pick(alone)
    thing = w.scene.objects[i]
    name = w.draws.pick(SHAPE_WORDS[thing.shape])[0]
    w.facts |= {("shape", i), ("colour", i)}
    colour = w.draws.pick(COLOUR_WORDS[thing.colour])
    rest = [w.ground()]
    if thing.texture != "plain" and w.draws.chance(0.5):
        w.facts.add(("texture", i))
        rest = [f"and {w.draws.pick(TEXTURE_ADJECTIVES[thing.texture])}"]
    elif thing.size != "medium" and w.draws.chance(0.5):
        w.facts.add(("size", i))
        rest = [f"and quite {w.draws.pick(SIZE_WORDS[thing.size])}"]
    verb = w.draws.pick(("is", "looks"))
    if rest[0].startswith("and"):
        return f"the {name} {w.draws.pick(('here', 'in this picture'))} {verb} {colour} {rest[0]}"
    return f"the {name} {rest[0]} {verb} {colour}"


def _compared(w: _Writer) -> str | None:
    alone = w.unique()
    if len(alone) < 2:
        return None
    i, j = w.draws.sample(alone, 2)
    a, b = w.scene.objects[i], w.scene.objects[j]
    names = [w.draws.pick(SHAPE_WORDS[thing.shape])[0] for thing in (a, b)]
    w.facts |= {("shape", i), ("shape", j)}
    if a.size != b.size and w.draws.chance(0.5):
        w.facts |= {("size", index) for index, thing in ((i, a), (j, b)) if thing.size != "medium"}
        words = ("bigger", "larger") if a.radius > b.radius else ("smaller", "tinier")
        return f"the {names[0]} is {w.draws.pick(words)} than the {names[1]}"
    if w.draws.chance(0.5):
        w.facts |= {("colour", i), ("colour", j)}
        colours = [w.draws.pick(COLOUR_WORDS[thing.colour]) for thing in (a, b)]
        link = "and" if a.colour == b.colour else w.draws.pick(("and", "while", "but"))
        return f"the {names[0]} is {colours[0]} {link} the {names[1]} is {colours[1]}"
    relation = w.relation(i, j)
    return f"the {names[0]} is {relation} the {names[1]}" if relation else None


def _lit(w: _Writer) -> str | None:
    if not w.scene.dim:
        return None
    (i,) = w.some()
    w.facts.add(("light",))
    return f"{w.one(i)} {w.ground()} {w.draws.pick(LIGHT_PHRASES)}"


_PATTERNS: tuple[Callable[[_Writer], str | None], ...] = (
    _on_ground,
    _on_ground,
    _ground_first,
    _placed,
    _related,
    _related,
    _related,
    _counted,
    _same_kind,
    _same_kind,
    _listed,
    _stated,
    _compared,
    _lit,
)


def describe(scene: Scene, draws: Draws) -> Caption:
    """Write one caption.

    Returns:
        A caption of `MIN_WORDS` to `MAX_WORDS` words that mentions at least two and at most three quarters of the
        scene's facts, in lower case, without a full stop.
    """
    everything = len(facts_of(scene))
    while True:
        writer = _Writer(scene, draws)
        text = draws.pick(_PATTERNS)(writer)
        if text is None or not MIN_WORDS <= len(text.replace(",", "").split()) <= MAX_WORDS:
            continue
        if 2 <= len(writer.facts) <= 0.75 * everything:
            return Caption(text, frozenset(writer.facts))
