"""What is on disk: image folders, lists, archives, class names, feature files."""

from fastood.data.decode import decode
from fastood.data.feature_files import load_features
from fastood.data.imageset import ImageItem, ImageSet
from fastood.data.layouts import Layout, SubSet, recognise
from fastood.data.load import load_images

__all__ = [
    "ImageItem",
    "ImageSet",
    "Layout",
    "SubSet",
    "decode",
    "load_features",
    "load_images",
    "recognise",
]
