"""Plain words for keys and lists, and codes that are no words."""

import numpy as np

_ADJECTIVES = (
    "amber ancient bitter bold brave brisk broad calm clever coarse copper crisp curious damp "
    "distant dusty eager early empty faint fierce gentle golden grand hidden hollow humble idle "
    "iron ivory jolly keen lively lonely lucky mellow misty modest narrow noble odd pale patient "
    "plain polite proud quiet rapid rare rough royal rusty scarlet sharp silent silver simple slow "
    "smooth solid steep stern sturdy subtle sunny sweet swift tame tender tidy tiny vast velvet "
    "violet vivid warm weary wild wise young"
)
_NOUNS = (
    "acorn anchor apple apron arrow badger bakery banjo barrel basket beacon beetle bicycle "
    "blanket bottle bridge bucket butter cabin camel candle canoe carpet castle cellar cherry "
    "circus clover cobbler compass coral cottage cousin cradle cricket crown curtain daisy desert "
    "dolphin donkey dragon drummer eagle elbow ember falcon farmer feather ferry fiddle flute "
    "forest fountain fox garden garlic giant ginger glacier goose granite guitar hammer harbor "
    "hawk hedge helmet heron honey island ivy jacket jaguar jungle kettle kitten ladder lagoon "
    "lantern lemon leopard lily lizard lobster magnet mango maple marble meadow melon mitten "
    "monkey mountain muffin needle nutmeg oak ocean olive onion orchard otter oyster paddle palace "
    "panther parrot pebble pelican pepper piano pigeon pillow pirate planet poplar potato puffin "
    "pumpkin puppy quilt rabbit raven ribbon river rooster saddle sailor salmon sandal shepherd "
    "shovel sparrow spider spoon squirrel stable statue sugar sunset swan tailor teapot temple "
    "thistle thunder tiger timber tomato tower tulip tunnel turtle umbrella valley velvet village "
    "violin volcano waffle wagon walnut walrus whistle willow window winter wizard zebra"
)

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())


def draw_key(generator: np.random.Generator) -> str:
    """Two words with a hyphen, such as `quiet-lantern`."""
    adjective, noun = generator.integers(len(ADJECTIVES)), generator.integers(len(NOUNS))
    return f"{ADJECTIVES[int(adjective)]}-{NOUNS[int(noun)]}"


def draw_number(generator: np.random.Generator) -> str:
    """A number of seven digits that does not start with 0."""
    return str(int(generator.integers(1_000_000, 10_000_000)))


def draw_code(generator: np.random.Generator, num_letters: int = 6) -> str:
    """Random lower-case letters."""
    return "".join(chr(ord("a") + int(i)) for i in generator.integers(26, size=num_letters))
