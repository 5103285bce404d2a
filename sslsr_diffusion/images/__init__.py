"""The one reader and writer of pictures: pixels, alpha and metadata; 8 and 16 bit; whole or in strips; nothing lost in silence.

`decoders.py` says which library reads which format, `writers.py` which writes it; `metadata/` has what lies beside the pixels.
"""

from sslsr_diffusion.images.picture import Image, Pixels, UnreadableImage
from sslsr_diffusion.images.reader import MAX_PIXELS, OpenPicture, read_image, size_of
from sslsr_diffusion.images.writers import write_image, write_strips
from sslsr_diffusion.listing import IMAGE_SUFFIXES, SUFFIXES, format_of, list_images, printable, suffixes_of
from sslsr_diffusion.tensors import pad_to, resize_bicubic, to_array, to_tensor

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "OpenPicture",
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
    "write_strips",
]
