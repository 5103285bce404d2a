"""The one reader and writer of pictures: pixels, alpha, colour profile, EXIF; 8 and 16 bit; nothing lost in silence.

Pillow reads everything of 8 bits and all metadata. It reads 16-bit colour as 8-bit, so OpenCV decodes the pixels of 16-bit PNG
and TIFF files, and `writers.py` encodes them. What a file format or a conversion cannot keep comes back as a note.
"""

from sslsr_diffusion.images.files import IMAGE_SUFFIXES, list_images, printable
from sslsr_diffusion.images.picture import Image, Pixels, UnreadableImage
from sslsr_diffusion.images.reader import MAX_PIXELS, format_of, read_image, size_of
from sslsr_diffusion.images.tensors import pad_to, resize_bicubic, to_array, to_tensor
from sslsr_diffusion.images.writers import SUFFIXES, suffixes_of, write_image

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "SUFFIXES",
    "Image",
    "Pixels",
    "UnreadableImage",
    "format_of",
    "list_images",
    "pad_to",
    "printable",
    "read_image",
    "resize_bicubic",
    "size_of",
    "suffixes_of",
    "to_array",
    "to_tensor",
    "write_image",
]
