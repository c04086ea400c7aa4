"""The settings of data and augmentation (config keys `data`, `augment`)."""

import dataclasses
import re
from typing import Literal

NAME = re.compile(r"(?P<name>[a-z]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
SplitName = Literal["test", "train", "validation"]
# Data sets of characters, which are others in a mirror.
CHARACTERS = re.compile(r"digits|(?<!fashion_)mnist|svhn|omniglot|letters|characters")
MAX_IMAGE_SIZE = 4096
MAX_CROP_PADDING = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images to train and test on (config key `data`)."""

    name: str = "digits"
    """'digits' (scikit-learn's, embedded), 'folder' (images by class in data_dir), or a TFDS
    image-classification set: 'cifar10', 'cifar100', 'name/config', 'name:1.2.3'."""

    data_dir: str | None = None
    """Root of the TFDS sets (null: $TFDS_DATA_DIR, or ~/tensorflow_datasets), or the folder of
    images. If the set is missing there, its cached copy is verified and used."""

    cache_dir: str | None = None
    """Folder for decoded images (null: $JAXQAT_CACHE_DIR, or ~/.cache/jaxqat)."""

    download: bool = False
    """Whether TFDS may download a set that is neither prepared nor cached."""

    train_split: str = "train"
    """Name of the training split; TFDS slices such as 'train[:80%]' work."""

    test_split: str = "test"
    """Name of the test split."""

    image_size: int | None = None
    """Height and width to resize to, cropping to the middle; null keeps the size, which must be
    the same for all images."""

    validation_size: int = 0
    """Training images set aside at random for validation; 0 for no validation split."""

    validation_seed: int = 0
    """Seed for choosing the validation images and the images within the limits."""

    train_limit: int | None = None
    """Training images to keep, for trials; null keeps all."""

    test_limit: int | None = None
    """Test images to keep, for trials; null keeps all."""

    def __post_init__(self):
        if self.name not in ("digits", "folder") and not NAME.fullmatch(self.name):
            raise ValueError(
                "data.name must be 'digits', 'folder' or a TFDS name such as 'cifar10', "
                f"'name/config' or 'name:1.2.3', got {self.name!r}."
            )
        if self.name == "folder" and self.data_dir is None:
            raise ValueError("data.data_dir must be the folder of images when data.name='folder'.")
        if self.validation_size < 0:
            raise ValueError(f"data.validation_size must be >= 0, got {self.validation_size!r}.")
        if not 0 <= self.validation_seed < 2**32:
            raise ValueError(
                f"data.validation_seed must be in 0..2**32 - 1, got {self.validation_seed!r}."
            )
        for key in ("image_size", "train_limit", "test_limit"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"data.{key} must be 1 or more, or null, got {value!r}.")
        if self.image_size is not None and self.image_size > MAX_IMAGE_SIZE:
            raise ValueError(
                f"data.image_size must be at most {MAX_IMAGE_SIZE}, got {self.image_size!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to training images (config key `augment`)."""

    crop_padding: int | None = None
    """Zero pixels added to each side before a random crop to the original size; 0 for no crop;
    null for an eighth of the shorter side (4 for CIFAR)."""

    flip: bool | None = None
    """Whether to mirror each image left to right with probability one half; null mirrors unless
    the data set is one of characters, such as 'digits' or 'mnist'."""

    def of(self, data: DataConfig, height: int, width: int) -> "AugmentConfig":
        """Return the settings with a choice in place of each null.

        Args:
            data: The data set.
            height: Of its images, in pixels.
            width: Of its images, in pixels.
        """
        padding, flip = self.crop_padding, self.flip
        return AugmentConfig(
            crop_padding=round(min(height, width) / 8) if padding is None else padding,
            flip=not CHARACTERS.search(data.name) if flip is None else flip,
        )

    def __post_init__(self):
        if self.crop_padding is not None and not 0 <= self.crop_padding <= MAX_CROP_PADDING:
            raise ValueError(
                f"augment.crop_padding must be in 0..{MAX_CROP_PADDING}, got {self.crop_padding!r}."
            )
