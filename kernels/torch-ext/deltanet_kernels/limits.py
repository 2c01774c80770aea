"""What the kernels take, and what they add inside a norm: for whoever chooses between them and torch."""

CHUNK = 64  # tokens per chunk: the unit of the triangular inverse and of a scan's step
MAX_HEAD_SIZE = 256  # of keys and of values
MIN_TAPS, MAX_TAPS = 2, 4  # of the short convolution
NORM_EPS = 1e-6  # added to the squared L2 norm of q and k
LEAST_CAPABILITY = (8, 0)  # compute capability: bf16 products in tensor cores
MAX_CHUNKS = 65535  # in one set of launches of the chunked rule: where the second axis of a grid ends
