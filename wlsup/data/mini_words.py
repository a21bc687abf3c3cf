"""The words of the mini world's captions: synonyms for everything a scene can hold."""

from __future__ import annotations

__all__ = [
    "COLOUR_WORDS",
    "GROUND_PHRASES",
    "LIGHT_PHRASES",
    "NUMBER_WORDS",
    "PLACE_PHRASES",
    "RELATION_PHRASES",
    "SHAPE_WORDS",
    "SIZE_WORDS",
    "TEXTURE_ADJECTIVES",
    "TEXTURE_SUFFIXES",
    "THING_WORDS",
]

Nouns = tuple[tuple[str, str], ...]

# Singular and plural.
SHAPE_WORDS: dict[str, Nouns] = {
    "circle": (("circle", "circles"), ("disc", "discs"), ("round plate", "round plates")),
    "square": (("square", "squares"), ("block", "blocks"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"), ("wedge", "wedges")),
    "star": (("star", "stars"), ("star", "stars"), ("five pointed star", "five pointed stars")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "heart": (("heart", "hearts"), ("heart shape", "heart shapes")),
    "crescent": (("crescent", "crescents"), ("crescent moon", "crescent moons"), ("sickle", "sickles")),
    "hexagon": (("hexagon", "hexagons"), ("six sided tile", "six sided tiles")),
    "arrow": (("arrow", "arrows"), ("pointer", "pointers")),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses"), ("kite", "kites")),
    "oval": (("oval", "ovals"), ("ellipse", "ellipses"), ("egg", "eggs")),
    "bar": (("bar", "bars"), ("rectangle", "rectangles"), ("plank", "planks")),
    "half circle": (("half circle", "half circles"), ("dome", "domes")),
    "drop": (("drop", "drops"), ("teardrop", "teardrops"), ("droplet", "droplets")),
    "flower": (("flower", "flowers"), ("blossom", "blossoms")),
}

THING_WORDS: Nouns = (("shape", "shapes"), ("object", "objects"), ("thing", "things"), ("figure", "figures"))

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "lemon"),
    "green": ("green", "green", "emerald"),
    "turquoise": ("turquoise", "teal", "cyan"),
    "blue": ("blue", "blue", "cobalt"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rosy"),
    "brown": ("brown", "brown", "chestnut"),
    "white": ("white", "white", "ivory"),
    "grey": ("grey", "grey", "silver"),
    "black": ("black", "black", "jet black"),
}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}

TEXTURE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "smooth"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
    "gridded": ("gridded", "netted"),
    "zigzag": ("zigzag", "jagged"),
    "wavy": ("wavy", "rippled"),
    "ringed": ("ringed",),
    "outlined": ("outlined", "framed"),
}

# {colour} is the texture's own colour, the second of the object's two.
TEXTURE_SUFFIXES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "striped": ("with {colour} stripes", "with stripes", "with {colour} bands"),
    "dotted": ("with {colour} dots", "covered in dots", "with {colour} spots"),
    "checked": ("with a {colour} check pattern", "with {colour} checks"),
    "gridded": ("with a {colour} grid", "with crossing {colour} lines"),
    "zigzag": ("with {colour} zigzags", "with a zigzag pattern"),
    "wavy": ("with {colour} waves", "with wavy {colour} lines"),
    "ringed": ("with {colour} rings", "with rings like a target"),
    "outlined": ("with a {colour} outline", "with a {colour} border", "with a {colour} edge"),
}

# {0}, {1} are the ground's own colours.
GROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "sand": ("on sand", "on a sandy beach", "in the desert", "on dry sand", "in the sand"),
    "grass": ("on grass", "on a green lawn", "in a meadow", "on the lawn", "in the grass"),
    "water": ("on water", "on blue waves", "in the sea", "on a pond", "on the water"),
    "brick": ("on a brick wall", "against bricks", "in front of a brick wall", "on red bricks"),
    "snow": ("in the snow", "on fresh snow", "on a snowy field", "on snow"),
    "night": ("in the night sky", "at night", "under a dark starry sky", "against the dark sky"),
    "sky": ("in a cloudy sky", "among clouds", "in the air", "against a blue sky with clouds"),
    "wood": ("on a wooden table", "on wooden boards", "on wood", "on brown planks"),
    "tiles": ("on a tiled floor", "on tiles", "on grey tiles", "on floor tiles"),
    "gravel": ("on gravel", "on rough stones", "on a stony path", "on pebbles"),
    "mat": ("on a woven mat", "on woven straw", "on a basket weave", "on a straw rug"),
    "cracked": ("on cracked earth", "on a cracked floor", "on dry broken ground", "on cracked clay"),
    "plain": ("on a {0} background", "against a {0} wall", "on {0} paper", "on plain {0}"),
    "gradient": ("on a background fading from {0} to {1}", "on a {0} and {1} gradient", "between {0} and {1}"),
    "static": ("on grey static", "in noise", "on a noisy screen", "on television snow"),
}

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side", "towards the left"),
    "right": ("on the right", "on the right side", "towards the right"),
    "top": ("at the top", "near the upper edge", "up high"),
    "bottom": ("at the bottom", "near the lower edge", "down low"),
    "top left": ("in the top left corner", "in the upper left"),
    "top right": ("in the top right corner", "in the upper right"),
    "bottom left": ("in the bottom left corner", "in the lower left"),
    "bottom right": ("in the bottom right corner", "in the lower right"),
    "middle": ("in the middle", "in the centre", "right in the middle"),
}

RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
    "near": ("next to", "beside", "close to"),
    "far from": ("far from", "far away from", "a long way from"),
    "inside": ("inside", "within", "in the middle of"),
    "around": ("around", "surrounding", "enclosing"),
    "covering": ("overlapping", "partly covering", "in front of"),
    "behind": ("behind", "partly hidden by", "half covered by"),
}

NUMBER_WORDS: dict[int, tuple[str, ...]] = {
    1: ("one", "a single"),
    2: ("two", "a pair of", "a couple of"),
    3: ("three", "a group of three"),
    4: ("four", "a group of four"),
}

LIGHT_PHRASES: tuple[str, ...] = ("in dim light", "in the dark", "at dusk", "in poor light", "in the shade")
