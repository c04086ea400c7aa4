"""The images of the page, each with its true class and the predictions of networks."""

import base64
from dataclasses import dataclass

import numpy as np
import PIL.Image

from jaxqat.analysis._text import percent
from jaxqat.pipeline.report.samples import Samples
from jaxqat.pipeline.report.theme import encode_png

MAX_PIXELS = 128  # Of a side; larger images are scaled down.


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What a network makes of an image; `probability` is text in percent."""

    network: str
    label: str
    probability: str
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """An image on the page: a data URL, its true class, and a guess of each network."""

    image: str
    label: str
    guesses: tuple[Guess, ...]


def cards(samples: Samples, group: str) -> list[Card]:
    """Return the images of a group: 'samples', 'changed' or 'errors'."""
    return [_card(samples, int(place)) for place in getattr(samples, group)]


def _card(samples: Samples, place: int) -> Card:
    names, label = samples.class_names, int(samples.labels[place])
    guesses = tuple(
        Guess(
            network=network,
            label=names[int(predicted[place])],
            probability=percent(float(shares[place])),
            is_right=int(predicted[place]) == label,
        )
        for network, predicted, shares in zip(
            samples.networks, samples.predicted, samples.probabilities, strict=True
        )
    )
    return Card(image=data_url(samples.images[place]), label=names[label], guesses=guesses)


def to_image(pixels: np.ndarray) -> PIL.Image.Image:
    """Return uint8 pixels as an image; of pixels that are not RGB, the first channel."""
    return PIL.Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def data_url(pixels: np.ndarray) -> str:
    """Return uint8 pixels as a PNG in a URL, scaled down if they are many."""
    image = to_image(pixels)
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
